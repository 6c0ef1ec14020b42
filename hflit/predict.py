"""What a trained model says about new rows: read in chunks, batched by length, told in order."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from transformers import BatchEncoding

from hflit.adapters import forward_inputs, inner_model
from hflit.arguments import Arguments
from hflit.data.batching import Collator
from hflit.data.files import is_name, read_files
from hflit.data.formats import reader_of
from hflit.data.labels import MULTI, REGRESSION
from hflit.data.questions import Questions
from hflit.loading import Base, count_positions, resolve_maxlength
from hflit.metrics.spans import SpanMetrics
from hflit.saved import Saved
from hflit.tasks import TASKS
from hflit.tasks.layers import fast_layers
from hflit.tasks.sequence_sequence import GENERATED_TOKENS

CHUNK = 2_000  # rows in memory at a time
SPANS = 32  # of long contexts, read at a time
Texts = list[tuple[str, ...]]  # the texts of each row of a batch
Found = list[dict[str, Any]]  # what is said about each of them
Predict = Callable[[Texts, list[int]], Found]  # given their numbers in the data, for errors


def predictions(
    saved: Saved, rows: Any, columns: list[str] | None = None, batch_size: int = 32
) -> Iterator[dict[str, Any]]:
    """What a model says about each row, in the order of the rows.

    Args:
        saved: The model.
        rows: What the call takes as data.
        columns: Columns with the texts, without labels; by default those it was trained on.
        batch_size: Rows that the model reads at a time.

    Yields:
        text-classification: `label` and its `score` from 0 to 1, lists of both for several
        labels, `score` alone for a regression. question-answering: `answer`, its `score` from 0
        to 1, and the characters of the context between which it stands, `start` and `end`; an
        empty answer where none is, unless all rows of the run had one. sequence-sequence and
        language-generation: `generated`. language-modeling: `filled`, the text with its masks
        filled in (a list of both, of two texts), and for each mask the word, `tokens`, and its
        score, `scores`. token-detection: all `tokens` and the `scores` from 0 to 1 of their being
        replaced.

    Raises:
        ValueError: A column or a text is missing.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    names = columns or text_columns(saved)
    wanted = {"question-answering": 2}.get(saved.task, 1)
    if not wanted <= len(names) <= 2:
        raise ValueError(f"columns={names!r} must name {wanted} to 2 columns for {saved.task}.")
    data = read_files(rows, numbers=()) if is_name(rows) else rows
    data = reader_of(data)(data, names, "new", {})
    predict = PREDICTORS[saved.task](saved)
    if _device(saved) != Arguments().device:
        saved.model.to(Arguments().device)
    saved.model.eval()
    first = 0
    for chunk in data.iter(batch_size=CHUNK):
        texts = list(zip(*(chunk[name] for name in names), strict=True))
        for row, each in enumerate(texts, first):
            for name, value in zip(names, each, strict=True):
                if value is None:
                    raise ValueError(f"Row {row} of the new data has no text in {name!r}.")
                if not isinstance(value, str):
                    raise ValueError(
                        f"Column {name!r} of the new data holds {type(value).__name__}, not text: "
                        f"row {row} is {value!r}."
                    )
        with fast_layers(saved.model):
            found = _by_length(predict, texts, first, batch_size)
        yield from found
        first += len(texts)


def text_columns(saved: Saved) -> list[str]:
    """The columns a model reads, without labels."""
    columns = saved.settings.get("columns") or TASKS[saved.task].tokenization.default_columns
    texts = {"text-classification": 2, "question-answering": 2, "sequence-sequence": 1}
    return [name for name in columns[: texts.get(saved.task)] if name is not None]


@torch.no_grad()
def _by_length(predict: Predict, texts: Texts, first: int, batch_size: int) -> list[dict[str, Any]]:
    order = sorted(range(len(texts)), key=lambda row: sum(map(len, texts[row])), reverse=True)
    found: dict[int, dict[str, Any]] = {}
    for at in range(0, len(order), batch_size):
        batch = order[at : at + batch_size]
        said = predict([texts[row] for row in batch], [first + row for row in batch])
        found |= zip(batch, said, strict=True)
    return [found[row] for row in range(len(texts))]


def _maxlength(saved: Saved) -> int | None:
    inner = inner_model(getattr(saved.model, "discriminator", saved.model))
    return resolve_maxlength(
        saved.settings.get("maxlength"), Base(inner.config, saved.tokenizer, inner, None)
    )


def _encoder(saved: Saved) -> Callable[[list[list[str]]], BatchEncoding]:
    """Columns of texts -> padded tensors that the model takes."""
    tokenizer, maxlength = saved.tokenizer, _maxlength(saved)

    def encode(columns: list[list[str]]) -> BatchEncoding:
        tokens = tokenizer(
            *columns,
            max_length=maxlength,
            truncation=maxlength is not None,
            padding=True,
            return_tensors="pt",
        )
        model = getattr(saved.model, "discriminator", saved.model)
        for name in set(tokens) - forward_inputs(model):
            del tokens[name]
        return tokens.to(_device(saved))

    return encode


def _device(saved: Saved) -> torch.device:
    return next(saved.model.parameters()).device


def _columns(texts: Texts) -> list[list[str]]:
    return [list(column) for column in zip(*texts, strict=True)]


def _classifier(saved: Saved) -> Predict:
    encode, config = _encoder(saved), inner_model(saved.model).config
    names = {int(index): name for index, name in config.id2label.items()}

    def predict(texts: Texts, rows: list[int]) -> Found:
        logits = saved.model(**encode(_columns(texts))).logits.float().cpu()  # (batch, classes)
        if config.problem_type == REGRESSION or (config.problem_type is None and len(names) == 1):
            return [{"score": score} for score in logits.squeeze(-1).tolist()]
        if config.problem_type == MULTI:
            return [
                {
                    "label": [names[i] for i, each in enumerate(row) if each >= 0.5],
                    "score": [each for each in row if each >= 0.5],
                }
                for row in logits.sigmoid().tolist()
            ]
        scores, classes = logits.softmax(dim=-1).max(dim=-1)
        pairs = zip(classes.tolist(), scores.tolist(), strict=True)
        return [{"label": names[index], "score": score} for index, score in pairs]

    return predict


def _answerer(saved: Saved) -> Predict:
    stride = saved.settings.get("stride", 128)
    # Trained and evaluated on rows that all have an answer, it always gives one.
    may_be_none = saved.settings.get("unanswerable", True)
    questions = Questions(saved.tokenizer, ("q", "c", "a"), _maxlength(saved), stride)
    collate = Collator(questions.padding, saved.tokenizer.padding_side, questions.finish)

    def predict(texts: Texts, rows: list[int]) -> Found:
        asked, contexts = _columns(texts)
        place = {row: at for at, row in enumerate(rows)}
        found = SpanMetrics(contexts, [[] for _ in contexts])
        spans = questions({"q": asked, "c": contexts, "a": [None] * len(texts)}, rows)
        spans["row"] = [place[row] for row in spans["row"]]
        each = [dict(zip(spans, span, strict=True)) for span in zip(*spans.values(), strict=True)]
        for at in range(0, len(each), SPANS):
            batch = {k: v.to(_device(saved)) for k, v in collate(each[at : at + SPANS]).items()}
            inputs = {k: v for k, v in batch.items() if k in forward_inputs(saved.model)}
            for name in ("start_positions", "end_positions"):
                inputs.pop(name, None)
            found.update(saved.model(**inputs), batch)
        return [_answer(found, row, may_be_none) for row in range(len(texts))]

    return predict


def _answer(found: SpanMetrics, row: int, may_be_none: bool) -> dict[str, Any]:
    """The best answer of a row, or none, by the odds of its best candidates."""
    best = found.candidates[row]
    null = found.null_scores[row] if may_be_none or not best else -math.inf
    scores = np.array([each.score for each in best] + [null])
    shares = np.exp(scores - scores.max())
    shares /= shares.sum()
    if not best or null > best[0].score:
        return {"answer": "", "score": float(shares[-1]), "start": 0, "end": 0}
    start, end = best[0].start, best[0].end
    text = found.contexts[row][start:end]
    start += len(text) - len(text.lstrip())  # some tokenizers count the blank before a word to it
    text = text.strip()
    return {"answer": text, "score": float(shares[0]), "start": start, "end": start + len(text)}


def _translator(saved: Saved) -> Predict:
    kind: Any = TASKS[saved.task]
    names = ("target_maxlength", "generation_max_length", "generation_num_beams")
    options = {name: saved.settings.get(name) for name in names}
    module = kind(saved.model, Arguments(), tokenizer=saved.tokenizer, **options)
    encode, prefix = _encoder(saved), saved.settings.get("prefix") or ""

    def predict(texts: Texts, rows: list[int]) -> Found:
        sources = [prefix + text for (text,) in texts]
        return [{"generated": text} for text in module.generate(encode([sources]))]

    return predict


def _writer(saved: Saved) -> Predict:
    tokenizer, inner = copy.deepcopy(saved.tokenizer), inner_model(saved.model)
    tokenizer.padding_side = "left"
    positions = count_positions(Base(inner.config, tokenizer, inner, None)) or math.inf
    most = max(positions - GENERATED_TOKENS, positions // 2)
    begins = [each for each in (tokenizer.bos_token_id, tokenizer.cls_token_id) if each is not None]
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id}

    def prompt(ids: list[int], row: int) -> list[int]:
        """A text to go on from: not ended, and not longer than leaves room."""
        while len(ids) > 1 and ids[-1] in ends:
            ids = ids[:-1]
        if len(ids) > most:
            warnings.warn(f"Prompts are cut at their start to {most} tokens.", stacklevel=2)
            first = [each for each in ids[:1] if each in begins]
            ids = first + ids[len(first) - int(most) :]
        if not ids and not begins:
            raise ValueError(f"Row {row} is empty, and the tokenizer has no token to begin with.")
        return ids or begins[:1]

    def write(prompts: list[list[int]], room: int) -> list[str]:
        padded = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
        inputs = padded.to(_device(saved))
        ids = saved.model.generate(
            **inputs, max_new_tokens=room, pad_token_id=tokenizer.pad_token_id
        )
        return tokenizer.batch_decode(
            ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )

    def predict(texts: Texts, rows: list[int]) -> Found:
        told = tokenizer(*_columns(texts), verbose=False)["input_ids"]
        prompts = [prompt(*each) for each in zip(told, rows, strict=True)]
        rooms = [int(min(GENERATED_TOKENS, positions - len(ids))) for ids in prompts]
        written: dict[int, str] = {}
        for room in set(rooms):  # not one for all, or a long prompt would cut short what others get
            those = [row for row, each in enumerate(rooms) if each == room]
            written |= zip(those, write([prompts[row] for row in those], room), strict=True)
        return [{"generated": written[row]} for row in range(len(texts))]

    return predict


def _filler(saved: Saved) -> Predict:
    encode, tokenizer = _encoder(saved), saved.tokenizer
    mask: Any = tokenizer.mask_token

    def predict(texts: Texts, rows: list[int]) -> Found:
        inputs = encode(_columns(texts))
        masked = inputs["input_ids"] == tokenizer.mask_token_id
        logits = saved.model(**inputs).logits[masked].float()  # (masks, vocab)
        scores, ids = logits.softmax(dim=-1).max(dim=-1)
        words = iter(zip(tokenizer.batch_decode(ids[:, None]), scores.tolist(), strict=True))
        results = []
        for row, (each, places) in enumerate(zip(texts, masked, strict=True)):
            filled = list(each)
            of = inputs.sequence_ids(row) if len(filled) > 1 else [0] * len(places)
            found = []
            for at in places.nonzero().flatten().tolist():
                word, score = next(words)
                found.append((word.strip(), score))
                filled[of[at]] = filled[of[at]].replace(mask, word.strip(), 1)
            if any(mask in text for text in filled):
                told = "masks beyond what the model takes, which stay as they are"
                warnings.warn(f"Row {rows[row]} has {told}.", stacklevel=2)
            tokens, likely = [word for word, _ in found], [score for _, score in found]
            whole = filled[0] if len(filled) == 1 else filled
            results.append({"filled": whole, "tokens": tokens, "scores": likely})
        return results

    return predict


def _detector(saved: Saved) -> Predict:
    encode, tokenizer = _encoder(saved), saved.tokenizer
    special = torch.tensor(tokenizer.all_special_ids)

    def predict(texts: Texts, rows: list[int]) -> Found:
        inputs = encode(_columns(texts))
        odds = saved.model.detect(**inputs).sigmoid().cpu()  # (batch, seq)
        ids = inputs["input_ids"].cpu()
        shown = ~torch.isin(ids, special)
        return [
            {
                "tokens": tokenizer.convert_ids_to_tokens(row[use].tolist()),
                "scores": each[use].tolist(),
            }
            for row, each, use in zip(ids, odds, shown, strict=True)
        ]

    return predict


PREDICTORS: dict[str, Callable[[Saved], Predict]] = {
    "text-classification": _classifier,
    "question-answering": _answerer,
    "sequence-sequence": _translator,
    "language-generation": _writer,
    "language-modeling": _filler,
    "token-detection": _detector,
}
