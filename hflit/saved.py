"""What a run left in its folder -> task, model and tokenizer, ready to use."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from hflit.loading import architectures, load_base, load_tokenizer, load_weights
from hflit.loop.folders import NAME
from hflit.tasks import TASKS

RUN_FILE = "run.json"  # what the call was given, beside the model


@dataclass
class Saved:
    """A trained model.

    Attributes:
        task: One of the six.
        model: In evaluation mode, with its adapter if it has one.
        tokenizer: Its tokenizer.
        settings: Arguments of the call that trained it, by name: columns, lengths, prefix; empty
            if nothing is known of it.
    """

    task: str
    model: Any
    tokenizer: PreTrainedTokenizerBase
    settings: dict[str, Any] = field(default_factory=dict)


def load_saved(folder: str | os.PathLike[str], trust_remote_code: bool = False) -> Saved:
    """Load a trained model: one of ours, or any that has a head for one of the six tasks.

    Args:
        folder: Folder or hub id; adapters are put onto the base they were trained on.
        trust_remote_code: Whether code that comes with it may run.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: The model has no head for any task, or its base is unknown.
    """
    path = Path(os.path.expanduser(folder))
    settings = read_run(path)
    if (path / "adapter_config.json").exists():
        task, model = _adapted(path, settings, trust_remote_code)
        tokenizer = load_tokenizer(str(path), trust_remote_code)
        tokenizer = load_base((model, tokenizer)).tokenizer
        return Saved(task, model.eval(), tokenizer, settings)
    if (path / "discriminator" / "adapter_config.json").exists():
        pair = _adapted_pair(path, trust_remote_code)
        return Saved("token-detection", pair.eval(), pair.tokenizer, settings)
    start = load_base(str(folder), trust_remote_code)
    is_pair = (path / "discriminator").is_dir()
    known: str | None = "token-detection" if is_pair else _task_of(start.config)
    known = settings.get("task") or known
    if known is None:
        kinds = ", ".join(start.config.architectures or ["model"])
        raise ValueError(
            f"{folder} holds a {kinds}, without a head for one of: {', '.join(TASKS)}. Train it "
            "first."
        )
    model = TASKS[known].load(start, {})
    return Saved(known, model.eval(), start.tokenizer, settings)


def read_run(folder: Path) -> dict[str, Any]:
    """What the call was given that left a folder; empty if that is not known.

    Raises:
        ValueError: The file that tells it cannot be read.
    """
    file, place = folder / RUN_FILE, folder.resolve()
    if not file.exists() and NAME.fullmatch(place.name):  # a checkpoint-N in the folder of its run
        file = place.parent / RUN_FILE
    return read_json(file) if file.exists() else {}


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file of JSON.

    Raises:
        ValueError: There is none; the file is named.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON, perhaps cut off ({error}).") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds {type(found).__name__}, not an object of JSON: {{...}}.")
    return found


def save_run(folder: str | Path, facts: dict[str, Any]) -> None:
    """Write what the call was given beside the model."""
    text = json.dumps(facts, indent=2, ensure_ascii=False, default=str)
    Path(folder, RUN_FILE).write_text(text + "\n", encoding="utf-8")


def _adapted(path: Path, settings: dict[str, Any], trust_remote_code: bool) -> tuple[str, Any]:
    """Task and model of an adapter's folder."""
    adapter = _adapter_config(path)
    base = adapter.base_model_name_or_path
    kinds = [task for task, kind in TASKS.items() if kind.lora_type == str(adapter.task_type)]
    task = settings.get("task") or next(iter(kinds), None)
    if task is None or not base:
        raise _of_nothing(path)
    start = load_base(base, trust_remote_code)
    config = type(start.config).from_pretrained(str(path))  # with the names of the classes
    resized = config.num_labels != start.config.num_labels
    model = load_weights(
        start, base, TASKS[task].auto_model, config, ignore_mismatched_sizes=resized
    )
    return task, _with_adapter(model, path)


def _adapted_pair(path: Path, trust_remote_code: bool) -> Any:
    """Both halves of token-detection, each with its adapter."""
    base = _adapter_config(path / "generator").base_model_name_or_path
    if not base:
        raise _of_nothing(path)
    folder = Path(base).parent  # of a base that is such a pair itself
    root = str(folder) if (folder / "discriminator").is_dir() else base
    pair = TASKS["token-detection"].load(load_base(root, trust_remote_code), {})
    pair.generator = _with_adapter(pair.generator, path / "generator")
    pair.discriminator = _with_adapter(pair.discriminator, path / "discriminator")
    return pair


def _adapter_config(path: Path) -> Any:
    read_json(path / "adapter_config.json")  # peft names no file
    return PeftConfig.from_pretrained(str(path))


def _with_adapter(model: Any, path: Path) -> PeftModel:
    try:
        return PeftModel.from_pretrained(model, str(path))
    except SafetensorError as error:
        raise ValueError(
            f"The adapter in {path} cannot be read, perhaps cut off ({error})."
        ) from error


def _of_nothing(path: Path) -> ValueError:
    return ValueError(
        f"{path} holds an adapter that does not say what it belongs to. Train with "
        "merge_adapter=True, or from a base that has a name."
    )


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter, or those of a pair."""
    path = Path(os.path.expanduser(folder))
    places = (path, path / "discriminator")
    return any((place / "adapter_config.json").exists() for place in places)


def _task_of(config: Any) -> str | None:
    for task, kind in TASKS.items():
        if not architectures(kind.auto_model, config).isdisjoint(config.architectures or ()):
            return task
    return None
