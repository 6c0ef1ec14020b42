"""Texts -> token ids for the language tasks: concatenated, packed or left as they are."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from hflit.data.batching import IGNORE_INDEX, Batch
from hflit.data.tokenization import Columns, Tokenization, encode_texts

MERGES = ("concat", "pack", None)
SPACES = ("▁", "Ġ", " ")  # how tokens write the space before them


class Texts(Tokenization):
    """Tokenizes texts, or pairs of texts, for language models.

    A text ends with the tokenizer's EOS token where it has one, so that a model learns to stop.

    Args:
        tokenizer: Tokenizer of the base.
        columns: Text, second text or None.
        maxlength: Longest row in tokens.
        merge: `"concat"` runs all texts together and cuts the stream into rows of `maxlength`;
            `"pack"` puts whole texts side by side into rows, blind to each other; None gives each
            text a row of its own and cuts what is longer.
        masked: Mask tokens for the model to guess; otherwise it predicts the next token.
        whole_word: Mask all tokens of a word or none of them.
    """

    default_columns = ("text", None)
    options = ("merge", "whole_word")

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        columns: str | tuple[str | None, ...] | None = None,
        maxlength: int | None = None,
        merge: str | None = "concat",
        masked: bool = False,
        whole_word: bool = False,
    ) -> None:
        super().__init__(tokenizer, columns, maxlength)
        if merge not in MERGES:
            raise ValueError(f"Unknown merge={merge!r}. Choose one of: 'concat', 'pack', None.")
        if merge is not None and maxlength is None:
            raise ValueError(f"merge={merge!r} fills rows of maxlength tokens: give maxlength.")
        if whole_word and not masked:
            raise ValueError("whole_word=True is about masking; this task masks nothing.")
        if whole_word and not tokenizer.is_fast:
            raise ValueError(
                f"whole_word=True needs to know where tokens stand in a text, which "
                f"{type(tokenizer).__name__} does not tell. Use a fast tokenizer."
            )
        if masked and tokenizer.mask_token is None:
            raise ValueError("The tokenizer has no mask token, so it cannot train a masked model.")
        self.merge = merge
        if merge is not None:
            self.limits = {}
        self.masked, self.predicts_next = masked, not masked
        self.whole_word = whole_word
        self.padding["special_tokens_mask"] = 1
        self.adds_eos = tokenizer.eos_token_id is not None and not _ends_texts(tokenizer)
        if masked:
            # 80 % of the chosen tokens become [MASK], 10 % another word, 10 % stay as they are.
            self.masker = DataCollatorForLanguageModeling(
                tokenizer,
                whole_word_mask=whole_word,
                mask_replace_prob=1.0 if whole_word else 0.8,
                random_replace_prob=0.0 if whole_word else 0.1,
            )

    @property
    def features(self) -> datasets.Features:
        """Token ids, and for masking which of them are special and which start a word."""
        small = datasets.List(datasets.Value("int8"))
        extra = {"special_tokens_mask": small} if self.masked else {}
        extra |= {"word_starts": small} if self.whole_word else {}
        return datasets.Features({**self.token_columns, **extra})

    @property
    def settings(self) -> dict[str, Any]:
        """The cache key; merging comes after the cache, but for what it changes in a row."""
        kind = {"masked": self.masked, "whole_word": self.whole_word, "cut": self.merge is None}
        return {**super().settings, **kind}

    def encode(self, batch: dict[str, list[Any]], indices: list[int] | None = None) -> Columns:
        """Encode texts; only rows that are not merged are cut to `maxlength`."""
        longest = self.maxlength if self.merge is None else None
        texts = [batch[name] for name in self.names]
        names = [name for name in self.features if name != "word_starts"]
        encoded = encode_texts(self.tokenizer, texts, longest, names)
        if self.whole_word:
            tokens = self.tokenizer(
                *texts,
                max_length=longest,
                truncation=longest is not None,
                return_offsets_mapping=True,
                verbose=False,
            )
            encoded["word_starts"] = [
                _word_starts(offsets, tokens.tokens(row))
                for row, offsets in enumerate(tokens["offset_mapping"])
            ]
        if self.adds_eos:
            # A row cut at maxlength has no end to learn.
            fill = {"input_ids": self.tokenizer.eos_token_id, "special_tokens_mask": 1}
            for name, rows in encoded.items():
                kind = self.features[name].feature.pa_type
                encoded[name] = _appended(
                    pa.array(rows, pa.list_(kind)), fill.get(name, 0), longest
                )
        return encoded

    def arrange(self, tokens: Any) -> Any:
        """Merge the tokenized rows of the whole data set; a stream is merged as it comes."""
        if self.merge is None:
            return tokens
        if isinstance(tokens, datasets.IterableDataset):
            return datasets.IterableDataset.from_generator(
                self._stream, gen_kwargs={"rows": tokens}
            )
        table = tokens.with_format("arrow")[:]
        return datasets.Dataset(
            self._concat(table) if self.merge == "concat" else self._pack(table)
        )

    def finish(self, batch: Batch, seed: int | None) -> Batch:
        """Add labels, by masking or by copying; for packed rows positions and documents.

        Args:
            batch: Padded rows.
            seed: For the masks; None draws from the global random numbers, as transformers does.
        """
        ids, is_token = batch["input_ids"], batch["attention_mask"].bool()
        starts = None
        if "segments" in batch:
            batch["documents"], batch["position_ids"] = _places(batch.pop("segments"), is_token)
            starts = batch["position_ids"] == 0
        special = batch.pop("special_tokens_mask", None)
        word_starts = batch.pop("word_starts", None)
        if self.masked:
            generator = None if seed is None else torch.Generator().manual_seed(seed)
            self.masker.generator = generator
            words = None if word_starts is None else _as_offsets(word_starts)
            batch["input_ids"], batch["labels"] = self.masker.torch_mask_tokens(ids, special, words)
        else:
            batch["labels"] = ids.masked_fill(~is_token, IGNORE_INDEX)
            if starts is not None:  # no text predicts the first token of its neighbour
                batch["labels"].masked_fill_(starts, IGNORE_INDEX)
        return batch

    def _concat(self, table: pa.Table) -> pa.Table:
        length = self.maxlength
        assert length is not None
        columns = {}
        for name in table.column_names:
            values = table[name].combine_chunks().flatten()
            offsets = np.append(np.arange(0, len(values), length), len(values))
            columns[name] = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), values)
        return pa.table(columns)

    def _pack(self, table: pa.Table) -> pa.Table:
        assert self.maxlength is not None
        lengths = table["input_ids"].combine_chunks().value_lengths().to_numpy()
        starts, sizes = _pieces(lengths, self.maxlength)
        rows = pack(sizes, self.maxlength)
        order = np.concatenate([np.asarray(row) for row in rows])
        # Position of every token, piece after piece in their new order.
        ends = np.cumsum(sizes[order])
        shift = np.repeat(starts[order] - (ends - sizes[order]), sizes[order])
        take = pa.array(np.arange(ends[-1]) + shift)
        filled = np.array([int(sizes[row].sum()) for row in rows])
        offsets = pa.array(np.append(0, np.cumsum(filled)), pa.int64())
        columns = {
            name: pa.LargeListArray.from_arrays(
                offsets, table[name].combine_chunks().flatten().take(take)
            )
            for name in table.column_names
        }
        counts = pa.array(np.append(0, np.cumsum([len(row) for row in rows])), pa.int64())
        segments = pa.array(sizes[order].astype(np.int32))
        return pa.table({**columns, "segments": pa.LargeListArray.from_arrays(counts, segments)})

    def _stream(self, rows: Any) -> Iterator[dict[str, Any]]:
        # A stream has no end to wait for: rows are merged a thousand at a time. Concatenation
        # carries what is left over to the next thousand, so that nothing depends on the number.
        left: pa.Table | None = None
        for table in rows.with_format("arrow").iter(batch_size=1000):
            table = table if left is None else pa.concat_tables([left, table])
            merged = self._concat(table) if self.merge == "concat" else self._pack(table)
            left = merged.slice(len(merged) - 1) if self.merge == "concat" else None
            yield from (merged if left is None else merged.slice(0, len(merged) - 1)).to_pylist()
            left = left.cast(table.schema) if left is not None else None
        if left is not None:
            yield from left.to_pylist()


def pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Place rows into as few packs as best-fit-decreasing finds.

    The longest row comes first; each goes where it leaves the least room (Johnson 1973: at most
    22 % more packs than the best possible).

    Args:
        lengths: Tokens of each row, none above `capacity`.
        capacity: Tokens of a pack.

    Returns:
        Row numbers of each pack.

    Example:
        >>> pack(np.array([3, 5, 2, 4]), capacity=7)
        [[1, 2], [3, 0]]
    """
    packs: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room left -> packs
    rooms: list[int] = []  # the keys of with_room, sorted
    for row in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[row])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            room, chosen = capacity, len(packs)
            packs.append([])
        else:
            room = rooms[at]
            chosen = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        packs[chosen].append(row)
        left = room - length
        if left:
            if left not in with_room:
                with_room[left] = []
                insort(rooms, left)
            with_room[left].append(chosen)
    return packs


def _appended(rows: pa.ListArray, value: int, longest: int | None) -> pa.ListArray:
    """Rows with one more value at their end, those of `longest` values excepted."""
    lengths = rows.value_lengths().to_numpy()
    grows = np.full(len(lengths), True) if longest is None else lengths < longest
    ends = np.cumsum(lengths)
    values = np.insert(rows.flatten().to_numpy(), ends[grows], value)
    offsets = np.concatenate([[0], ends + np.cumsum(grows)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _ends_texts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself puts an end behind each text."""
    whole, bare = (tokenizer("a", add_special_tokens=add).input_ids for add in (True, False))
    return len(whole) > len(bare) and whole[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id)


def _pieces(lengths: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and sizes of rows in the flat tokens; a row above `longest` makes several."""
    starts, sizes = [], []
    begin = 0
    for length in lengths.tolist():
        for at in range(0, length, longest):
            starts.append(begin + at)
            sizes.append(min(longest, length - at))
        begin += length
    return np.array(starts), np.array(sizes)


def _places(segments: torch.Tensor, is_token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which document each token of a packed row belongs to, and where in it; -1 and 1 in padding.

    Args:
        segments: Lengths of the documents of each row, `(batch, documents)`, filled with 0.
        is_token: False in padding, `(batch, seq)`.
    """
    documents = torch.full(is_token.shape, -1)
    positions = torch.ones(is_token.shape, dtype=torch.long)
    sizes = segments.flatten()
    number = torch.arange(segments.shape[1]).repeat(len(segments))
    documents[is_token] = torch.repeat_interleave(number, sizes)
    begins = torch.repeat_interleave(torch.cumsum(sizes, 0) - sizes, sizes)
    positions[is_token] = torch.arange(len(begins)) - begins
    return documents, positions


def _word_starts(offsets: list[tuple[int, int]], tokens: list[str]) -> list[int]:
    """1 for each token that does not touch the one before it, or that begins with a space."""
    ends = [-1, *(end for _, end in offsets[:-1])]
    return [
        int(start != end or token.startswith(SPACES))  # some tokenizers' offsets hold the space
        for (start, _), end, token in zip(offsets, ends, tokens, strict=True)
    ]


def _as_offsets(word_starts: torch.Tensor) -> torch.Tensor:
    """Offsets `(batch, seq, 2)` in which just the tokens of one word touch, for the masker."""
    ends = torch.cumsum(torch.ones_like(word_starts) + word_starts, dim=1)
    return torch.stack([ends - 1, ends], dim=-1)
