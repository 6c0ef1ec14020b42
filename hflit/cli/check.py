"""`hflit check`: reads and tokenizes the data, trains nothing, and says what is wrong."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from datetime import timedelta
from itertools import groupby, islice
from operator import itemgetter
from typing import Any

import datasets
from rich.table import Table
from rich.text import Text

from hflit.arguments import Arguments
from hflit.checks import listed
from hflit.cli.estimate import estimate
from hflit.cli.fit import add_json, plain_console, read_call
from hflit.cli.options import meanings, split_call
from hflit.data import DataModule
from hflit.data.answers import find_answer
from hflit.data.batching import IGNORE_INDEX
from hflit.data.files import public
from hflit.data.questions import Questions
from hflit.loop.switches import process_switched
from hflit.pipeline import HFTrainer
from hflit.report.facts import data_facts
from hflit.request import make_plan, read_request

LEARNED = "bold green"
SHOWN_LETTERS = 600
SHOWN_ROWS = 10  # row numbers in a finding
ABOUT = (
    "Read and tokenize the data, and say what would happen and what is wrong. Nothing is trained: "
    "time and memory are those of a few updates of random weights. The exit status is 1 if "
    "something is wrong."
)


def run(command: str, argv: Sequence[str]) -> int:
    """Check a configuration, and print what was found."""
    _, config, call = read_call(command, ABOUT, argv, ("model.base", "data.train"), add_json)
    found = check(call)
    if config.get("json"):
        print(json.dumps(found, ensure_ascii=False, default=str))
    else:
        _show(found)
    return int(bool(found["wrong"]))


def check(call: dict[str, Any]) -> dict[str, Any]:
    """What a call would do, without loading a weight.

    Args:
        call: Keywords of the call.

    Returns:
        `wrong` and `notes`, sentences; `splits`, see `data_facts`; `updates` and `epochs` planned;
        `estimate` of time and memory, see `estimate`, and `seconds` for all updates; `samples`, two
        inputs in parts, each with whether it is learned; `arguments`, name -> value and what
        becomes of it.
    """
    named, keywords = split_call(call)
    wrong: list[str] = []
    if isinstance(named["train"], str) and named["train"] == named["validation"]:
        wrong.append("Training and validation data are the same file.")
    request = read_request(named, keywords, HFTrainer.__call__)
    arguments, adapter = request.arguments, request.adapter
    arguments.set_ranks(request.processes.world, 0, 0)
    plan = make_plan(request)
    data = plan.data
    found: dict[str, Any] = {"wrong": wrong, "notes": [], "splits": {}, "samples": []}
    found["arguments"] = _fates(call)
    try:
        changes, length, _ = plan.settle()
    except ValueError as error:
        wrong.append(str(error))
        wrong += _misaligned(data)
        return found
    found |= {"task": named["task"], "updates": length.steps, "epochs": length.epochs}
    found["trainable"] = "the adapter and the head" if adapter else "all weights"
    for split in data.tokens:
        found["splits"][split] = data_facts(data, split)
    found["samples"] = _samples(data)
    found["notes"] += _notes(data, found, arguments)
    wrong += _repeated(data)
    if plan.start.quantization is not None:
        found["notes"].append("Time and memory are not estimated for quantized weights.")
        return found
    arguments.set_ranks(1, 0, 0)  # one of them is measured
    with process_switched(arguments):
        costs = estimate(plan, changes)
    found["estimate"] = costs
    if "seconds_per_update" in costs:
        found["seconds"] = costs["seconds_per_update"] * length.steps
    needed = costs["memory"].get("total", costs["memory"]["weights"])
    if needed > costs["free"]:
        wrong.append(f"A run needs {_gib(needed)} or more; {_gib(costs['free'])} are free.")
    return found


def _notes(data: DataModule, found: dict[str, Any], args: Arguments) -> list[str]:
    """What may surprise, but is not wrong."""
    notes, tokenization = [], data.tokenization
    for split, facts in found["splits"].items():
        if facts.get("longest") and tokenization.limits:
            share = facts["longest"] / facts["inputs"]
            notes.append(
                f"{share:.1%} of the {split} inputs fill maxlength={tokenization.maxlength}: what "
                "is longer is cut."
            )
        if labels := facts.get("labels"):
            rare = [name for name, count in labels.items() if 0 < count < 3]
            if rare and split == "train":
                notes.append(f"Classes with fewer than 3 training rows: {', '.join(rare)}.")
            if missing := [name for name, count in labels.items() if not count]:
                notes.append(f"Classes without a {split} row: {', '.join(missing)}.")
    eos = tokenization.tokenizer.eos_token_id
    if hasattr(tokenization, "adds_eos") or "target_maxlength" in tokenization.limits:
        rows = islice(data.tokens["train"], 50) if "train" in data.tokens else []
        column = "labels" if "target_maxlength" in tokenization.limits else "input_ids"
        learned = eos is not None and any(eos in row[column] for row in rows)
        notes.append(
            "The end of a text (EOS) is learned."
            if learned
            else "The end of a text (EOS) is not learned: the tokenizer adds none."
        )
    if "validation" not in data.tokens:
        notes.append("There are no validation data: nothing will be evaluated.")
    if not args.output_dir:
        notes.append("There is no output_dir: the model will not be saved.")
    return notes


def _repeated(data: DataModule) -> list[str]:
    """Rows that stand twice in the training data, or in both splits."""
    seen: dict[str, dict[tuple[str, ...], list[int]]] = {}
    for split, rows in data.rows.items():
        if isinstance(rows, datasets.Dataset):
            places: dict[tuple[str, ...], list[int]] = {}
            for number, row in enumerate(rows):
                places.setdefault(tuple(map(_alike, row.values())), []).append(number)
            seen[split] = places
    told = []
    train = seen.get("train", {})  # of a stream nothing
    twice = [rows for rows in train.values() if len(rows) > 1]
    if twice:
        extra = sum(len(rows) - 1 for rows in twice)
        first = ", ".join(" = ".join(map(str, rows[:3])) for rows in twice[:3])
        told.append(f"{extra} training rows repeat earlier ones (rows {first}).")
    both = [rows[0] for key, rows in seen.get("validation", {}).items() if key in train]
    if both:
        told.append(
            f"{len(both)} validation rows also stand in the training data: rows {_some(both)} of "
            "the validation data."
        )
    return told


def _alike(value: Any) -> str:
    """A value as text; a class is the same one as 0 and as 0.0."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def _misaligned(data: DataModule) -> list[str]:
    """All rows whose answer is not where it should be, where the task has answers."""
    told = []
    for split, rows in data.rows.items():
        if not isinstance(data.tokenization, Questions) or not isinstance(rows, datasets.Dataset):
            continue
        _, context, answers = data.tokenization.names
        odd = []
        for number, row in enumerate(rows):
            try:
                find_answer(row[answers], row[context] or "")
            except (TypeError, ValueError):
                odd.append(number)
        if odd:
            told.append(f"{len(odd)} {split} rows have misaligned answers: rows {_some(odd)}.")
    return told


def _samples(data: DataModule) -> list[dict[str, Any]]:
    """Two inputs as the model reads them, in parts that are learned or not, and their labels."""
    decode: Any = data.tokenization.tokenizer.decode
    label_map = getattr(data.tokenization, "map", None)
    rows = list(islice(data.tokens["train"], 2))
    if getattr(data.tokenization, "masked", False):  # masks are drawn for each batch
        batch = next(iter(data.train_dataloader()))[0]
        pairs = zip(batch["input_ids"].tolist()[:2], batch["labels"].tolist(), strict=False)
        rows = [{"input_ids": ids, "labels": labels} for ids, labels in pairs]
    samples = []
    for row in rows:
        ids, labels = row["input_ids"], row.get("labels")
        sample: dict[str, Any] = {}
        learned = [False] * len(ids)
        if label_map is not None:
            sample["label"] = label_map.names[labels] if isinstance(labels, int) else labels
        elif "start_positions" in row:
            first, last = row["start_positions"], row["end_positions"]
            learned = [first <= place <= last for place in range(len(ids))]
            sample["label"] = decode(ids[first : last + 1])
        elif "target_maxlength" in data.tokenization.limits:
            sample["label"] = decode(labels)
        elif labels is not None:
            learned = [each != IGNORE_INDEX for each in labels]
            sample["label"] = decode([each for each in labels if each != IGNORE_INDEX])
        else:  # each token is predicted from those before it
            learned = [place > 0 for place in range(len(ids))]
        parts = groupby(zip(ids, learned, strict=True), key=itemgetter(1))
        sample["parts"] = [[decode([i for i, _ in group]), is_it] for is_it, group in parts]
        samples.append(sample)
    return samples


def _fates(call: dict[str, Any]) -> dict[str, Any]:
    """Each argument given, with what is done with it."""
    about = meanings()
    return {
        name: {
            "value": "<hidden>" if name.endswith("_token") else public(value),
            "fate": re.split(r"[.:;](?: |$)", about[name])[0] or "An older name, translated",
        }
        for name, value in call.items()
    }


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _some(rows: Sequence[int]) -> str:
    more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
    return ", ".join(map(str, rows[:SHOWN_ROWS])) + more


def _show(found: dict[str, Any]) -> None:
    console = plain_console()
    if "updates" in found:
        steps, epochs = f"{found['updates']:,}", found["epochs"]
        over = f" in {epochs} epochs" if epochs > 0 else ""
        console.print(f"{found['task']}: {steps} updates{over} of {found['trainable']}.")
        if "seconds" in found:
            each, whole = found["estimate"]["seconds_per_update"], timedelta(seconds=1)
            whole *= math.ceil(found["seconds"])
            console.print(f"About {each:.2g} s an update, {whole} for all, without evaluations.")
        if memory := found.get("estimate", {}).get("memory"):
            told = ", ".join(f"{_gib(size)} {name}" for name, size in memory.items())
            console.print(f"Memory: {told}; {_gib(found['estimate']['free'])} are free.")
        console.print()
    for split, facts in found["splits"].items():
        if not facts:
            console.print(f"{split}: a stream, which is not read ahead.")
            continue
        least, median, most, longest = facts["lengths"]
        told = (
            f": {facts['rows']:,} rows, {facts['inputs']:,} inputs of {least} to {longest} tokens "
            f"(median {median}, 95 % up to {most}), {facts['padding']:.0%} padding"
        )
        console.print(Text.assemble((split, "bold"), told))
        table = Table(show_header=False, box=None)
        top = max(count for _, count in facts["histogram"])
        for edge, count in facts["histogram"]:
            table.add_row(f"up to {edge}", f"{count:,}", "█" * round(30 * count / top))
        for name, count in facts.get("labels", {}).items():
            table.add_row(f"label {name}", f"{count:,}", "▒" * round(30 * count / facts["rows"]))
        console.print(table)
    for number, sample in enumerate(found["samples"]):
        shown = Text.assemble((f"input {number}: ", "bold"))
        for text, is_learned in sample["parts"]:
            shown.append(f"{text[:SHOWN_LETTERS]} ", LEARNED if is_learned else "")
        if "label" in sample:
            shown.append("\n  -> ").append(str(sample["label"])[:SHOWN_LETTERS], LEARNED)
        console.print(shown)
    table = Table("argument", "value", "what becomes of it", box=None)
    for name, fate in found["arguments"].items():
        table.add_row(name, str(fate["value"]), fate["fate"])
    console.print()
    console.print(table)
    console.print()
    for note in listed(found["notes"]):
        console.print(f"note: {note}")
    for problem in found["wrong"]:
        console.print(Text.assemble(("wrong", "bold red"), f": {' '.join(problem.split())}"))
    if not found["wrong"]:
        console.print("Nothing is wrong.", style="bold green")
