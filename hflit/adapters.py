"""LoRA and quantized weights: what a run adds to its model. A leaf: imports no other room.

Everything here runs alike on a CPU and on CUDA; it was never run on CUDA.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import re
from pathlib import Path
from typing import Any, cast

import bitsandbytes as bnb
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from torch import nn
from transformers import AutoModel, BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import dequantize_bnb_weight
from transformers.pytorch_utils import Conv1D

logger = logging.getLogger(__name__)

LORA = {
    "r": 16,
    "lora_alpha": 8,
    "target_modules": "all-linear",
    "lora_dropout": 0.05,
    "bias": "none",
}
FOUR_BIT = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}


# What the caller asked for.


def check_adapter(base: Any, quantize: Any, lora: Any, merge_adapter: bool, parity: bool) -> None:
    """Refuse what cannot be done together; the arguments are those of the call.

    Raises:
        ValueError: They contradict one another.
    """
    if merge_adapter and not lora:
        raise ValueError("merge_adapter=True merges what lora= learns: pass lora= too.")
    is_loaded = isinstance(base, (list, tuple))
    if lora and is_loaded and isinstance(base[0], PeftModel):
        raise ValueError("base has an adapter already: leave out lora= to train that one on.")
    if quantize and is_loaded:
        raise ValueError(
            "quantize= quantizes weights when they are loaded, and base holds a loaded model. Pass "
            "the base by its name or folder, or load it with quantization_config=."
        )
    if quantize and not lora and parity:
        raise ValueError(
            "parity=True does what transformers.Trainer does, and it trains no quantized model "
            "without an adapter: pass lora= too."
        )


def lora_config(lora: Any, task_type: str) -> LoraConfig | None:
    """The LoRA configuration of a run; a copy, so that the caller's stays as it is.

    Args:
        lora: True for the defaults, a dict to change some of them, a `LoraConfig` to replace
            them; None or False for no LoRA.
        task_type: peft's name of the task, for a configuration that names none.

    Raises:
        TypeError: `lora` is something else, or names an unknown setting.

    Example:
        >>> config = lora_config({"r": 4}, "SEQ_CLS")
        >>> config.r, config.lora_alpha, config.task_type
        (4, 8, 'SEQ_CLS')
    """
    if lora is None or lora is False:
        return None
    if isinstance(lora, LoraConfig):
        config = copy.deepcopy(lora)
    elif lora is True or isinstance(lora, dict):
        changes = {} if lora is True else copy.deepcopy(lora)
        _check_names("lora", changes, LoraConfig)
        config = LoraConfig(**{**LORA, **changes})
    else:
        raise TypeError(f"lora is {type(lora).__name__}. Pass True, a dict or peft.LoraConfig.")
    config.task_type = config.task_type or task_type
    return config


def quantization_config(quantize: Any, device: torch.device) -> BitsAndBytesConfig | None:
    """The quantization of a run; a copy, so that the caller's stays as it is.

    Args:
        quantize: True for 4 bits (nf4, quantized twice), a dict to change that, a
            `BitsAndBytesConfig` to replace it; None or False for no quantization.
        device: Where the model runs. It computes in bfloat16 where CUDA hardware can, else in
            float32: on a CPU bfloat16 was measured to be eight times slower.

    Raises:
        TypeError: `quantize` is something else, or names an unknown setting.
        ValueError: It names an unknown kind of 4 bits.
    """
    if quantize is None or quantize is False:
        return None
    if isinstance(quantize, BitsAndBytesConfig):
        return copy.deepcopy(quantize)
    if quantize is not True and not isinstance(quantize, dict):
        raise TypeError(
            f"quantize is {type(quantize).__name__}. Pass True, a dict or "
            "transformers.BitsAndBytesConfig."
        )
    changes = {} if quantize is True else copy.deepcopy(quantize)
    _check_names("quantize", changes, BitsAndBytesConfig)
    if changes.get("bnb_4bit_quant_type", "nf4") not in ("nf4", "fp4"):
        raise ValueError(
            f"quantize= has bnb_4bit_quant_type={changes['bnb_4bit_quant_type']!r}. "
            "Choose 'nf4' or 'fp4'."
        )
    if changes.get("load_in_8bit"):
        return BitsAndBytesConfig(**changes)
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    compute = {"bnb_4bit_compute_dtype": torch.bfloat16 if has_bfloat16 else torch.float32}
    return BitsAndBytesConfig(**{**FOUR_BIT, **compute, **changes})


def _check_names(argument: str, settings: dict[str, Any], kind: type) -> None:
    unknown = [name for name in settings if name not in inspect.signature(kind).parameters]
    if unknown:
        raise TypeError(f"{argument} has unknown settings for {kind.__name__}: {unknown}.")


# What of a model is its head.


def inner_model(model: Any) -> Any:
    """The transformers model inside a `PeftModel`; any other model as it is."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def head_names(model: PreTrainedModel) -> list[str]:
    """Modules that a task model has on top of its body, output layers for words included.

    Args:
        model: May be without weights, on the device `meta`.

    Returns:
        Names of its children; for BERT with a masked-language head `["cls"]`.
    """
    body = {model.base_model_prefix}
    if type(model.config) not in AutoModel._model_mapping:  # of two models, with heads of their own
        return []
    if model.base_model is model:  # T5 stands in no body of its own
        with torch.device("meta"):
            body = {name for name, _ in AutoModel.from_config(model.config).named_children()}
    return [
        name
        for name, child in model.named_children()
        if name not in body and any(True for _ in child.parameters())
    ]


def trained_in_full(model: PreTrainedModel) -> list[str]:
    """Modules that learn all their weights under LoRA: the head, and what the checkpoint lacked.

    An output layer for words is none of them, unless it is new. Mostly it is tied to the
    embeddings: a copy that learns would be as large as they are, and merged it loses its bias.
    transformers takes that for tied and leaves it out of the file, peft 0.21 marks the model as
    untied, and so it is not found again and loads as 0.
    """
    output = model.get_output_embeddings()
    missing = getattr(model, "new_weights", ())
    if any(each is output and f"{name}.weight" in missing for name, each in model.named_modules()):
        output = None
    new = {name.rpartition(".")[0] for name in missing}
    tables = {name for name, each in model.named_modules() if isinstance(each, nn.Embedding)}
    head = head_names(model)
    return [name for top in head for name in _without(output, top, model.get_submodule(top))] + [
        name
        for name in sorted(new)
        if name and name not in tables and name.partition(".")[0] not in head
    ]


def _without(excluded: nn.Module | None, name: str, module: nn.Module) -> list[str]:
    """The module; or, where it holds the excluded one, its other children and theirs."""
    if module is excluded or not any(True for _ in module.parameters()):
        return []
    if excluded is None or all(each is not excluded for each in module.modules()):
        return [name]
    children = module.named_children()
    return [
        found for own, child in children for found in _without(excluded, f"{name}.{own}", child)
    ]


# What is done to a model.


def sparing_heads(
    quantization: BitsAndBytesConfig, skeleton: PreTrainedModel
) -> BitsAndBytesConfig:
    """Keep heads and new weights out of quantization: they are learned in full.

    Args:
        quantization: Stays as it is.
        skeleton: The model without weights.
    """
    quantization = copy.deepcopy(quantization)
    spared = {*head_names(skeleton), *trained_in_full(skeleton)}
    spared |= set(quantization.llm_int8_skip_modules or ())
    quantization.llm_int8_skip_modules = sorted(spared)  # serves 4 bits too
    return quantization


def add_adapter(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Wrap a model with LoRA; its head learns in full, the rest of its weights are frozen.

    Args:
        model: Changed in place.
        config: What it leaves open is filled in, in a copy.

    Raises:
        TypeError, ValueError: peft cannot do what the config asks for.
    """
    config = copy.deepcopy(config)
    full = trained_in_full(model)
    if config.modules_to_save is None and full:
        config.modules_to_save = full
    if config.exclude_modules is None and full:
        names = "|".join(re.escape(name) for name in full)
        config.exclude_modules = rf"({names})(\..*)?"
    if any(isinstance(each, Conv1D) for each in model.modules()):
        config.fan_in_fan_out = True  # peft would find out too, but warn
    if getattr(model, "is_quantized", False):
        # Without its gradient checkpointing, which trades speed for memory: an argument's to ask.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    try:
        return cast(PeftModel, get_peft_model(model, config))
    except AttributeError as error:
        raise ValueError(
            f"lora= cannot be used: its task_type={str(config.task_type)!r} is not for a "
            f"{type(model).__name__}. Leave it out, and it is that of the task."
        ) from error
    except (TypeError, ValueError) as error:
        advice = ""
        if "lora_dropout" in f"{error}":
            advice = " The weights of experts take none: give lora={'lora_dropout': 0.0}."
        raise type(error)(f"lora= cannot be used: {error}{advice}") from error


def keep_layout(model: Any) -> None:
    """Keep 4-bit weights in the layout that they learn beside.

    On a CPU with AVX512-BF16, bitsandbytes 0.50 lays them out anew at the first forward in
    evaluation mode: rounded to bfloat16, and in a layout through which no gradient passes, so that
    what learns after an evaluation would learn a part of what it should.
    """
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = False
            weight: Any = layer.weight
            if getattr(weight.quant_state, "packing_format_for_cpu", False):
                layer.state_dict()  # lays them out as they were


def merged(model: PeftModel) -> PreTrainedModel:
    """Add the adapter to the weights: a plain model, of float weights, that says the same.

    A quantized model is turned into floats first, with the very values that the adapter learned
    beside. Merging into quantized weights would round the adapter away, and merging into the base
    as it was before would put it beside other values than it learned with. So 4 bits keep their
    loss; 8 bits keep it but for the rounding of their inputs, which floats no longer suffer.
    """
    quantized = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    if any(isinstance(each, quantized) for each in model.modules()):
        config: Any = model.peft_config["default"]
        learned = get_peft_model_state_dict(model)
        plain: Any = model.unload()
        for name, layer in list(plain.named_modules()):
            if isinstance(layer, quantized):
                plain.set_submodule(name, _in_floats(layer))
        plain.hf_quantizer.remove_quantization_config(plain)
        model = add_adapter(plain, config)
        set_peft_model_state_dict(model, learned)
    return model.merge_and_unload(safe_merge=True)  # leaves the weights of the caller's model alone


def _in_floats(layer: Any) -> nn.Module:
    """A quantized layer as what it was made of."""
    weight = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None)).float()
    if layer.source_cls is Conv1D:  # GPT-2's: a linear layer with its weight on its side
        plain: Any = Conv1D(layer.out_features, layer.in_features)
        weight = weight.T.contiguous()
    else:
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    plain.weight = nn.Parameter(weight)
    plain.bias = layer.bias
    return plain


def save_config(model: Any, folder: str | Path) -> None:
    """Write the model's config beside its adapter, where peft leaves out the names of classes."""
    if isinstance(model, PeftModel):
        config = copy.deepcopy(inner_model(model).config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # the base on disk is as it was
        config.save_pretrained(folder)


def weight_figures(model: nn.Module) -> dict[str, float]:
    """What of a model learns, and what it weighs.

    Returns:
        `trainable_share` of the weights, from 0 to 1, and `weights_mb`, the millions of bytes that
        all weights and buffers take.
    """
    parameters = list(model.parameters())
    counts = [_count(each) for each in parameters]
    learning = sum(n for n, each in zip(counts, parameters, strict=True) if each.requires_grad)
    size = sum(each.numel() * each.element_size() for each in (*parameters, *model.buffers()))
    figures = {"trainable_share": learning / sum(counts), "weights_mb": size / 1e6}
    logger.info(
        "%.2f %% of the weights learn; all of them take %.1f MB.",
        100 * figures["trainable_share"],
        figures["weights_mb"],
    )
    return figures


def _count(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)  # 4 bits: two weights a byte
    return state.shape.numel() if state is not None else parameter.numel()


def forward_inputs(model: Any) -> frozenset[str]:
    """Names of what a model's forward takes; those of the inner model, if it has an adapter."""
    kind: Any = type(inner_model(model))
    return _forward_inputs(kind)


@functools.cache
def _forward_inputs(kind: Any) -> frozenset[str]:
    parameters = inspect.signature(kind.forward).parameters
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    author = kind.forward.__module__.partition(".")[0]
    if not takes_any or author in ("transformers", "hflit"):
        return frozenset(parameters)
    # A forward of one's own hands what it does not name on to the one that it overrides.
    _, overridden, *_ = (each for each in kind.__mro__ if "forward" in vars(each))
    return frozenset(parameters) | _forward_inputs(overridden)
