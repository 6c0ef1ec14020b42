"""Answers in all the shapes people keep them in -> characters of a context -> tokens of a span."""

from __future__ import annotations

import math
import re
import unicodedata
from typing import Any

import numpy as np


def read_answers(value: Any) -> Any:
    """Answers of any shape as SQuAD's dict, see `Questions`.

    Returns:
        `text`, a list of strings, and `answer_start`, where each begins in the context, in
        characters; None where that is to be found. What holds no answers is given back as it is.

    Example:
        >>> read_answers("Paris")
        {'text': ['Paris'], 'answer_start': [None]}
    """
    answers = _answers(value)
    if answers is None:
        return value
    return {"text": [text for text, _ in answers], "answer_start": [at for _, at in answers]}


def find_answer(value: Any, context: str) -> tuple[int, int]:
    """First character of the first answer, and the one behind it, without blanks at its edges.

    Returns:
        `(0, 0)` if there is no answer.

    Raises:
        TypeError: These are no answers.
        ValueError: The context does not hold the answer, or not where it should.

    Example:
        >>> find_answer("w3", "w30 w3 w5")
        (4, 6)
    """
    answers = _answers(value)
    if answers is None:
        raise TypeError(
            f"its answers are {value!r}, not a string, a list of strings, None or a dict of "
            "'text' and 'answer_start'."
        )
    if not answers:
        return 0, 0
    text, start = answers[0]
    if start is None:
        text = text.strip()
        # Only where it begins or ends with a letter or digit can it be part of a longer word.
        left, right = (r"\b" if edge.isalnum() else "" for edge in (text[:1], text[-1:]))
        whole = re.search(left + re.escape(text) + right, context)
        start = whole.start() if whole else context.find(text)
        if start < 0:
            raise ValueError(f"its context does not hold the answer {text!r}.")
    elif start < 0 or context[start : start + len(text)] != text:
        there = context[max(start, 0) :][: len(text)]
        raise ValueError(f"answer_start={start} points at {there!r}, not at the answer {text!r}.")
    end = start + len(text)
    while start < end and _is_blank(context[start]):
        start += 1
    while start < end and _is_blank(context[end - 1]):
        end -= 1
    return start, end


def place_answer(
    place: tuple[int, int], starts: np.ndarray, ends: np.ndarray, context: str
) -> tuple[int, int] | None:
    """First and last token of an answer; None if the span does not hold all of it, or none is.

    Args:
        place: First character of the answer and the one behind it; equal without an answer.
        starts: First character of each token, `(seq,)`; -1 outside the context.
        ends: The character behind each token, `(seq,)`; -1 outside the context.
        context: What the characters are of.
    """
    start, end = place
    # Several tokens may share a character (bytes of an emoji): the answer has all of them.
    touching = np.flatnonzero((starts < end) & (ends > start))
    if start == end or not len(touching):
        return None
    first, last = int(touching[0]), int(touching[-1])
    # An accent behind its letter is in no token where the tokenizer strips it, or composes the two.
    is_whole = all(unicodedata.category(each) == "Mn" for each in context[ends[last] : end])
    return (first, last) if starts[first] <= start and is_whole else None


def _answers(value: Any) -> list[tuple[str, int | None]] | None:
    """Text and start of each answer; None if these are no answers."""
    if hasattr(value, "tolist"):  # numpy, from a data frame
        value = value.tolist()
    if _is_missing(value):
        return []
    if isinstance(value, str):
        return [(value, None)] if value.strip() else []
    if isinstance(value, (list, tuple)):
        answers = []
        for item in map(_answers, value):
            if item is None:
                return None
            answers += item
        return answers
    if not isinstance(value, dict) or "text" not in value:
        return None
    texts = _listed(value["text"])
    starts = _listed(value.get("answer_start")) or [None] * len(texts)
    if len(starts) != len(texts) or not all(isinstance(text, str) for text in texts):
        return None
    try:
        places = [None if _is_missing(start) else int(start) for start in starts]
    except (TypeError, ValueError, OverflowError):  # a word, a list, infinity
        return None
    return [(text, at) for text, at in zip(texts, places, strict=True) if text.strip()]


def _listed(value: Any) -> list[Any]:
    value = value.tolist() if hasattr(value, "tolist") else value
    if _is_missing(value):
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_blank(character: str) -> bool:
    # Many tokenizers drop what cannot be seen.
    return character.isspace() or not character.isprintable()
