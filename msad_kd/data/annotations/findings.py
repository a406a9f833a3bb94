"""Collect what a check of an annotation file finds: problems, and which records are usable."""

import reprlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# What a problem means.
REFUSED = "refused"  # the file cannot be used at all
INVALID = "invalid"  # the records cannot be used; DATASETS.INVALID_ANNOTATIONS decides
EMPTY = "empty"  # the records are left out with a warning: there is nothing to learn from them
DOUBTFUL = "doubtful"  # the records are kept with a warning; "drop" leaves them out
STRANGE = "strange"  # the records are kept with a warning: perhaps the file means something else
MENDED = "mended"  # a value of the records was replaced

PLURALS = {"category": "categories", "image": "images", "annotation": "annotations"}

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


@dataclass
class Problem:
    """Records of one kind with the same fault."""

    record: str  # "image", "annotation" or "category"
    words: str  # what is wrong, such as "bbox lies outside the image"
    severity: str
    rows: list[int]  # the places of the records in the file
    example: str  # the words with the first record's name and value


@dataclass
class Findings:
    """The problems of a file's content, and a mask of the usable records of each kind."""

    content: dict
    problems: list[Problem] = field(default_factory=list)
    usable: dict[str, np.ndarray] = field(default_factory=dict)

    def refuse(self, words: str) -> None:
        """Note why the whole file cannot be used."""
        self.problems.append(Problem("file", words, REFUSED, [], words))

    def add(self, record: str, rows, words: str, severity=INVALID, key: str | None = None) -> None:
        """Note a problem of usable records.

        Args:
            record: the kind of record.
            rows: a mask of all records, or the places of some.
            words: what is wrong.
            severity: what that means.
            key: the field whose value the message shows.
        """
        usable = self.usable[record]
        rows = np.asarray(rows)  # an empty list becomes floats
        rows = np.flatnonzero(rows) if rows.dtype == bool else np.unique(rows).astype(np.int64)
        rows = rows[usable[rows]]
        if not len(rows):
            return
        if severity not in (MENDED, DOUBTFUL, STRANGE):
            usable[rows] = False
        first = self.content[PLURALS[record]][rows[0]]
        before = ", not" if " should " in words else ":"
        value = f"{before} {_SHORT.repr(first[key])}" if key and key in first else ""
        example = f"{name_record(record, first, rows[0])}: {words}{value}"
        self.problems.append(Problem(record, words, severity, rows.tolist(), example))

    def column(self, record: str, key: str) -> list:
        """Return a field of all records, None where it is missing or the record not usable."""
        records, usable = self.content[PLURALS[record]], self.usable[record]
        if usable.all():
            return [entry.get(key) for entry in records]
        return [entry.get(key) if good else None for entry, good in zip(records, usable)]


def name_record(record: str, entry: Any, place: int) -> str:
    """Return what messages call a record, such as "annotation 17 (image 3)"."""
    if not isinstance(entry, dict) or entry.get("id") is None:
        name = f"{record} number {place + 1}"
    else:
        name = f"{record} {_SHORT.repr(entry['id'])}"
    if record == "annotation" and isinstance(entry, dict):
        name += f" (image {_SHORT.repr(entry.get('image_id'))})"
    return name


def summarise(problems: list[Problem], most: int = 4) -> str:
    """Return one sentence: an example of each kind of problem, and how many records have it."""
    parts = []
    for problem in problems[:most]:
        others = len(problem.rows) - 1
        parts.append(problem.example + (f" (and {others} more)" if others > 0 else ""))
    if len(problems) > most:
        parts.append(f"{len(problems) - most} more kinds of problems")
    counts = []
    for record, plural in PLURALS.items():
        rows = {row for problem in problems if problem.record == record for row in problem.rows}
        counts += [f"{len(rows)} {record if len(rows) == 1 else plural}"] if rows else []
    return "; ".join(parts) + (f"; {' and '.join(counts)} in all" if counts else "")
