"""Does a run that was killed go on, wherever it was killed?

    python -m benchmarks.faults

A training process is killed (SIGKILL) at 50 moments drawn with a fixed seed: half of them anywhere
in its life, half while it writes a checkpoint. Each is looked through for broken checkpoints, then
resumed to its end, and compared with the run that was never killed. The same 10 times for a run of
two processes under DDP, of which all are killed, or one.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import select
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, set_seed
from transformers.trainer_pt_utils import safe_globals

import hflit.loop.checkpoints as checkpoints
from benchmarks.machine import machine, table
from benchmarks.parity import rows_of, tokenizer_of
from hflit import HFTrainer
from hflit.loop.folders import flaw, numbered

SEED = 9
KILLS = {"one process": 50, "DDP, 2 processes": 10}
TARGETS = ("all", "rank 0", "rank 1")  # of two processes
PATIENCE = 120  # seconds after which a run that does not end counts as not finished
CALL = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "eval_strategy": "epoch",
    "use_cpu": True,
    "cache": False,
    "maxlength": 32,
    "seed": 3,
}
BEGIN, END = b"(", b")"  # of the writing of a checkpoint


class Run(NamedTuple):
    """One training process, from its start to its end or death.

    Attributes:
        seconds: How long it lived.
        writes: When each writing of a checkpoint began and ended, in seconds since the start.
        killed: Whether it was killed.
        writing: Whether it was writing a checkpoint when it was killed.
    """

    seconds: float
    writes: list[list[float]]
    killed: bool
    writing: bool


def train(folder: Path, notes: int, ddp: bool) -> None:
    """The training process: resumes if there is something to resume from."""
    os.setsid()  # so that all of its processes can be killed at once
    whole = checkpoints.write_whole

    def noted(*given: Any) -> None:
        os.write(notes, BEGIN)
        whole(*given)
        os.write(notes, END)

    checkpoints.write_whole = noted
    rows, _ = rows_of("text-classification", Path())
    tokenizer = tokenizer_of(rows)
    set_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=len({row["label"] for row in rows}),
    )
    run = folder / "run"
    trainer = HFTrainer()
    model, _ = trainer(
        (BertForSequenceClassification(config), tokenizer),
        rows,
        rows[:16],
        output_dir=str(run),
        checkpoint=bool(numbered(run)) or None,
        **({"strategy": "ddp_fork", "devices": 2} if ddp else {}),
        **CALL,
    )
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(name.encode() + weight.numpy().tobytes())
    kept = ("step", "loss", "grad_norm", "learning_rate", "eval_loss")
    entries = [{k: v for k, v in e.items() if k in kept} for e in trainer.state.log_history]
    result = {"weights": digest.hexdigest(), "history": [e for e in entries if len(e) > 1]}
    (folder / "result.json").write_text(json.dumps(result))


def run(
    folder: Path,
    ddp: bool,
    at: float | None = None,
    write: tuple[int, float] | None = None,
    target: str = "all",
) -> Run:
    """Start a training process, and kill it if it is still there.

    Args:
        folder: Where it writes.
        ddp: Whether it is two processes.
        at: Seconds after its start to kill it; None for never.
        write: Number of the checkpoint that is being written, and seconds after its writing began.
        target: Which of its processes is killed.
    """
    inside, outside = os.pipe()
    start = time.monotonic()
    child = os.fork()  # all is imported already
    if child == 0:
        code = 1
        try:
            _be_quiet(folder / "log.txt")
            train(folder, outside, ddp)
            code = 0
        finally:
            os._exit(code)
    os.close(outside)
    writes: list[list[float]] = []
    is_due = None if at is None else start + at
    killed = writing = False
    while True:
        pause = PATIENCE if is_due is None else max(is_due - time.monotonic(), 0)
        if select.select([inside], [], [], pause)[0]:
            note = os.read(inside, 1)
            if not note:  # all of its processes have ended
                break
            now = time.monotonic()
            if note == BEGIN:
                writes.append([])
            writes[-1].append(now - start)
            if write is not None and note == BEGIN and len(writes) == write[0]:
                is_due = now + write[1]
        else:
            killed, writing = True, bool(writes) and len(writes[-1]) == 1
            _kill(child, target if is_due is not None else "all")
            is_due = None
    os.close(inside)
    os.waitpid(child, 0)
    return Run(time.monotonic() - start, writes, killed, writing)


def _kill(child: int, target: str) -> None:
    ranks = psutil.Process(child).children()
    if target == "all" or len(ranks) < 2:
        try:
            os.killpg(child, signal.SIGKILL)
        except ProcessLookupError:  # so young that it is alone, and in no group of its own yet
            os.kill(child, signal.SIGKILL)
    else:  # the others have to end by themselves
        ranks[TARGETS.index(target) - 1].kill()


def _be_quiet(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    warnings.simplefilter("ignore")


def broken(folder: Path) -> Iterator[str]:
    """What is wrong with the checkpoints in a folder: every file is read."""
    for each in numbered(folder):
        problem = flaw(each)
        try:
            load_file(each / "model.safetensors")
            with safe_globals():
                for name in each.glob("*.pt*"):
                    torch.load(name, weights_only=True)
        except Exception as error:
            problem = problem or f"{error}"
        if problem:
            yield f"{each}: {problem}"


def kills(name: str, count: int, root: Path) -> Counter[str]:
    """Kill a run so many times, each time anew, and see what becomes of it."""
    ddp = name != "one process"
    folder = root / "whole"
    folder.mkdir()
    whole = run(folder, ddp)
    expected = json.loads((folder / "result.json").read_text())
    updates = len([e for e in expected["history"] if "loss" in e])
    found: Counter[str] = Counter({"updates": updates, "writes": len(whole.writes)})
    draw = random.Random(SEED)
    tries = 0
    while found["kills"] < count:
        folder = root / f"{tries}"
        folder.mkdir()
        tries += 1
        is_write = found["kills"] % 2 == 1
        target = draw.choice(TARGETS) if ddp else "all"
        if is_write:
            number = draw.randrange(len(whole.writes))
            begin, end = whole.writes[number]
            done = run(folder, ddp, None, (number + 1, draw.random() * (end - begin)), target)
        else:
            done = run(folder, ddp, draw.random() * whole.seconds, None, target)
        if not done.killed or (is_write and not done.writing):
            continue  # it was over before: draw another moment
        found["kills"] += 1
        found["while writing"] += done.writing
        found["checkpoints"] += len(numbered(folder / "run"))
        wrong = list(broken(folder / "run"))
        found["anew"] += not numbered(folder / "run")
        resumed = run(folder, ddp)
        with suppress(FileNotFoundError):
            result = json.loads((folder / "result.json").read_text())
            found["finished"] += not resumed.killed
            found["weights differ"] += result["weights"] != expected["weights"]
            found["losses differ"] += result["history"] != expected["history"]
            wrong += list(broken(folder / "run"))
            found["left over"] += len(list((folder / "run").glob(".checkpoint-*")))
        found["corrupt"] += len(wrong)
        moment = "while writing" if done.writing else "after"
        print(
            f"{name}, kill {found['kills']} ({target}) {moment} checkpoint {len(done.writes)}: "
            f"{found['finished']} finished, {found['corrupt']} corrupt {' '.join(wrong)}, "
            f"{found['weights differ']} with other weights",
            flush=True,
        )
    return found


def main() -> int:
    """Kill, resume, compare, and keep the table."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    columns = (
        "kills",
        "while writing",
        "finished",
        "checkpoints",
        "corrupt",
        "weights differ",
        "losses differ",
        "anew",
        "left over",
    )
    lines, is_good = [], True
    for name, count in KILLS.items():
        with tempfile.TemporaryDirectory() as root:
            found = kills(name, count, Path(root))
        lines.append([name, str(found["updates"]), *(str(found[column]) for column in columns)])
        is_good &= found["finished"] == count
        is_good &= not any(found[name] for name in ("corrupt", "weights differ", "losses differ"))
    head = [
        "run",
        "updates",
        "kills",
        "while writing a checkpoint",
        "runs finished",
        "checkpoints left",
        "corrupt",
        "final weights differ",
        "log entries differ",
        "had no checkpoint yet",
        "leftovers",
    ]
    text = (
        f"{__doc__.split(chr(10) * 2, 2)[2].strip()}\n\n{table(head, lines)}\n\n"
        "A checkpoint after each update, two are kept; an evaluation each epoch; dropout on. "
        "`corrupt`: folders named checkpoint-N that a checksum or a reader finds fault with, after "
        "the kill or after the resumed run. `leftovers`: half-written folders after the resumed "
        f"run. Seed {SEED}.\n\n"
        f"{machine()}.\n"
    )
    print(text)
    Path("benchmarks/results/faults.md").write_text(text)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
