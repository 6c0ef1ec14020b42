"""Validation rows one by one: what was right, what the model said, and what that cost."""

from __future__ import annotations

from itertools import islice
from typing import Any, NamedTuple

import torch

from hflit.data import DataModule
from hflit.data.answers import read_answers
from hflit.data.batching import IGNORE_INDEX, Batch
from hflit.data.labels import MULTI, REGRESSION
from hflit.data.sequences import references
from hflit.predict import predictions, text_columns
from hflit.saved import Saved

SHOWN_LETTERS = 400  # of a text in the table


class Judged(NamedTuple):
    """One row.

    Attributes:
        text: What the model read.
        right: What it should have said.
        said: What it said.
        loss: Mean over its items, in nats; the squared error of a regression.
    """

    text: str
    right: str
    said: str
    loss: float


class Judgement(NamedTuple):
    """What a model makes of its validation rows.

    Attributes:
        rows: All of them, the costliest first.
        pairs: Right and predicted: a class or a set of labels a row, a score a row, the kind of
            answer a row, or a token each.
    """

    rows: list[Judged]
    pairs: list[tuple[Any, Any]]


def judge(module: Any, data: DataModule, settings: dict[str, Any]) -> Judgement:
    """Judge the validation rows, each in a batch of its own.

    Args:
        module: The task with its trained model.
        data: Set up, with batches of one row.
        settings: What the call was given that trained the model.
    """
    module.switch_mode("eval")
    costs: dict[int, list[float]] = {}
    inputs: list[tuple[str, str, str]] = []
    tokens: list[tuple[str, str]] = []
    task: str = settings["task"]
    tokenizer: Any = data.tokenization.tokenizer
    for number, batch in enumerate(data.val_dataloader()):
        batch = module.transfer_batch_to_device(batch, module.device, 0)
        with torch.no_grad():
            found = module.evaluate_batch(batch)
        row = int(batch["row"]) if "row" in batch else number  # long contexts have several inputs
        costs.setdefault(row, []).append(float(found.loss))
        if task in TOKENS:
            pairs = TOKENS[task](module, tokenizer, found.outputs, batch)
            tokens += pairs
            wrong = [pair for pair in pairs if pair[0] != pair[1]]
            right, said = (_joined(pair[side] for pair in wrong) for side in (0, 1))
            inputs.append((str(tokenizer.decode(batch["input_ids"][0])), right, said))
    losses = [sum(each) / len(each) for _, each in sorted(costs.items())]
    if task in TOKENS:
        judged, all_pairs = inputs, list(tokens)
    else:
        saved = Saved(task, module.model, tokenizer, settings)
        judged, all_pairs = _answered(saved, data)
        # Rows that `skip_misaligned` leaves out have no loss.
        judged = [judged[row] for row in sorted(costs)]
        all_pairs = [all_pairs[row] for row in sorted(costs)]
    rows = [
        Judged(text[:SHOWN_LETTERS], right[:SHOWN_LETTERS], said[:SHOWN_LETTERS], loss)
        for (text, right, said), loss in zip(judged, losses, strict=True)
    ]
    return Judgement(sorted(rows, key=lambda row: -row.loss), all_pairs)


def _answered(saved: Saved, data: DataModule) -> tuple[list[tuple[str, str, str]], list[Any]]:
    """Text, right and predicted answer of each row, and both for counting."""
    rows, names = data.rows["validation"], text_columns(saved)
    if not hasattr(rows, "select"):
        rows = list(rows)
    found = list(predictions(saved, rows, names))
    texts = [" | ".join(str(row[name]) for name in names) for row in rows]
    if saved.task == "sequence-sequence":
        right = [" | ".join(each) for each in references(rows)]
        said = [each["generated"] for each in found]
        return list(zip(texts, right, said, strict=True)), list(zip(right, said, strict=True))
    labels = [row[data.tokenization.names[-1]] for row in rows]
    if saved.task == "question-answering":
        answers = [read_answers(each)["text"] for each in labels]
        said = [each["answer"] for each in found]
        right = [" | ".join(dict.fromkeys(each)) for each in answers]
        kinds = [_kind(each, text) for each, text in zip(answers, said, strict=True)]
        return list(zip(texts, right, said, strict=True)), kinds
    config = saved.model.config
    if config.problem_type == REGRESSION:
        pairs = [(float(r), each["score"]) for r, each in zip(labels, found, strict=True)]
        shown = [(f"{r:.3f}", f"{s:.3f}") for r, s in pairs]
        return [(t, *pair) for t, pair in zip(texts, shown, strict=True)], pairs
    classes = data.tokens["validation"]["labels"]
    map_names = data.tokenization.map.names  # type: ignore[attr-defined]
    if config.problem_type == MULTI:
        sets = [[map_names[i] for i, each in enumerate(row) if each > 0.5] for row in classes]
        several = [(r, each["label"]) for r, each in zip(sets, found, strict=True)]
        shown = [(_joined(r), _joined(s)) for r, s in several]
        return [(t, *pair) for t, pair in zip(texts, shown, strict=True)], several
    single = [(map_names[i], str(each["label"])) for i, each in zip(classes, found, strict=True)]
    return [(t, *pair) for t, pair in zip(texts, single, strict=True)], single


def _kind(answers: list[str], said: str) -> tuple[str, str]:
    """Whether there is an answer, and what became of it."""
    is_there = "an answer" if answers else "no answer"
    if not said:
        return is_there, "none given"
    if said in answers:
        return is_there, "the same words"
    words = set(said.lower().split())
    overlaps = any(words & set(each.lower().split()) for each in answers)
    return is_there, "some of its words" if overlaps else "other words"


def _guesses(module: Any, tokenizer: Any, outputs: Any, batch: Batch) -> list[tuple[str, str]]:
    """Right and likeliest token, at each place that is predicted."""
    logits, labels = outputs["logits"][0], batch["labels"][0]  # (seq, vocab), (seq,)
    if module.predicts_next:
        logits, labels = logits[:-1], labels[1:]
    asked = labels != IGNORE_INDEX
    right, said = labels[asked].tolist(), logits[asked].argmax(dim=-1).tolist()
    words = tokenizer.convert_ids_to_tokens
    return list(zip(words(right), words(said), strict=True))


def _verdicts(module: Any, tokenizer: Any, outputs: Any, batch: Batch) -> list[tuple[str, str]]:
    """What each token is and was taken for: original or replaced."""
    labels = outputs["replaced"][0]
    asked = labels != IGNORE_INDEX
    kinds = ("original", "replaced")
    found = (outputs["logits"][0][asked] > 0).long().tolist()
    return [(kinds[r], kinds[s]) for r, s in zip(labels[asked].long().tolist(), found, strict=True)]


TOKENS = {  # tasks whose answers are tokens
    "language-modeling": _guesses,
    "language-generation": _guesses,
    "token-detection": _verdicts,
}


def _joined(words: Any) -> str:
    return ", ".join(islice(words, 12))
