"""Source and target -> token ids and labels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from hflit.data.batching import IGNORE_INDEX
from hflit.data.columns import is_list
from hflit.data.tokenization import Columns, Tokenization, check_texts, encode_texts, first_row


class Sequences(Tokenization):
    """Tokenizes a source text and the target text that a model should make of it.

    A target may be a list of references: the first is the one to learn, evaluation compares with
    all of them. Tokenizers that treat targets differently (mBART, NLLB, Marian) are told which
    texts are targets; their `src_lang` and `tgt_lang` are the caller's to set.

    Args:
        tokenizer: Tokenizer of the base.
        columns: Source, target.
        maxlength: Longest source in tokens, or None for no limit.
        prefix: Put before each source, as it stands: T5 was trained on `"summarize: "`.
        target_maxlength: Longest target in tokens, or None for no limit.
    """

    default_columns = ("source", "target")
    options = ("prefix", "target_maxlength")
    predicts_next = True
    limits = {"maxlength": "input_ids", "target_maxlength": "labels"}

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        columns: str | tuple[str | None, ...] | None = None,
        maxlength: int | None = None,
        prefix: str | None = None,
        target_maxlength: int | None = None,
    ) -> None:
        super().__init__(tokenizer, columns, maxlength)
        self.prefix = prefix or ""
        self.target_maxlength = target_maxlength
        self.padding["labels"] = IGNORE_INDEX
        special = tokenizer.num_special_tokens_to_add()
        for name in self.limits:
            limit = getattr(self, name)
            if limit is not None and limit <= special:
                # The tokenizer would cut nothing at all.
                raise ValueError(
                    f"{name}={limit} leaves no room for text: each has {special} special tokens."
                )

    @property
    def features(self) -> datasets.Features:
        """Token ids of the source, and those of the target as labels."""
        labels = datasets.List(datasets.Value("int32"))
        return datasets.Features({**self.token_columns, "labels": labels})

    @property
    def settings(self) -> dict[str, Any]:
        """The cache key: the tokenizer in both of its modes, the prefix, both lengths."""
        languages = [getattr(self.tokenizer, name, None) for name in ("src_lang", "tgt_lang")]
        return {
            **super().settings,
            "languages": languages,
            "prefix": self.prefix,
            "target_maxlength": self.target_maxlength,
        }

    def encode(self, batch: dict[str, list[Any]], indices: list[int] | None = None) -> Columns:
        """Encode sources and first targets, each cut to its own length."""
        source, target = self.names
        sources = [self.prefix + text for text in batch[source]]
        targets = [_all_of(texts)[0] for texts in batch[target]]
        tokens = encode_texts(self.tokenizer, [sources], self.maxlength, self.token_columns)
        if hasattr(self.tokenizer, "_switch_to_target_mode"):
            labels = self.tokenizer(
                text_target=targets,
                max_length=self.target_maxlength,
                truncation=self.target_maxlength is not None,
                return_attention_mask=False,
            )
        else:
            longest = self.target_maxlength
            labels = encode_texts(self.tokenizer, [targets], longest, ["input_ids"])
        return {**tokens, "labels": labels["input_ids"]}

    def _check_table(self, table: pa.Table, start: int, split: str) -> None:
        source, target = self.names
        if is_list(table[target].type):
            check_texts(table, start, [source], split)
            _check_references(table[target], start, target, split)
        else:
            check_texts(table, start, [source, target], split)


def references(rows: Any) -> Iterator[list[str]]:
    """All targets of each row, in the order of the rows.

    Args:
        rows: Data set or stream of the columns that `Sequences` names: source, target.
    """
    for row in rows:
        _, target = row.values()
        yield _all_of(target)


def _all_of(target: str | list[str]) -> list[str]:
    return [target] if isinstance(target, str) else list(target)


def _check_references(column: pa.ChunkedArray, start: int, name: str, split: str) -> None:
    """Raise ValueError at the first row with no reference, or with one that is no text."""
    empty = first_row(pc.fill_null(pc.equal(pc.list_value_length(column), 0), True))
    if empty is not None:
        raise ValueError(f"Row {start + empty} of the {split} data has no text in {name!r}.")
    for row, texts in enumerate(column.to_pylist(), start):
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"Row {row} of the {split} data has {texts!r} in {name!r}, not a list of texts."
            )
