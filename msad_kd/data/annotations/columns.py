"""Columns of JSON values as numpy arrays, with flags for the values that do not fit."""

import re
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

_LARGEST = 2**63  # what 64 bits hold


def whole_number(value: Any) -> int | None:
    """Return the whole number that a value stands for (3, 3.0 or "3"), or None."""
    if type(value) is str and re.fullmatch(r"\s*[-+]?\d{1,18}\s*", value, re.ASCII):
        return int(value)
    if type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and -_LARGEST <= value < _LARGEST else None


def whole_numbers(values: list) -> tuple[np.ndarray, np.ndarray]:
    """Return whole numbers (N,), 0 where a value is none, and a mask (N,) of those that are."""
    numbers = [whole_number(value) for value in values]
    fits = np.array([number is not None for number in numbers], dtype=bool)
    return np.array([number or 0 for number in numbers], dtype=np.int64), fits


def flatten(rows: list) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of all rows, one after another, and each row's length.

    A row that is not a list of numbers has the length -1 and no numbers. Booleans are not numbers.
    """
    numbers, lengths = array("d"), []
    for row in rows:
        before = len(numbers)
        try:
            numbers.fromlist(row)
        except (TypeError, OverflowError):  # fromlist has added nothing then
            lengths.append(-1)
        else:
            lengths.append(len(numbers) - before)
    flat, lengths = np.frombuffer(numbers), np.array(lengths, dtype=np.int64)
    # A boolean has become 0 or 1, so only these are looked at: to check every number is slow.
    zero_or_one = np.flatnonzero((flat == 0) | (flat == 1))
    kept = np.flatnonzero(lengths >= 0)
    owners = kept[np.searchsorted(np.cumsum(lengths[kept]), zero_or_one, side="right")]
    booleans = [row for row in np.unique(owners) if bool in map(type, rows[row])]
    if booleans:
        keep = np.ones(len(rows), dtype=bool)
        keep[booleans] = False
        flat = flat[np.repeat(keep, lengths.clip(min=0))]
        lengths[booleans] = -1
    return flat, lengths


def as_table(rows: list, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a mask (N,) of the rows that are ``size`` numbers, and their numbers (M, size)."""
    flat, lengths = flatten(rows)
    fits = lengths == size
    return fits, flat[np.repeat(fits, lengths.clip(min=0))].reshape(-1, size)


def reduce_rows(operation: np.ufunc, flat: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Reduce each row of flattened numbers; every length has to be above 0."""
    if not len(lengths):
        return flat[:0]
    return operation.reduceat(flat, np.cumsum(lengths) - lengths)


def positions(known: Sequence, wanted: list) -> tuple[np.ndarray, bool]:
    """Find ids, which may also be written as 3.0 or "3" for 3, or as 3 for "3".

    Returns:
        The position of each wanted id among the known ones (N,), -1 for unknown ones, and whether
        all wanted ids are written as the known ones are.
    """
    table = {value: place for place, value in enumerate(known)}
    kinds = set(map(type, wanted))
    if kinds <= set(map(type, known)) & {int, str}:
        return np.array([table.get(value, -1) for value in wanted], dtype=np.int64), True

    def place(value):
        if type(value) not in (int, float, str):
            return -1
        number = whole_number(value)
        return table.get(value, table.get(number, table.get(str(number), -1)))

    return np.array([place(value) for value in wanted], dtype=np.int64), False
