"""Does a run over two processes say what one process says, and what does a process then hold?

    python -m benchmarks.strategies [--task TASK ...] [--steps N] [--memory]

Two processes with 4 rows a micro-batch against one with two such micro-batches an update, dropout
off, AdamW: the largest difference over all updates of loss and gradient norm, and of the final
weights. With `--memory`, one update of a BERT of 110 million parameters made from its config: the
bytes of weights, gradients and moments that each process holds between two updates.
"""

from __future__ import annotations

import json
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import BertConfig, BertForMaskedLM, TrainerCallback

from benchmarks.machine import arguments, machine, table
from hflit import HFTrainer
from hflit.tasks import TASKS
from tests.conftest import word_tokenizer
from tests.tasks.tiny import make, rows

OPTIONS = {
    "question-answering": {"stride": 8},
    **dict.fromkeys(
        ("language-modeling", "language-generation", "token-detection"), {"merge": None}
    ),
}
RUNS = {"DDP-2": "ddp_fork", "FSDP2-2": "fsdp_fork"}
KINDS = {
    "full": {},
    "LoRA": {"lora": {"r": 4, "lora_dropout": 0.0}},
}


class Sizes(TrainerCallback):
    """Notes what a process holds, in bytes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_step_end(self, args: Any, state: Any, control: Any, **held: Any) -> None:
        """Count after the first update."""
        weights = _bytes(held["model"].parameters())
        moments = _bytes(v for s in held["optimizer"].state.values() for v in s.values())
        told = {"weights": weights, "moments": moments}
        (self.folder / f"{args.process_index}.json").write_text(json.dumps(told))


def _bytes(tensors: Any) -> int:
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors if torch.is_tensor(t)]
    return sum(each.numel() * each.element_size() for each in local)


def run(task: str, steps: int, **call: Any) -> tuple[Any, Any]:
    """History and model of a run on tiny, ragged rows."""
    trainer = HFTrainer()
    given = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_grad_norm": 1.0, "use_cpu": True}
    given |= {"logging_steps": 1, "max_steps": steps, "per_device_train_batch_size": 4}
    given |= {"task": task, "cache": False, **OPTIONS.get(task, {}), **call}
    model, _ = trainer(make(task, 0), rows(task)[:23], **given)
    return [e for e in trainer.state.log_history if "loss" in e], model


def largest(mine: Any, theirs: Any) -> tuple[float, float, float]:
    """Largest differences of loss and gradient norm, relative, and of weights."""
    pairs = list(zip(mine[0], theirs[0], strict=True))
    loss, norm = (
        max(abs(a[name] - b[name]) / abs(b[name]) for a, b in pairs)
        for name in ("loss", "grad_norm")
    )
    weights = zip(mine[1].state_dict().values(), theirs[1].state_dict().values(), strict=True)
    return loss, norm, max((a - b).abs().max().item() for a, b in weights)


def compare(tasks: list[str], steps: int) -> None:
    """Print the table of differences."""
    # What processes draw from the generator differs: let it say its best guess.
    torch.multinomial = lambda odds, n: odds.argmax(-1, keepdim=True)  # type: ignore[assignment]
    lines = []
    for task, precision, kind in product(tasks, ("fp32", "bf16"), KINDS):
        call = {**KINDS[kind], "bf16": precision == "bf16"}
        alone = run(task, steps, **call, gradient_accumulation_steps=2)
        for name, strategy in RUNS.items():
            found = largest(run(task, steps, **call, strategy=strategy, devices=2), alone)
            lines.append([task, name, precision, kind, *(f"{each:.1e}" for each in found)])
    print(table(["task", "run", "precision", "learns", "loss", "norm", "weights"], lines))


def memory() -> None:
    """Print what a process holds."""
    lines = []
    for name, strategy in RUNS.items():
        model = BertForMaskedLM(BertConfig(max_position_embeddings=64))
        with tempfile.TemporaryDirectory() as folder:
            HFTrainer()(
                (model, word_tokenizer()),
                rows("language-modeling")[:4],
                task="language-modeling",
                merge=None,
                maxlength=16,
                max_steps=1,
                per_device_train_batch_size=1,
                use_cpu=True,
                strategy=strategy,
                devices=2,
                callbacks=[Sizes(Path(folder))],
            )
            for path in sorted(Path(folder).iterdir()):
                held = json.loads(path.read_text())
                lines.append([name, path.stem, *(f"{each / 2**20:.0f}" for each in held.values())])
    print(table(["run", "process", "weights MiB", "moments MiB"], lines))


if __name__ == "__main__":
    parser = arguments(str(__doc__))
    parser.add_argument("--task", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--memory", action="store_true")
    chosen = parser.parse_args()
    print(machine())
    memory() if chosen.memory else compare(chosen.task, chosen.steps)
