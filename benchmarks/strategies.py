"""Does a run over two processes say what one process says, and what does a process then hold?

    python -m benchmarks.strategies [--task TASK ...] [--steps N]

Updates of 8 tiny, ragged rows (dropout off, AdamW): by one process in two batches of 4, and by two
processes with 4 rows each. Each line tells the largest difference from one process, over all
updates, of loss and gradient norm, and of the final weights. The line of one process itself
is the measure for the others: the same 8 rows in one batch, so what adding in another order does
without any other process. Masks are drawn for each batch: there it runs once more as it did.

Then one update of a BERT of 110 million parameters made from its config: what each process holds
of weights and of the optimizer's moments between two updates.

Writes benchmarks/results/strategies.md, and ends with 1 if a loss in fp32 differs by more than
1e-6.
"""

from __future__ import annotations

import json
import sys
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

RESULTS = Path(__file__).parent / "results" / "strategies.md"
OPTIONS = {
    "question-answering": {"stride": 8},
    **dict.fromkeys(
        ("language-modeling", "language-generation", "token-detection"), {"merge": None}
    ),
}
MASKED = ("language-modeling", "token-detection")
ALONE = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
RUNS: dict[str, dict[str, Any]] = {
    "1 process": {"per_device_train_batch_size": 8},
    "DDP-2": {"per_device_train_batch_size": 4, "strategy": "ddp_fork", "devices": 2},
    "FSDP2-2": {"per_device_train_batch_size": 4, "strategy": "fsdp_fork", "devices": 2},
}
KINDS = {
    "full": {},
    "LoRA": {"lora": {"r": 4, "lora_dropout": 0.0}},
}
LIMIT = 1e-6  # of the loss in fp32


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
    given |= {"logging_steps": 1, "max_steps": steps}
    given |= {"task": task, "cache": False, **OPTIONS.get(task, {}), **call}
    model, _ = trainer(make(task, 0), rows(task)[:23], **given)
    return [e for e in trainer.state.log_history if "loss" in e], model


def largest(mine: Any, theirs: Any) -> tuple[float, float, float]:
    """Largest differences of loss, gradient norm and weights."""
    pairs = list(zip(mine[0], theirs[0], strict=True))
    loss, norm = (max(abs(a[n] - b[n]) for a, b in pairs) for n in ("loss", "grad_norm"))
    weights = zip(mine[1].state_dict().values(), theirs[1].state_dict().values(), strict=True)
    return loss, norm, max((a - b).abs().max().item() for a, b in weights)


def compare(tasks: list[str], steps: int) -> tuple[str, list[str]]:
    """The table of differences, and its lines that are beyond the limit."""
    # What processes draw from the generator differs: let it say its best guess.
    torch.multinomial = lambda odds, n: odds.argmax(-1, keepdim=True)  # type: ignore[assignment]
    lines, beyond = [], []
    for task, precision, kind in product(tasks, ("fp32", "bf16"), KINDS):
        call = {**KINDS[kind], "bf16": precision == "bf16"}
        whole = run(task, steps, **call, **ALONE)
        for name, how in RUNS.items():
            if task in MASKED and name == "1 process":
                name, how = "1 process again", ALONE
            found = largest(run(task, steps, **call, **how), whole)
            lines.append([task, precision, kind, name, *(f"{each:.1e}" for each in found)])
            print(*lines[-1], flush=True)
            if precision == "fp32" and found[0] > LIMIT:
                beyond.append(" ".join(lines[-1]))
    return table(["task", "precision", "learns", "run", "loss", "norm", "weights"], lines), beyond


def memory() -> str:
    """The table of what each process holds."""
    lines = []
    total: dict[str, float] = {}
    for name in ("DDP-2", "FSDP2-2"):
        model = BertForMaskedLM(BertConfig(max_position_embeddings=64))
        count = sum(each.numel() for each in model.parameters()) / 1e6
        with tempfile.TemporaryDirectory() as folder:
            HFTrainer()(
                (model, word_tokenizer()),
                rows("language-modeling")[:4],
                task="language-modeling",
                merge=None,
                maxlength=16,
                max_steps=1,
                use_cpu=True,
                callbacks=[Sizes(Path(folder))],
                **{**RUNS[name], "per_device_train_batch_size": 1},
            )
            for path in sorted(Path(folder).iterdir()):
                weights, moments = (v / 2**20 for v in json.loads(path.read_text()).values())
                total[name] = max(total.get(name, 0), weights + moments)
                share = (weights + moments) / total["DDP-2"]
                figures = (f"{weights:.0f}", f"{moments:.0f}", f"{weights + moments:.0f}")
                lines.append([name, path.stem, f"{count:.0f}", *figures, f"{share:.2f}"])
    header = ["run", "process", "million parameters", "weights MiB", "moments MiB", "both MiB"]
    return table([*header, "of DDP-2"], lines)


TEXT = """# Two processes beside one

Made by `python -m benchmarks.strategies`: {machine}, gloo, no GPU.

Each run makes {steps} updates of 8 ragged rows with a tiny model, dropout off, AdamW at 1e-3, norm
clipped at 1. Told is the largest absolute difference, over all updates, from one process with two
batches of 4 in the same precision; of the weights, at the end.

- `1 process` takes one batch of 8: what another order of adding does by itself. Masks are drawn for
  each batch, so a batch of 8 would be masked otherwise: there the same run is made `again`.
- AdamW divides by its moments: a weight whose gradient is nothing but rounding may still move by a
  share of the learning rate, in one process as in two. See the weights of question-answering.
- bf16 rounds each forward to 8 bits, and otherwise where rows are padded otherwise. Two processes
  are as near to one as that allows, like one process with smaller batches, and no nearer.

{differences}

{verdict}

What a process holds between two updates, BERT made from its config. Within an update a process
of FSDP2 also has the whole weights and their gradients, as one of DDP has.

{memory}
"""


def main() -> None:
    """Measure all, and write it down."""
    parser = arguments(str(__doc__))
    parser.add_argument("--task", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--steps", type=int, default=4)
    chosen = parser.parse_args()
    differences, beyond = compare(chosen.task, chosen.steps)
    verdict = f"In fp32 no loss differs by more than {LIMIT:.0e}."
    if beyond:
        verdict = f"In fp32 beyond {LIMIT:.0e}: {'; '.join(beyond)}."
    told = TEXT.format(
        machine=machine(),
        steps=chosen.steps,
        differences=differences,
        verdict=verdict,
        memory=memory(),
    )
    print(told)
    if chosen.task == list(TASKS):
        RESULTS.write_text(told, encoding="utf-8")
    sys.exit(bool(beyond))


if __name__ == "__main__":
    main()
