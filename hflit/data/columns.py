"""Columns of any values, as they come from the caller's rows -> Arrow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import torch

Converters = dict[str, Callable[[Any], Any]]  # column -> what brings its values to one kind
MIXED = (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError)  # of values of several kinds


def arrow_column(
    values: list[Any], name: str, split: str, converters: Converters, start: int = 0
) -> pa.Array:
    """A column of Arrow.

    Args:
        values: One for each row; None and NaN are missing.
        name: The column, for errors and converters.
        split: The data, for errors.
        converters: Column -> what brings its values to one kind.
        start: Number of the first row.

    Raises:
        ValueError: The values are of mixed kinds, or of none that Arrow has.
    """
    values = plain_values(values, converters.get(name))
    try:
        return pa.array(values, from_pandas=True)  # from_pandas: NaN is missing, as None is
    except UnicodeEncodeError:
        row = next(i for i, value in enumerate(values) if not _fits([value], UnicodeEncodeError))
        raise ValueError(
            f"Row {start + row} of the {split} data has half a character in {name!r}, a lone "
            f"surrogate: {values[row]!r:.60}. Leave it out, as "
            "text.encode('utf-8', 'ignore').decode() does."
        ) from None
    except MIXED as error:
        first = next(value for value in values if value is not None)
        odd = next(
            (i for i, v in enumerate(values) if v is not None and not _fits([first, v], MIXED)),
            None,
        )
        if odd is not None and values[odd] is first:
            raise ValueError(
                f"Column {name!r} of the {split} data holds {first!r} in row {start + odd}. Values "
                "are numbers, texts, booleans or lists of these."
            ) from None
        where = (
            f"row {start + odd} holds {values[odd]!r} and earlier rows hold {first!r}"
            if odd is not None
            else str(error).splitlines()[0]
        )
        raise ValueError(f"Column {name!r} of the {split} data mixes kinds: {where}.") from None


def is_list(kind: pa.DataType) -> bool:
    """Whether a column of this type holds a list for each row."""
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_kind(kind) for is_kind in lists)


def plain_values(values: list[Any], convert: Callable[[Any], Any] | None) -> list[Any]:
    """Values without the tensors and arrays around them, and converted."""
    plain = [_plain(value) for value in values]
    return plain if convert is None else [convert(value) for value in plain]


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor) or (isinstance(value, np.ndarray) and value.ndim == 0):
        return value.tolist()
    return value.to_list() if hasattr(value, "to_list") else value  # a list column of polars


def _fits(values: list[Any], problems: type[Exception] | tuple[type[Exception], ...]) -> bool:
    """Whether Arrow makes a column of these values without such problems."""
    try:
        pa.array(values, from_pandas=True)
    except problems:
        return False
    return True
