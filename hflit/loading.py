"""Base -> config, tokenizer, model. Of the other rooms it imports only `adapters`."""

from __future__ import annotations

import copy
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hflit.adapters import keep_layout, sparing_heads

logger = logging.getLogger(__name__)

UNLIMITED = 1_000_000  # tokenizers without a limit carry 1e30


@dataclass(frozen=True)
class Base:
    """What a run starts from, before its weights are loaded.

    Attributes:
        config: The model's config, a copy.
        tokenizer: The tokenizer, a copy that has a padding token.
        model: The model, if the caller brought one.
        path: Hub id or folder of the weights, if the caller did not.
        quantization: How the weights are quantized when they are loaded, or None.
        device: Where quantized weights are loaded to.
        trust_remote_code: Whether code that comes with the weights may run.
        is_adapted: Whether an adapter learns in place of the weights, so that the caller's model
            can stay as it is.
    """

    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel | None
    path: str | None
    quantization: BitsAndBytesConfig | None = None
    device: torch.device | None = None
    is_adapted: bool = False
    trust_remote_code: bool = False


def load_base(base: Any, trust_remote_code: bool = False, name: str = "base") -> Base:
    """Load config and tokenizer, or take them from `(model, tokenizer)`.

    Args:
        base: As in the call.
        trust_remote_code: Whether code that comes with it may run.
        name: The argument, for errors.

    Raises:
        TypeError: `base` is neither a name nor a pair.
        FileNotFoundError: Nothing goes by that name.
        ValueError: The tokenizer has no token to pad with, or a folder holds an adapter only.
    """
    if isinstance(base, (list, tuple)) and len(base) == 2 and isinstance(base[0], nn.Module):
        model, tokenizer = base
        if not hasattr(model, "config"):
            raise TypeError(f"The model in {name} is {type(model).__name__}, not of transformers.")
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            kind = type(tokenizer).__name__
            raise TypeError(f"The tokenizer in {name} is {kind}. Load it first.")
        path, config = None, copy.deepcopy(model.config)
        tokenizer = copy.deepcopy(tokenizer)
    elif isinstance(base, str) or hasattr(base, "__fspath__"):
        path, model = os.path.expanduser(base), None
        halves = Path(path) / "discriminator"  # what token-detection saves beside generator/
        source = str(halves) if halves.is_dir() else path
        if (Path(source) / "adapter_config.json").exists():
            raise ValueError(
                f"{path} holds an adapter. Pass (model, tokenizer) with the adapter merged into "
                "its base, or train it with merge_adapter=True."
            )
        config, tokenizer = _read_names(path, source, trust_remote_code)
    else:
        raise TypeError(
            f"{name} is {type(base).__name__}. Pass a hub id, a folder or (model, tokenizer)."
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError("The tokenizer has no padding token. Set tokenizer.pad_token.")
        tokenizer.pad_token = tokenizer.eos_token
    tokens = getattr(text_config(config), "vocab_size", None)
    if tokens is not None and len(tokenizer) > tokens:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, the model embeddings for {tokens}. "
            "Call model.resize_token_embeddings(len(tokenizer)) first."
        )
    return Base(config, tokenizer, model, path, trust_remote_code=trust_remote_code)


def _read_names(path: str, source: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """Config and tokenizer of a folder or hub id."""
    folder = Path(source)
    file = folder / "config.json"
    try:
        if folder.is_dir() and not file.is_file():
            raise OSError(f"there is no {file}")
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except OSError as error:
        if file.is_file():
            raise ValueError(f"{file} is no JSON of a config, perhaps cut off.") from error
        raise FileNotFoundError(
            f"{path!r} is no folder with a model, seen from {Path.cwd()}, and no model of the "
            "Hub that can be reached."
        ) from error
    except ValueError as error:
        if "trust_remote_code" in f"{error}":
            raise ValueError(
                f"{path} comes with code of its own for its kind of model. Read that code, then "
                "allow it to run with trust_remote_code=True."
            ) from error
        raise ValueError(
            f"{path}: {f'{error}'.splitlines()[0].split(', or contain')[0]}"
        ) from error
    tokenizer = load_tokenizer(source, trust_remote_code)
    # Where there are no files, transformers makes a tokenizer that knows no word.
    files = (*getattr(tokenizer, "vocab_files_names", {}).values(), "tokenizer_config.json")
    if folder.is_dir() and not any((folder / name).is_file() for name in files):
        raise ValueError(f"{path} holds no tokenizer: none of {', '.join(files)}. Save it there.")
    return config, tokenizer


def load_tokenizer(path: str, trust_remote_code: bool) -> Any:
    """The tokenizer of a folder or hub id.

    Raises:
        ValueError: One of its files in the folder cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # of tokenizers, which has no kind of its own
        if not Path(path).is_dir():
            raise
        told = f"{error}".splitlines()[0]
        raise ValueError(
            f"The tokenizer in {path} cannot be read, perhaps cut off ({told})."
        ) from error


def resolve_maxlength(maxlength: int | None, base: Base, name: str = "maxlength") -> int | None:
    """Longest row in tokens: the caller's, or what tokenizer and model can take.

    Args:
        maxlength: The caller's limit, or None.
        base: Tokenizer and model.
        name: How errors call the limit.

    Returns:
        The limit, or None if neither tokenizer nor model has one.

    Raises:
        ValueError: `maxlength` is not positive or more than the model has positions for.
    """
    positions = count_positions(base, of_targets=name == "target_maxlength")
    if maxlength is None:
        limits = [limit for limit in (positions, base.tokenizer.model_max_length) if limit]
        shortest = min(limits, default=UNLIMITED)
        return int(shortest) if shortest < UNLIMITED else None
    if maxlength < 1:
        raise ValueError(f"{name}={maxlength} must be at least 1 token.")
    if positions is not None and maxlength > positions:
        raise ValueError(f"{name}={maxlength} is more than the {positions} tokens the model takes.")
    return maxlength


def text_config(config: Any) -> Any:
    """The part of a config that is about text, where a model reads images too, as Gemma 3 does."""
    return config if hasattr(config, "vocab_size") else config.get_text_config(decoder=True)


def count_positions(base: Base, of_targets: bool = False) -> int | None:
    """Tokens the model has positions for, in targets if asked; None if it has no limit."""
    side = "decoder" if of_targets else "encoder"
    names = ("max_position_embeddings", f"max_{side}_position_embeddings")  # LED: one for each
    config = text_config(base.config)
    positions = next((each for n in names if (each := getattr(config, n, None))), None)
    if not positions or positions < 1:
        return None
    model = base.model
    if model is None:
        with torch.device("meta"):  # the shape of the model, no weights
            model = AutoModel.from_config(base.config, trust_remote_code=base.trust_remote_code)
    # The table is longer than the rows it serves where counting starts late.
    return int(positions) - first_position(model)


def first_position(model: nn.Module) -> int:
    """Position id of a text's first token: 0, but `padding_idx + 1` for RoBERTa and its kin."""
    for name, module in model.named_modules():
        # An adapter on the table has it one level further down.
        is_table = isinstance(module, nn.Embedding) and "position" in ".".join(name.split(".")[-2:])
        if is_table and module.padding_idx is not None:
            return int(module.padding_idx) + 1
    return 0


def classifier_names(base: Base) -> dict[int, str] | None:
    """Class id -> name of the classifier that the base already carries, or None."""
    names = base.config.architectures if base.model is None else [type(base.model).__name__]
    if not any(name.endswith("ForSequenceClassification") for name in names or []):
        return None
    return {int(index): name for index, name in (base.config.id2label or {}).items()}


def load_model(base: Base, auto_model: Any, changes: dict[str, Any]) -> PreTrainedModel:
    """Load the weights, or take the caller's model, with some values of the config changed.

    Args:
        base: What the run starts from.
        auto_model: transformers' class that picks the model for a task.
        changes: Values for the model's config.

    Returns:
        A model of its own config. The caller's model shares its weights but keeps its config; its
        layers too, and whether they learn, if the run adds an adapter.

    Raises:
        ValueError: The caller's model has another head than the task or its labels need.
    """
    if base.model is not None:
        model: Any = copy_with_weights(base.model) if base.is_adapted else copy.copy(base.model)
        model.config, model.new_weights = base.config, []
        if getattr(model, "generation_config", None) is not None:
            model.generation_config = copy.deepcopy(model.generation_config)
        _check_head(model, auto_model, changes)
    else:
        classes = len(changes.get("id2label", ()))
        resized = bool(classes) and classes != base.config.num_labels
        config = copy.deepcopy(base.config)
        config.update(changes)
        model = load_weights(base, base.path, auto_model, config, ignore_mismatched_sizes=resized)
    model.config.update(changes)
    return model


def copy_with_weights(model: Any) -> Any:
    """Copy the layers of a model to wrap and to freeze; the memory of its weights stays shared."""
    kept: dict[int, Any] = {id(each): each for each in (*model.parameters(), *model.buffers())}
    for each in model.parameters():
        if type(each) is nn.Parameter:  # quantized ones learn nothing anyway
            kept[id(each)] = nn.Parameter(each.data)
    return copy.deepcopy(model, kept)


def load_weights(base: Base, path: str | None, auto_model: Any, config: Any, **options: Any) -> Any:
    """Load a model as the base says: quantized or not.

    Args:
        base: Says how.
        path: Hub id or folder of the weights.
        auto_model: transformers' class of the model.
        config: The model's config.
        options: For `from_pretrained`.

    Returns:
        The model. The names of weights that the checkpoint lacked are in its `new_weights`.
    """
    options["trust_remote_code"] = base.trust_remote_code
    check_kind(path, auto_model, config)
    if base.quantization is not None:
        # Without weights first: heads and new weights cannot be quantized, and which are new is
        # known when a checkpoint has been read.
        skeleton = _read_weights(path, auto_model, config, device_map={"": "meta"}, **options)
        options["quantization_config"] = sparing_heads(base.quantization, skeleton)
        options["device_map"] = {"": str(base.device)}
    elif "llm_int8_skip_modules" in (getattr(config, "quantization_config", None) or {}):
        # Quantized on disk, where the head of this task may be missing.
        with torch.device("meta"):
            skeleton = auto_model.from_config(config, trust_remote_code=base.trust_remote_code)
        stored = BitsAndBytesConfig.from_dict(config.quantization_config)
        config = copy.deepcopy(config)
        config.quantization_config = sparing_heads(stored, skeleton).to_dict()
    model = _read_weights(path, auto_model, config, **options)
    keep_layout(model)
    body = [name for name in model.new_weights if name.startswith(f"{model.base_model_prefix}.")]
    if body:
        logger.warning("%s lacks weights of the model's body, which start random: %s.", path, body)
    elif model.new_weights:
        logger.info("New weights, still to be learned: %s.", ", ".join(model.new_weights))
    return model


def check_kind(path: str | None, auto_model: Any, config: Any) -> None:
    """Raise ValueError if transformers' class of a task's models has none of this kind."""
    known = getattr(auto_model, "_model_mapping", None)  # of an Auto class
    if known is not None and type(config) not in known and not hasattr(config, "auto_map"):
        kinds = sorted({kind.model_type for kind in known})
        raise ValueError(
            f"{path} is a model of the kind {config.model_type!r}, which {auto_model.__name__} "
            f"cannot load. It loads {len(kinds)} kinds, such as {', '.join(kinds[:5])}."
        )


def _read_weights(path: str | None, auto_model: Any, config: Any, **options: Any) -> Any:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # its table of new weights; said below instead
    try:
        model, report = auto_model.from_pretrained(
            path, config=copy.deepcopy(config), output_loading_info=True, **options
        )
    except (OSError, SafetensorError) as error:
        told = f"{error}".splitlines()[0]
        raise ValueError(
            f"The weights of {path} cannot be read: they are not there, or cut off ({told})."
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    resized = {name for name, *_ in report["mismatched_keys"]}
    model.new_weights = sorted({*report["missing_keys"], *resized})
    return model


def check_teacher(
    teacher: Base,
    student: Base,
    auto_model: Any,
    changes: dict[str, Any],
    maxlength: int | None = None,
) -> None:
    """Refuse a teacher that speaks of other tokens or classes, or of nothing it has learned.

    Args:
        teacher: What to distil from.
        student: What learns.
        auto_model: transformers' class that picks the model for the task.
        changes: What the data decide about the student's config.
        maxlength: Longest row in tokens, or None for no limit.

    Raises:
        ValueError: The vocabulary or the classes differ, or the teacher has no head for the task or
            takes shorter rows.
    """
    if teacher.model is not None and student.model is not None and not student.is_adapted:
        learning = {id(weight) for weight in student.model.parameters()}
        if any(id(weight) in learning for weight in teacher.model.parameters()):
            raise ValueError("The teacher has the weights of base, which learn. Give it a copy.")
    if teacher.tokenizer.get_vocab() != student.tokenizer.get_vocab():
        raise ValueError(
            "The teacher has another vocabulary than base, so it would read other texts. Choose a "
            "teacher with the same tokenizer."
        )
    has_both_halves = teacher.path is not None and (Path(teacher.path) / "discriminator").is_dir()
    known = architectures(auto_model, teacher.config)
    kinds = teacher.config.architectures or ["model"]
    if teacher.model is None and not has_both_halves and known.isdisjoint(kinds):
        raise ValueError(
            f"The teacher is a {', '.join(kinds)} without a head for this task. Train it first, so "
            f"that {auto_model.__name__} loads it whole."
        )
    expected = changes.get("id2label")
    names = {int(index): name for index, name in (teacher.config.id2label or {}).items()}
    if expected is not None and names != expected:
        raise ValueError(
            f"The teacher knows the classes {names!r}, the training data {expected!r}. They must "
            "be the same, in the same order."
        )
    positions = count_positions(teacher)
    if maxlength is not None and positions is not None and maxlength > positions:
        raise ValueError(
            f"The teacher takes {positions} tokens, and rows have up to maxlength={maxlength}. Set "
            f"maxlength={positions} or less."
        )
    words, own = (text_config(each.config).vocab_size for each in (teacher, student))
    if expected is None and words != own:
        raise ValueError(f"The teacher predicts {words} tokens, base {own}: they must be as many.")


def _check_head(model: PreTrainedModel, auto_model: Any, changes: dict[str, Any]) -> None:
    known = architectures(auto_model, model.config)
    if type(model).__module__.startswith("transformers.") and type(model).__name__ not in known:
        raise ValueError(
            f"base holds a {type(model).__name__}; this task trains what {auto_model.__name__} "
            "loads."
        )
    classes = len(changes.get("id2label", ()))
    if classes and classes != model.config.num_labels:
        raise ValueError(
            f"base holds a model with {model.config.num_labels} classes, but the training data has "
            f"{classes}. Pass the base by name to get a new head."
        )


def architectures(auto_model: Any, config: Any) -> set[str]:
    """Names of the classes that transformers' class of a task's models has for a kind of model.

    A kind that comes with its own code tells its own: `auto_map` in its config, `file.Class`.
    """
    kinds = auto_model._model_mapping.get(type(config), ())
    own = (getattr(config, "auto_map", None) or {}).get(auto_model.__name__, "")
    names = {kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,))}
    return names | {own.split(".")[-1]} - {""}
