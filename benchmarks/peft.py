"""What do LoRA and quantized weights cost and save, in all six tasks?

    python -m benchmarks.peft [--data FOLDER] [--steps N] [--only TASK ...]

Each task trains in full, with LoRA, and with LoRA on 4-bit and on 8-bit weights: MiniLM where its
kind serves, else a seeded model of width 256, on real rows. Every cell runs in a process of its
own, so that its peak memory is its own; that holds the libraries, some 600 MB, as well. What was
saved is loaded back by transformers and peft, and its logits are compared.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
    set_seed,
)

from benchmarks.machine import arguments, machine, minilm, table
from benchmarks.parity import rows_of, tokenizer_of
from hflit import HFTrainer
from hflit.adapters import forward_inputs, inner_model, keep_layout
from hflit.tasks import TASKS

MODES: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": {"lora": True},
    "4-bit + LoRA": {"lora": True, "quantize": True},
    "8-bit + LoRA": {"lora": True, "quantize": {"load_in_8bit": True}},
}
STEPS = 20
WARMUP = 2  # steps that are not timed
VALIDATION = 32  # rows
HEADER = [
    *("task", "model", "mode", "trainable share", "weights MB", "peak MB"),
    "processor time of a step",
    *("loss before", "loss after", "reloaded logits differ by"),
]


class StepTimes(TrainerCallback):
    """Processor seconds of each update, which other jobs on the machine disturb least."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self.start = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop it."""
        self.seconds.append(time.process_time() - self.start)


def base_of(task: str, rows: list[dict[str, Any]], folder: Path) -> str:
    """MiniLM where its kind serves; else a seeded model and a tokenizer of the rows."""
    if task not in ("sequence-sequence", "language-generation"):
        return minilm()
    set_seed(0)
    tokenizer = tokenizer_of(rows)
    ids = {"pad_token_id": 0, "eos_token_id": 1, "vocab_size": len(tokenizer)}
    model: Any
    if task == "sequence-sequence":
        t5 = T5Config(
            **ids, d_model=256, d_kv=32, d_ff=1024, num_layers=4, num_heads=8,
            decoder_start_token_id=0,
        )  # fmt: skip
        model = T5ForConditionalGeneration(t5)
    else:
        llama = LlamaConfig(
            **ids, hidden_size=256, num_hidden_layers=6, num_attention_heads=8,
            intermediate_size=1024, max_position_embeddings=128, bos_token_id=1,
        )  # fmt: skip
        model = LlamaForCausalLM(llama)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def cell(task: str, mode: str, data: Path, steps: int) -> dict[str, Any]:
    """One run, what it cost, and what of it comes back from disk."""
    torch.set_num_threads(1)
    rows, columns = rows_of(task, data)
    with tempfile.TemporaryDirectory() as folder:
        base = base_of(task, rows, Path(folder) / "base")
        output, times, trainer = Path(folder) / "output", StepTimes(), HFTrainer()
        extra = {"stride": 32} if task == "question-answering" else {}
        model, tokenizer = trainer(
            base, rows[VALIDATION:], rows[:VALIDATION], columns=columns, task=task, maxlength=96,
            max_steps=steps, per_device_train_batch_size=8, learning_rate=5e-4, seed=7,
            eval_on_start=True, output_dir=str(output), callbacks=[times], cache=False,
            logging_strategy="no", disable_tqdm=False, **MODES[mode], **extra,
        )  # fmt: skip
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        names = ("generator", "discriminator") if task == "token-detection" else ("",)
        differences = [
            difference(task, name, base, getattr(model, name, model), output / name, tokenizer)
            for name in names
        ]
    return {
        "model": type(inner_model(getattr(model, "discriminator", model))).__name__,
        "share": trainer.metrics["trainable_share"],
        "weights": trainer.metrics["weights_mb"],
        "peak": peak,
        "seconds": statistics.median(times.seconds[min(WARMUP, steps - 1) :]),
        "losses": (losses[0], losses[-1]),
        "difference": max(differences),
    }


def difference(
    task: str, half: str, base: str, trained: Any, folder: Path, tokenizer: Any
) -> float:
    """Largest difference of the logits of what was saved from those of what was trained."""
    inner = inner_model(trained)
    auto = AutoModelForTokenClassification if half == "discriminator" else TASKS[task].auto_model
    if isinstance(trained, PeftModel):
        options = {"num_labels": inner.config.num_labels}
        if getattr(inner, "hf_quantizer", None) is not None:
            options["quantization_config"] = inner.hf_quantizer.quantization_config
        loaded = PeftModel.from_pretrained(auto.from_pretrained(base, **options), str(folder))
    else:
        loaded = auto.from_pretrained(folder)
    keep_layout(loaded)
    inputs = dict(tokenizer("A sentence that no one trained on.", return_tensors="pt"))
    inputs["decoder_input_ids"] = inputs["input_ids"]
    inputs = {k: v for k, v in inputs.items() if k in forward_inputs(trained)}
    with torch.no_grad():
        one, other = trained.eval()(**inputs), loaded.eval()(**inputs)
    names = [name for name in one if name.endswith("logits")]
    return max(float((one[name] - other[name]).abs().max()) for name in names)


def measure(task: str, mode: str, data: Path, steps: int) -> dict[str, Any]:
    """A cell in a process of its own; its error, if it has one."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peft", "--data", str(data), "--steps", str(steps),
         "--cell", task, mode],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def row(task: str, mode: str, found: dict[str, Any], full: dict[str, Any]) -> list[str]:
    """A line of the table; times are shares of what full training takes."""
    if "error" in found:
        return [task, "-", mode, f"failed: {found['error']}", *["-"] * (len(HEADER) - 4)]
    ratio = f"{found['seconds'] / full['seconds']:.2f}" if "seconds" in full else "-"
    return [
        task, found["model"], mode, f"{100 * found['share']:.2f} %", f"{found['weights']:.1f}",
        f"{found['peak']:.0f}", f"{ratio} ({found['seconds']:.2f} s)",
        *(f"{loss:.4f}" for loss in found["losses"]), f"{found['difference']:.1g}",
    ]  # fmt: skip


def main() -> None:
    """Measure all cells and keep the table of a full run."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        warnings.simplefilter("ignore")
        print(json.dumps(cell(*options.cell, options.data, options.steps)))
        return
    lines = []
    for task in options.only:
        full: dict[str, Any] = {}
        for mode in MODES:
            found = measure(task, mode, options.data, options.steps)
            full = full or found
            lines.append(row(task, mode, found, full))
            print(lines[-1], flush=True)
    text = "\n\n".join(
        [
            f"{options.steps} updates of 8 rows at one learning rate, 5e-4; losses are those of "
            f"{VALIDATION} rows held out. Times are medians, as shares of full training; a share "
            "below 1 is faster. Peak memory is the process's, libraries included. On a CPU "
            "quantized layers compute in float32, so they save memory and no time.",
            table(HEADER, lines),
            f"{machine()}.\n",
        ]
    )
    print(text)
    if options.steps == STEPS and options.only == list(TASKS):
        Path("benchmarks/results/peft.md").write_text(text)


if __name__ == "__main__":
    main()
