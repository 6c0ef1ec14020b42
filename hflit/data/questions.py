"""Question, context and answers -> spans of the context, and where the answer stands in each."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from hflit.data.answers import find_answer, place_answer, read_answers
from hflit.data.batching import Batch
from hflit.data.tokenization import Columns, Tokenization, check_texts

logger = logging.getLogger(__name__)

POSITIONS = ("start_positions", "end_positions", "null_positions")
CHARACTERS = ("char_starts", "char_ends")


class Questions(Tokenization):
    """Tokenizes a question and its context, and finds the answer among the tokens.

    A context too long for one row makes several spans, which share `stride` tokens. The question
    comes first; with a tokenizer that pads on the left, it comes second. The first answer of a
    row is the one to learn. In a span that does not hold all of it, start and end point at the
    null token: CLS; without a CLS the BOS token; without either (GPT-2, T5) the first token.

    Answers may be SQuAD's `{"text": [...], "answer_start": [...]}` or a list of such dicts; a
    string or a list of strings, each found where it first stands as a whole word, else where it
    first stands at all; None, NaN or empty for a question without an answer.

    Args:
        tokenizer: Tokenizer of the base; it must know which characters a token comes from.
        columns: Question, context, answers.
        maxlength: Longest span in tokens, or None to never cut a context.
        stride: Tokens that neighbouring spans share.
        skip_misaligned: Leave out rows whose answer is not in the context where it should be;
            otherwise they are an error.

    Attributes:
        unanswerable: Whether a question without an answer was among the rows that were checked.
    """

    default_columns = ("question", "context", "answers")
    options = ("stride", "skip_misaligned")
    evaluation_columns = ("null_positions", "row", *CHARACTERS)
    with_indices = True
    limits = {}  # a long context makes several spans

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        columns: str | tuple[str | None, ...] | None = None,
        maxlength: int | None = None,
        stride: int = 128,
        skip_misaligned: bool = False,
    ) -> None:
        super().__init__(tokenizer, columns, maxlength)
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} does not tell which characters a token comes from. "
                "Use a fast tokenizer."
            )
        special = tokenizer.num_special_tokens_to_add(pair=True)
        self.room = None if maxlength is None else maxlength - special  # question and context
        if stride < 0 or (self.room is not None and stride >= self.room):
            raise ValueError(
                f"stride={stride} must be at least 0 and less than what a span has room for: "
                f"{self.room} tokens of question and context at maxlength={maxlength}."
            )
        self.stride = stride
        self.skip_misaligned = skip_misaligned
        self.question_first = tokenizer.padding_side == "right"
        known = (tokenizer.cls_token_id, tokenizer.bos_token_id)
        self._nulls = [token for token in known if token is not None]
        self.unanswerable = False
        self.padding |= dict.fromkeys(CHARACTERS, -1)

    @property
    def features(self) -> datasets.Features:
        """Token ids and positions; by `row` and characters, tokens are traced to the context."""
        numbers = dict.fromkeys((*POSITIONS, "row"), datasets.Value("int64"))
        characters = dict.fromkeys(CHARACTERS, datasets.List(datasets.Value("int32")))
        return datasets.Features({**self.token_columns, **numbers, **characters})

    @property
    def settings(self) -> dict[str, Any]:
        """The cache key: the tokenizer, and what becomes of long contexts and wrong answers."""
        return {
            **super().settings,
            "stride": self.stride,
            "skip_misaligned": self.skip_misaligned,
            "nulls": self._nulls,
        }

    @property
    def converters(self) -> dict[str, Callable[[Any], Any]]:
        """Answers of all shapes become SQuAD's dicts."""
        return {self.names[2]: read_answers}

    def config_changes(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Two scores a token, if the base had another number of classes."""
        if config.num_labels == 2:
            return {}
        return {
            "id2label": {0: "LABEL_0", 1: "LABEL_1"},
            "label2id": {"LABEL_0": 0, "LABEL_1": 1},
        }

    def check(self, rows: datasets.Dataset, split: str, limit: int | None = None) -> None:
        """Raise ValueError at a missing text, or at an answer that its context does not hold."""
        question, context, answers = self.names
        count, skipped = 0, []
        for start, table in self.tables(rows, split, limit):
            check_texts(table, start, [question, context], split)
            pairs = zip(table[answers].to_pylist(), table[context].to_pylist(), strict=True)
            for index, (value, text) in enumerate(pairs, start):
                try:
                    self.unanswerable |= find_answer(value, text) == (0, 0)
                except (TypeError, ValueError) as problem:
                    misaligned = isinstance(problem, ValueError)
                    if misaligned and self.skip_misaligned:
                        skipped.append(index)
                        continue
                    advice = " skip_misaligned=True leaves such rows out." if misaligned else ""
                    raise ValueError(
                        f"Row {index} of the {split} data: {problem}{advice}"
                    ) from None
            count += len(table)
        if count == len(skipped):
            raise ValueError(
                f"The {split} data has no rows" + (" to keep: none is aligned." if count else ".")
            )
        if skipped:
            logger.warning(
                "%d of %d %s rows are left out: their context does not hold the answer where it "
                "should. The first is row %d.",
                *(len(skipped), count, split, skipped[0]),
            )

    def encode(self, batch: dict[str, list[Any]], indices: list[int] | None = None) -> Columns:
        """Encode rows; each makes one span or more.

        Args:
            batch: Rows.
            indices: Their numbers in the data; None counts from 0.

        Raises:
            ValueError: An answer is not in its context, or a question leaves no room for it.
        """
        rows, questions, contexts, places = [], [], [], []
        columns = (indices or range(len(batch[self.names[0]])), *(batch[n] for n in self.names))
        for row, question, context, answers in zip(*columns, strict=True):
            try:
                places.append(find_answer(answers, context))
            except ValueError as problem:
                if self.skip_misaligned:
                    continue
                raise ValueError(f"Row {row}: {problem}") from None
            rows.append(row)
            questions.append(question.lstrip())
            contexts.append(context)
        encoded: dict[str, list[Any]] = {name: [] for name in self.features}
        if not rows:
            return encoded
        self._check_room(rows, questions, contexts)
        tokens = self.tokenizer(
            *((questions, contexts) if self.question_first else (contexts, questions)),
            max_length=self.maxlength,
            truncation=self._truncation,
            stride=self.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        encoded |= {name: tokens[name] for name in self.token_columns}
        for span, index in enumerate(tokens["overflow_to_sample_mapping"]):
            # Offsets do not tell a special token, which has (0, 0), from the first of a text.
            texts = tokens.sequence_ids(span)  # 0 or 1; None for special tokens
            in_context = np.array([text == int(self.question_first) for text in texts])
            starts, ends = np.where(in_context, np.array(tokens["offset_mapping"][span]).T, -1)
            null = self._null_position(tokens["input_ids"][span], texts)
            first, last = place_answer(places[index], starts, ends, contexts[index]) or (null, null)
            values = (first, last, null, rows[index], starts, ends)
            for name, value in zip((*POSITIONS, "row", *CHARACTERS), values, strict=True):
                encoded[name].append(value)
        return encoded

    def finish(self, batch: Batch, seed: int | None) -> Batch:
        """Move positions along with the tokens, where padding comes before them."""
        if self.tokenizer.padding_side == "left":
            padding = (batch["attention_mask"] == 0).sum(dim=1)  # (batch, seq) -> (batch,)
            batch |= {name: batch[name] + padding for name in POSITIONS if name in batch}
        return batch

    @property
    def _truncation(self) -> str | bool:
        if self.maxlength is None:
            return False
        return "only_second" if self.question_first else "only_first"

    def _check_room(self, rows: list[int], questions: list[str], contexts: list[str]) -> None:
        """Raise ValueError at a question that leaves its context no more than the stride."""
        if self.room is None:
            return
        plain: dict[str, Any] = {"add_special_tokens": False, "verbose": False}
        for index, ids in enumerate(self.tokenizer(questions, **plain)["input_ids"]):
            left = self.room - len(ids)
            # A context that needs no cutting needs no stride.
            if (
                left <= self.stride
                and len(self.tokenizer(contexts[index], **plain).input_ids) > left
            ):
                raise ValueError(
                    f"Row {rows[index]}: the question {questions[index][:50]!r} of {len(ids)} "
                    f"tokens leaves {max(left, 0)} for its context at maxlength={self.maxlength}; "
                    f"it must leave more than stride={self.stride}."
                )

    def _null_position(self, ids: list[int], texts: list[int | None]) -> int:
        for null in self._nulls:
            for position, (token, text) in enumerate(zip(ids, texts, strict=True)):
                if token == null and text is None:
                    return position
        return 0
