"""`hflit check`: reads and tokenizes the data, trains nothing, and says what is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import datasets
from rich.console import Console
from rich.table import Table

from hflit.adapters import lora_config, quantization_config
from hflit.arguments import Arguments, parse
from hflit.checks import listed
from hflit.cli.fit import read_call
from hflit.cli.options import meanings, split_call
from hflit.data import DataModule
from hflit.data.answers import find_answer
from hflit.data.questions import Questions
from hflit.loading import load_base
from hflit.pipeline import check_evaluation, check_request, read_data, run_length
from hflit.report.facts import data_facts

SHOWN_ROWS = 10  # row numbers in a finding
ABOUT = (
    "Read and tokenize the data, train nothing, and say what would happen and what is wrong. The "
    "exit status is 1 if something is. --json prints JSON."
)


def run(command: str, argv: Sequence[str]) -> int:
    """Check a configuration, and print what was found."""
    words = [word for word in argv if word != "--json"]
    _, _, call = read_call(command, ABOUT, words, ("model.base", "data.train"))
    found = check(call)
    if "--json" in argv:
        print(json.dumps(found, ensure_ascii=False, default=str))
    else:
        _show(found)
    return int(bool(found["wrong"]))


def check(call: dict[str, Any]) -> dict[str, Any]:
    """What a call would do, without loading a weight.

    Args:
        call: Keywords of the call.

    Returns:
        `wrong` and `notes`, sentences; `splits`, see `data_facts`, with the share of `padding`;
        `updates` and `epochs` planned; `samples`, two decoded inputs; `arguments`, name -> value
        and what becomes of it.
    """
    named, keywords = split_call(call)
    wrong: list[str] = []
    if isinstance(named["train"], str) and named["train"] == named["validation"]:
        wrong.append("Training and validation data are the same file.")
    task_class = check_request(named)
    arguments, flags = parse(keywords, also=named)
    check_evaluation(arguments, named["validation"], named["metrics"])
    adapter = lora_config(named["lora"], task_class.lora_type)
    quantization_config(named["quantize"], arguments.device)
    start = replace(load_base(named["base"]), is_adapted=adapter is not None)
    _, data = read_data(start, task_class, named, arguments)
    found: dict[str, Any] = {"wrong": wrong, "notes": [], "splits": {}, "samples": []}
    found["arguments"] = _fates(call)
    try:
        data.setup()
        task_class.check_arguments(arguments, data.tokenization.config_changes(start.config))
        length = run_length(arguments, flags, data)
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
        rows = data.tokens["train"].take(50) if "train" in data.tokens else []
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
                places.setdefault(tuple(map(str, row.values())), []).append(number)
            seen[split] = places
    told = []
    twice = [rows for rows in seen.get("train", {}).values() if len(rows) > 1]
    if twice:
        extra = sum(len(rows) - 1 for rows in twice)
        first = ", ".join(" = ".join(map(str, rows[:3])) for rows in twice[:3])
        told.append(f"{extra} training rows repeat earlier ones (rows {first}).")
    both = [rows[0] for key, rows in seen.get("validation", {}).items() if key in seen["train"]]
    if both:
        told.append(
            f"{len(both)} validation rows also stand in the training data: rows {_some(both)} of "
            "the validation data."
        )
    return told


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
    """Two inputs as the model reads them, and what it should say to them."""
    tokenizer, samples = data.tokenization.tokenizer, []
    label_map = getattr(data.tokenization, "map", None)
    for row in data.tokens["train"].take(2):
        sample = {"input": tokenizer.decode(row["input_ids"])}
        labels = row.get("labels")
        if label_map is not None:
            is_class = isinstance(labels, int)
            sample["label"] = label_map.names[labels] if is_class else labels
        elif labels is not None:
            sample["label"] = tokenizer.decode(labels)
        elif "start_positions" in row:
            span = row["input_ids"][row["start_positions"] : row["end_positions"] + 1]
            sample["label"] = tokenizer.decode(span)
        samples.append(sample)
    return samples


def _fates(call: dict[str, Any]) -> dict[str, Any]:
    """Each argument given, with what is done with it."""
    about = meanings()
    return {
        name: {
            "value": "<hidden>" if name.endswith("_token") else value,
            "fate": re.split(r"[.:;](?: |$)", about[name])[0] or "An older name, translated",
        }
        for name, value in call.items()
    }


def _some(rows: Sequence[int]) -> str:
    more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
    return ", ".join(map(str, rows[:SHOWN_ROWS])) + more


def _show(found: dict[str, Any]) -> None:
    console = Console(highlight=False)
    if "updates" in found:
        steps, epochs = f"{found['updates']:,}", found["epochs"]
        over = f" in {epochs} epochs" if epochs > 0 else ""
        console.print(f"{found['task']}: {steps} updates{over} of {found['trainable']}.\n")
    for split, facts in found["splits"].items():
        if not facts:
            console.print(f"{split}: a stream, which is not read ahead.")
            continue
        least, median, most, longest = facts["lengths"]
        console.print(
            f"[bold]{split}[/bold]: {facts['rows']:,} rows, {facts['inputs']:,} inputs of {least} "
            f"to {longest} tokens (median {median}, 95 % up to {most}), "
            f"{facts['padding']:.0%} padding"
        )
        table = Table(show_header=False, box=None)
        top = max(count for _, count in facts["histogram"])
        for edge, count in facts["histogram"]:
            table.add_row(f"up to {edge}", f"{count:,}", "█" * round(30 * count / top))
        for name, count in facts.get("labels", {}).items():
            table.add_row(f"label {name}", f"{count:,}", "▒" * round(30 * count / facts["rows"]))
        console.print(table)
    for number, sample in enumerate(found["samples"]):
        console.print(f"[bold]input {number}[/bold]: ", end="")
        console.print(sample["input"][:600], markup=False)
        if "label" in sample:
            console.print(f"  -> {sample['label']!r}", markup=False)
    table = Table("argument", "value", "what becomes of it", box=None)
    for name, fate in found["arguments"].items():
        table.add_row(name, str(fate["value"]), fate["fate"])
    console.print()
    console.print(table)
    console.print()
    for note in listed(found["notes"]):
        console.print(f"note: {note}", markup=False)
    for problem in found["wrong"]:
        console.print(f"[bold red]wrong[/bold red]: {' '.join(problem.split())}")
    if not found["wrong"]:
        console.print("[bold green]Nothing is wrong.[/bold green]")
