"""Text and label -> token ids and class; the map between labels and classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from hflit.data.columns import is_list
from hflit.data.tokenization import Columns, Tokenization, check_texts, encode_texts, first_row

REGRESSION = "regression"
SINGLE = "single_label_classification"
MULTI = "multi_label_classification"


@dataclass(frozen=True)
class LabelMap:
    """Which label stands for which class.

    Attributes:
        problem: How transformers names the problem: `regression`, `single_label_classification`
            or `multi_label_classification`.
        names: Class id -> the name that goes into the model's config; one entry for regression.
        ids: Label as it stands in the data -> class id; empty for regression and multi-hot rows.
    """

    problem: str
    names: dict[int, str]
    ids: dict[Any, int] = field(default_factory=dict)

    @property
    def is_multi_hot(self) -> bool:
        """Whether a row's label already is a list of 0 and 1, one for each class."""
        return self.problem == MULTI and not self.ids

    def encode(self, labels: list[Any]) -> list[Any]:
        """Labels of some rows -> class ids, scores, or one list of 0.0 and 1.0 a row."""
        if self.problem == REGRESSION:
            return [float(label) for label in labels]
        if self.problem == SINGLE:
            return [self.ids[label] for label in labels]
        if self.is_multi_hot:
            return [[float(value) for value in label] for label in labels]
        rows = [[0.0] * len(self.names) for _ in labels]
        for row, label in zip(rows, labels, strict=True):
            for name in label:
                row[self.ids[name]] = 1.0
        return rows


class Labels(Tokenization):
    """Tokenizes a text, or a pair of texts, and its label.

    What the labels are decides the problem. Whole numbers, booleans and strings are classes,
    numbered in sorted order. Any real fraction makes it regression. A list for each row, of 0 and
    1 or of label names, makes it multi-label.

    Args:
        tokenizer: Tokenizer of the base.
        columns: Text, second text or None, label. Two names mean text and label.
        maxlength: Longest row in tokens, or None for no limit.
        head: Class id -> name of a classifier that the base already carries. Labels that fit it
            keep its classes; others get classes of their own.

    Attributes:
        is_trained: Whether the head has learned its classes, so that other labels are an error.
    """

    is_trained = False
    default_columns = ("text", None, "label")
    options = ("head",)

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        columns: str | tuple[str | None, ...] | None = None,
        maxlength: int | None = None,
        head: dict[int, str] | None = None,
    ) -> None:
        super().__init__(tokenizer, columns, maxlength)
        special = tokenizer.num_special_tokens_to_add(pair=len(self.names) > 2)
        if maxlength is not None and maxlength <= special:
            # The tokenizer would cut nothing at all.
            raise ValueError(
                f"maxlength={maxlength} leaves no room for text: each row has {special} special "
                "tokens."
            )
        self.head = head
        self.map: LabelMap | None = None
        self.declared: list[str] | None = None

    def resolve_columns(
        self, columns: str | tuple[str | None, ...] | None
    ) -> tuple[str | None, ...]:
        """Text, second text, label; two names leave out the second text."""
        if isinstance(columns, (tuple, list)) and len(columns) == 2:
            columns = (columns[0], None, columns[1])
        return super().resolve_columns(columns)

    @property
    def numbers(self) -> list[str]:
        """The labels."""
        return self.names[-1:]

    @property
    def features(self) -> datasets.Features:
        """Token ids, and labels as the loss takes them."""
        assert self.map is not None, "fit comes first"
        label = datasets.Value("int64" if self.map.problem == SINGLE else "float32")
        labels = datasets.List(label) if self.map.problem == MULTI else label
        return datasets.Features({**self.token_columns, "labels": labels})

    @property
    def settings(self) -> dict[str, Any]:
        """The cache key: the tokenizer and the label map."""
        return {**super().settings, "map": repr(self.map)}

    def fit(self, rows: datasets.Dataset, limit: int | None = None) -> None:
        """Find the classes of the training rows."""
        label = self.names[-1]
        self.declared = _class_names(rows, label)
        found = _LabelsFound(label)
        for start, table in self.tables(rows, "training", limit):
            self._check_table(table, start, "training")
            found.add(table[label], start, "training")
            # A stream that declares its classes need not be read through to find them.
            if self.declared is not None and not isinstance(rows, datasets.Dataset):
                found.values |= set(range(len(self.declared)))
                break
        self.map = label_map(found, self.declared, self.head, self.is_trained)
        names = list((self.head or {}).values())
        says_something = names != list(_default_names(len(names)).values())
        if self.is_trained and says_something and self.map.names != self.head:
            values = ", ".join(map(repr, sorted(self.declared or found.values, key=str)[:30]))
            raise ValueError(
                f"The model tells {', '.join(names[:30])} apart, and column {label!r} has the "
                f"labels {values}. Evaluate it on labels that it knows."
            )

    def config_changes(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Classes and kind of problem, for the model's config."""
        assert self.map is not None, "fit comes first"
        names = self.map.names
        return {
            "id2label": dict(names),
            "label2id": {name: index for index, name in names.items()},
            "problem_type": self.map.problem,
        }

    def check(self, rows: datasets.Dataset, split: str, limit: int | None = None) -> None:
        """Raise ValueError at a missing text or label, or at a label that training lacks."""
        label = self.names[-1]
        assert self.map is not None, "fit comes first"
        names = _class_names(rows, label)
        if self.declared is not None and names is not None and names != self.declared:
            raise ValueError(
                f"Column {label!r} of the {split} data has the classes {names!r}, in the training "
                f"data {self.declared!r}."
            )
        found = _LabelsFound(label)
        for start, table in self.tables(rows, split, limit):
            self._check_table(table, start, split)
            found.add(table[label], start, split)
        if not found.rows:
            raise ValueError(f"The {split} data has no rows.")
        if found.is_list != (self.map.problem == MULTI):
            kinds = {True: "a list of labels", False: "one label"}
            raise ValueError(
                f"Each row of the {split} data has {kinds[found.is_list]} in {label!r}, each row "
                f"of the training data {kinds[not found.is_list]}."
            )
        if self.map.problem == REGRESSION:
            if not all(isinstance(value, (int, float)) for value in found.values):
                raise ValueError(
                    f"Column {label!r} of the {split} data holds labels that are no numbers, but "
                    "the training data holds scores."
                )
        elif self.map.is_multi_hot:
            if found.lengths != {len(self.map.names)} or not found.values <= {0, 1}:
                raise ValueError(
                    f"Labels of the {split} data must be lists of {len(self.map.names)} values, "
                    f"each 0 or 1, as in the training data."
                )
        else:
            unseen = sorted((v for v in found.values if v not in self.map.ids), key=str)
            if unseen:
                known = ", ".join(repr(value) for value in list(self.map.ids)[:30])
                raise ValueError(
                    f"Labels of the {split} data that the training data lacks: "
                    f"{', '.join(repr(value) for value in unseen[:30])}. It has {known}."
                )

    def encode(self, batch: dict[str, list[Any]], indices: list[int] | None = None) -> Columns:
        """Encode texts, cut to `maxlength`, and their labels."""
        assert self.map is not None, "fit comes first"
        *names, label = self.names
        texts = [batch[name] for name in names]
        tokens = encode_texts(self.tokenizer, texts, self.maxlength, self.token_columns)
        return {**tokens, "labels": self.map.encode(batch[label])}

    def _check_table(self, table: pa.Table, start: int, split: str) -> None:
        *texts, label = self.names
        check_texts(table, start, texts, split)
        missing = first_row(pc.is_null(table[label], nan_is_null=True))
        if missing is not None:
            raise ValueError(
                f"Row {start + missing} of the {split} data has no label in {label!r}."
            )


class _LabelsFound:
    """The different labels of some rows, gathered table by table."""

    def __init__(self, column: str) -> None:
        self.column = column
        self.rows = 0
        self.is_list = False
        self.values: set[Any] = set()
        self.lengths: set[int] = set()  # labels in a row, where each row has a list

    def add(self, column: pa.ChunkedArray, start: int, split: str) -> None:
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if pa.types.is_float16(column.type):  # of which pyarrow finds no different values
            column = column.cast(pa.float32())
        self.rows += len(column)
        self.is_list = is_list(column.type)
        if self.is_list:
            self.lengths |= set(pc.unique(pc.list_value_length(column)).to_pylist())
            flat = pc.list_flatten(column)
            missing = first_row(pc.is_null(flat, nan_is_null=True))
            if missing is not None:
                row = pc.list_parent_indices(column)[missing].as_py()
                raise ValueError(
                    f"Row {start + row} of the {split} data has a missing label in {self.column!r}."
                )
            column = flat
        kind = column.type
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        if not (is_text or is_number or pa.types.is_boolean(kind) or pa.types.is_null(kind)):
            raise ValueError(
                f"Column {self.column!r} of the {split} data holds {kind}. Labels are numbers, "
                "strings, booleans or lists of those."
            )
        if pa.types.is_floating(kind):
            infinite = first_row(pc.is_inf(column))
            if infinite is not None:
                where = f"row {start + infinite}" if not self.is_list else "a row"
                raise ValueError(
                    f"Label {column[infinite].as_py()} in {where} of the {split} data is no number."
                )
        self.values |= set(pc.unique(column).to_pylist())


def label_map(
    found: _LabelsFound,
    names: list[str] | None,
    head: dict[int, str] | None,
    is_trained: bool = False,
) -> LabelMap:
    """Decide what kind of problem the labels pose, and number the classes.

    Args:
        found: The labels of the training rows.
        names: Names that the data set itself declares (`ClassLabel`), or None.
        head: Class id -> name of a classifier that the base already carries, or None.
        is_trained: Whether that classifier is evaluated: one class is enough then, and a score for
            which it has one output may be a whole number.

    Raises:
        ValueError: There is no row, one class only, or lists that fit no kind of problem.
    """
    if not found.rows and names is None:
        raise ValueError("The training data has no rows.")
    values = found.values
    if is_trained and head is not None and len(head) == 1 and not found.is_list:
        return LabelMap(REGRESSION, head)
    if names is not None:
        if -1 in values:
            raise ValueError(
                f"Column {found.column!r} has rows without a label (-1 in ClassLabel)."
            )
        problem = MULTI if found.is_list else SINGLE
        if problem == SINGLE and not is_trained:
            _need_two({names[value] for value in values})
        known = {name: index for index, name in (head or {}).items()}
        if set(names) <= set(known):
            return LabelMap(problem, dict(head or {}), {i: known[n] for i, n in enumerate(names)})
        return LabelMap(problem, dict(enumerate(names)), {i: i for i in range(len(names))})

    has_fraction = any(isinstance(value, float) and not value.is_integer() for value in values)
    if found.is_list:
        if not values:
            raise ValueError(f"No row of the training data has a label in {found.column!r}.")
        if len(found.lengths) == 1 and min(found.lengths) > 1 and values <= {0, 1}:
            width = min(found.lengths)
            kept = head if head is not None and len(head) == width else _default_names(width)
            return LabelMap(MULTI, kept)
        if has_fraction:
            raise ValueError(
                f"Column {found.column!r} has lists of fractions. Lists hold 0 and 1, one for each "
                "class, or the labels of a row."
            )
        if max(found.lengths) > len(values):
            raise ValueError(
                f"The lists in column {found.column!r} have {min(found.lengths)} to "
                f"{max(found.lengths)} values: too uneven for one value a class, and as lists of "
                "labels they name a label twice."
            )
        return _numbered(values, MULTI, head)

    if has_fraction:
        return LabelMap(REGRESSION, {0: "LABEL_0"})
    if not is_trained:
        _need_two(values)
    return _numbered(values, SINGLE, head)


def _need_two(labels: set[Any]) -> None:
    if len(labels) == 1:
        raise ValueError(
            f"Every label of the training data is {next(iter(labels))!r}; a classifier needs two."
        )


def _numbered(values: set[Any], problem: str, head: dict[int, str] | None) -> LabelMap:
    ordered = sorted(values)
    if isinstance(ordered[0], str):
        known = {name: index for index, name in (head or {}).items()}
        if head is not None and values <= set(known):
            return LabelMap(problem, head, known)
        return LabelMap(problem, dict(enumerate(ordered)), {v: i for i, v in enumerate(ordered)})
    if isinstance(ordered[0], bool):
        return LabelMap(problem, {0: "False", 1: "True"}, {False: 0, True: 1})

    numbers = {int(name): i for i, name in (head or {}).items() if _is_whole(name)}
    if head is not None and values <= set(numbers):  # they are what the head calls its classes
        return LabelMap(problem, head, numbers)
    for names in (head or {}, _default_names(len(ordered))):
        if all(0 <= value < len(names) for value in ordered):  # the labels are class ids already
            return LabelMap(problem, names, {index: index for index in names})
    # Gaps, counting from 1, star ratings: the class is the rank, its name the label itself.
    return LabelMap(
        problem,
        {i: str(int(value)) for i, value in enumerate(ordered)},
        {value: i for i, value in enumerate(ordered)},
    )


def _is_whole(name: str) -> bool:
    return name.removeprefix("-").isdecimal()


def _default_names(count: int) -> dict[int, str]:
    return {index: f"LABEL_{index}" for index in range(count)}


def _class_names(rows: datasets.Dataset, column: str) -> list[str] | None:
    kind = (rows.features or {}).get(column)
    if isinstance(kind, (datasets.List, datasets.LargeList)):
        kind = kind.feature
    return list(kind.names) if isinstance(kind, datasets.ClassLabel) else None
