"""What a run leaves in `output_dir`. Of the other rooms it imports only `adapters`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState, TrainingArguments
from transformers.utils import cached_file

from hflit.adapters import inner_model, save_config, trained_in_full

HALVES = ("generator", "discriminator")
ADAPTER = ("adapter_config.json", "adapter_model.*")
WEIGHTS = "model.safetensors"
WHOLE = (WEIGHTS, "model-*-of-*.safetensors", "model.safetensors.index.json")


def save_artifacts(
    folder: str | Path,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    state: TrainerState,
    args: TrainingArguments,
) -> None:
    """Write the model, its tokenizer, the history of the run and its arguments.

    Args:
        folder: `output_dir`; made if it is not there.
        model: Saved by `save_pretrained`; of a `PeftModel` only the adapter, and the config.
        tokenizer: Saved beside it.
        state: Written as `trainer_state.json`, in transformers' form.
        args: Written as `training_args.json`, without tokens and other secrets.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _written_here():
            model.save_pretrained(str(folder))
    except SafetensorError as error:  # of a full disk
        raise OSError(f"The model cannot be written to {folder}: {error}") from error
    save_config(model, folder)
    _leave_one_form(model, folder)
    tokenizer.save_pretrained(folder)
    state.save_to_json(str(folder / "trainer_state.json"))
    arguments = {k: v for k, v in args.to_dict().items() if not k.endswith("_token")}
    written = json.dumps(arguments, indent=2, default=str) + "\n"
    (folder / "training_args.json").write_text(written, encoding="utf-8")


def check_base(model: PreTrainedModel) -> PreTrainedModel:
    """Refuse to save an adapter apart from weights that are on no disk.

    Its folder names where the weights below it come from, and other ones may stand there: those
    from before an earlier training, say, or before tokens were added. The first row of each weight
    is compared; a place that cannot be read says nothing.

    Args:
        model: What the caller gave, without the adapter.

    Returns:
        The model.

    Raises:
        ValueError: Another model goes by its name.
    """
    name = model.config.name_or_path
    if getattr(model, "is_quantized", False):
        return model
    learned = tuple(f"{each}." for each in trained_in_full(model))  # saved with the adapter
    weights = {k: v for k, v in model.state_dict().items() if v.dim() and not k.startswith(learned)}
    # A file of the body alone, without a head, has its names without the body's.
    bare = {key.removeprefix(f"{model.base_model_prefix}."): key for key in weights}
    for file in _weight_files(name or ""):
        with safe_open(file, "pt") as stored:
            for there in stored.keys():  # noqa: SIM118  # it is no mapping
                key = there if there in weights else bare.get(there)
                if key is None:
                    continue
                theirs, ours = stored.get_slice(there), weights[key]
                same = list(theirs.get_shape()) == list(ours.shape)
                if not same or not torch.equal(theirs[:1].to(ours), ours[:1]):
                    raise ValueError(
                        f"base holds other weights than {name}, by whose name an adapter would "
                        f"find them again ({key} differs). Save them with save_pretrained and give "
                        "that folder as base, or use merge_adapter=True."
                    )
    return model


def _weight_files(name: str) -> list[str]:
    """The files of weights that go by a name, as far as they are on this disk."""
    if whole := _cached(name, WEIGHTS):
        return [whole]
    index = _cached(name, f"{WEIGHTS}.index.json")
    shards = json.loads(Path(index).read_bytes())["weight_map"].values() if index else []
    return [file for each in sorted(set(shards)) if (file := _cached(name, each))]


def _cached(name: str, file: str) -> str | None:
    if not name:
        return None
    return cached_file(
        name,
        file,
        local_files_only=True,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def _leave_one_form(model: Any, folder: Path) -> None:
    """Remove what a model of another form left there in an earlier run, and would load first.

    The base of this one stays, where it was read from the same folder.
    """
    halves = {name: getattr(model, name) for name in HALVES if hasattr(model, name)}
    config = inner_model(halves.get("generator", model)).config
    read_from = getattr(config, "_name_or_path", "")
    is_base = read_from != "" and folder.resolve() == Path(read_from).resolve()
    for name in HALVES:
        if name in halves:
            _leave_one_form(halves[name], folder / name)
        elif (folder / name / "config.json").exists() and not is_base:
            shutil.rmtree(folder / name)
    is_adapter = isinstance(model, PeftModel)
    others = [] if is_adapter else [*ADAPTER]
    if not is_base:
        others += WHOLE if is_adapter or halves else ()
        others += ["config.json"] if halves else []
    for name in others:
        for file in folder.glob(name):
            file.unlink()


@contextmanager
def _written_here() -> Iterator[None]:
    """Let transformers 5.23 write a model in any process, not in the first of all only.

    That is the first of another node (`save_on_each_node`), or one that fails and saves alone.
    """
    model: Any = PreTrainedModel
    model.should_save_on_this_rank = lambda _, is_main_process: is_main_process
    try:
        yield
    finally:
        del model.should_save_on_this_rank  # the inherited one is back
