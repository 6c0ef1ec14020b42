"""`hflit export`: a trained model as an ONNX file that says the same."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser
from peft import PeftModel, PeftModelForQuestionAnswering
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hflit.adapters import forward_inputs, merged
from hflit.cli.fit import be_quiet
from hflit.cli.options import read_options
from hflit.saved import load_saved

OUTPUTS = {  # task -> what the file gives, by transformers' names
    "text-classification": ["logits"],
    "question-answering": ["start_logits", "end_logits"],
    "language-modeling": ["logits"],
    "token-detection": ["logits"],
}
TOLERANCE = 1e-4  # largest difference of a logit
LENGTHS = (5, 16, 9)  # of the rows to compare, in tokens


def run(command: str, argv: Sequence[str]) -> int:
    """Export, and compare."""
    parser = ArgumentParser(
        prog=f"hflit {command}",
        description="Write a trained model as model.onnx, with its config and tokenizer, and check "
        f"that its logits under onnxruntime are the same to {TOLERANCE:g}.",
        exit_on_error=False,
    )
    parser.add_argument("--onnx", action="store_true", help="The only format, so it may be left.")
    parser.add_argument("--model", type=str | None, help="Folder that a run left, or hub id.")
    parser.add_argument("--output", type=str | None, help="Folder to write; by default MODEL/onnx.")
    config = read_options(parser, argv)
    if not config.model:
        raise ValueError("--model must be given.")
    if not config.output and not Path(os.path.expanduser(config.model)).is_dir():
        raise ValueError(
            f"There is no folder {config.model}, seen from {Path.cwd()}. For a model of the Hub, "
            "--output must be given."
        )
    be_quiet()
    file, difference = export(config.model, config.output or Path(config.model, "onnx"))
    print(f"{file}: its logits differ by {difference:.1e} at most.")
    return 0


def export(model: str | Path, folder: str | Path) -> tuple[Path, float]:
    """Write `model.onnx`, for any number of rows of any length.

    Args:
        model: Folder that a run left, or hub id; an adapter is merged into its base.
        folder: Where to, with the config and the tokenizer.

    Returns:
        The file, and by how much a logit under onnxruntime differs at most.

    Raises:
        ImportError: A package for it is missing.
        ValueError: The task cannot be exported, or the file says something else than the model.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ImportError(f"Export needs {', '.join(missing)}. Install: pip install hflit[onnx].")
    saved = load_saved(model)
    if saved.task not in OUTPUTS:
        raise ValueError(
            f"{model} is a model for {saved.task}: it writes token by token from what it keeps of "
            f"the ones before, which is more than one graph. There is ONNX for {', '.join(OUTPUTS)}"
            "."
        )
    if isinstance(saved.model, PeftModelForQuestionAnswering):
        # It learned without token types: peft 0.21 keeps them from this one kind of model.
        names = [n for n in saved.tokenizer.model_input_names if n != "token_type_ids"]
        saved.tokenizer.model_input_names = saved.tokenizer.init_kwargs["model_input_names"] = names
    plain = getattr(saved.model, "discriminator", saved.model)
    plain = (merged(plain) if isinstance(plain, PeftModel) else plain).cpu().float().eval()
    plain.config.use_cache = False  # of a decoder that classifies
    folder = Path(os.path.expanduser(folder))
    folder.mkdir(parents=True, exist_ok=True)
    inputs = _inputs(plain, saved.tokenizer, LENGTHS)
    part, file = folder / "model.part.onnx", folder / "model.onnx"
    try:
        _write(plain, inputs, part, OUTPUTS[saved.task])
        # A batch of one row and of other lengths: a number that the graph took for fixed shows.
        batches = [inputs, *(_inputs(plain, saved.tokenizer, [2 * n]) for n in LENGTHS)]
        difference = max(_difference(plain, part, each) for each in batches)
        if not difference <= TOLERANCE:
            raise ValueError(
                f"The exported model says something else: its logits differ by {difference:.1e}, "
                f"where {TOLERANCE:g} is allowed. Nothing was written."
            )
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    plain.config.save_pretrained(folder)
    saved.tokenizer.save_pretrained(folder)
    return file, difference


def _inputs(
    model: Any, tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int]
) -> dict[str, Tensor]:
    """Rows of random tokens, `(rows, longest)`, padded to the right."""
    random = torch.Generator().manual_seed(0)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(0, len(tokenizer), mask.shape, generator=random)
    ids = ids.masked_fill(mask == 0, int(tokenizer.pad_token_id or 0))
    every = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    taken = {*tokenizer.model_input_names} & forward_inputs(model)
    return {name: each for name, each in every.items() if name in taken}


def _write(model: Any, inputs: dict[str, Tensor], file: Path, outputs: list[str]) -> None:
    batch, length = torch.export.Dim("batch"), torch.export.Dim.DYNAMIC
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # of its own insides, many
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        torch.onnx.export(
            model,
            kwargs=inputs,
            f=str(file),
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes=dict.fromkeys(inputs, {0: batch, 1: length}),
            dynamo=True,
            external_data=False,
            verbose=False,
        )


@torch.no_grad()
def _difference(model: Any, file: Path, inputs: dict[str, Tensor]) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    found = session.run(None, {name: each.numpy() for name, each in inputs.items()})
    expected = [each.numpy() for each in model(**inputs).to_tuple()]
    return max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True))
