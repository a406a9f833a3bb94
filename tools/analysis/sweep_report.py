"""The table of a sweep over models and test sizes, and its picture.

A row is a dict with the keys of HEADINGS; an AP is in percent, or None if there is none.
"""

import itertools
import os

import pandas as pd
from matplotlib.figure import Figure
from tabulate import tabulate

from msad_kd.checkpoint.files import replacing, write_json

HEADINGS = {
    "model": "model",
    "size": "test size (px)",
    "side": "images seen (px)",
    "box_ap": "box AP",
    "mask_ap": "mask AP",
    "keypoint_ap": "keypoint AP",
    "gmacs": "GMACs",
    "latency_ms": "latency (ms)",
    "latency_low_ms": "25 %",
    "latency_high_ms": "75 %",
}
APS = {"bbox": "box_ap", "segm": "mask_ap", "keypoints": "keypoint_ap"}  # by the evaluator's name


def _measured(rows: list[dict]) -> list[str]:
    return [ap for ap in APS.values() if any(row[ap] is not None for row in rows)]


def _cell(value) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def markdown(rows: list[dict], note: str) -> str:
    """Return the rows as a Markdown table with the note below."""
    names = [name for name in HEADINGS if name not in APS.values() or name in _measured(rows)]
    cells = [[_cell(row[name]) for name in names] for row in rows]
    align = ["left", *["right"] * (len(names) - 1)]
    headings = [HEADINGS[name] for name in names]
    table = tabulate(cells, headings, "pipe", colalign=align, disable_numparse=True)
    return f"{table}\n\n{note}\n"


def draw(path: str, rows: list[dict], note: str) -> None:
    """Draw AP against latency: a line a model, a point a size, whiskers between the quartiles."""
    kinds = _measured(rows)
    figure = Figure(figsize=(4.2 * len(kinds), 4), layout="constrained")
    places = itertools.cycle([(5, -11, "left"), (-4, 5, "right"), (5, 4, "left")])
    for axis, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds):
        names = dict.fromkeys(row["model"] for row in rows if row[kind] is not None)
        for name, (right, up, side) in zip(names, places):
            points = [row for row in rows if row["model"] == name]
            x, y = [row["latency_ms"] for row in points], [row[kind] for row in points]
            below = [row["latency_ms"] - row["latency_low_ms"] for row in points]
            above = [row["latency_high_ms"] - row["latency_ms"] for row in points]
            style = {"marker": "o", "capsize": 2, "elinewidth": 0.8}
            line, *_ = axis.errorbar(x, y, xerr=[below, above], label=name, **style)
            words = {"textcoords": "offset points", "ha": side, "color": line.get_color()}
            for row, *point in zip(points, x, y):
                axis.annotate(row["side"], point, (right, up), fontsize=8, **words)
        axis.set_xlabel("latency (ms), median and quartiles")
        axis.set_ylabel(HEADINGS[kind])
        axis.grid(color="#dddddd", lw=0.6)
        axis.legend()
    figure.suptitle(note, fontsize=7, wrap=True)
    figure.savefig(path, dpi=200, format="png")


def write_files(folder: str, rows: list[dict], note: str, total: int) -> None:
    """Write sweep.md, .json, .csv and .png to a folder, each of them completely or not at all.

    Args:
        folder: the folder.
        rows: the rows so far.
        note: what is said below the table and above the picture.
        total: how many rows the sweep will have; fewer are marked as partial, except in the CSV.
    """
    if len(rows) < total:
        note = f"PARTIAL: {len(rows)} of {total} rows; the sweep has not finished. {note}"

    table = pd.DataFrame(rows, columns=list(HEADINGS))
    writers = {
        "sweep.md": lambda path: path.write_text(markdown(rows, note)),
        "sweep.csv": lambda path: table.to_csv(path, index=False),
        "sweep.png": lambda path: draw(path, rows, note),
    }
    for name, write in writers.items():
        with replacing(os.path.join(folder, name)) as part:
            write(part)
    write_json(os.path.join(folder, "sweep.json"), {"note": note, "rows": rows})
