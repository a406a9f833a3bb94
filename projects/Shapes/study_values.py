"""The numbers of the study's tables and pictures, from what its cells gave."""

import statistics

from projects.Shapes.grid import references


def cells_of(results, row, seeds=None):
    """Seed to what a row's cells gave that are done.

    Args:
        seeds: those that count; None for all. What is not trained has none and always counts.
    """
    counting = [seed for seed in row.seeds if not seeds or seed in seeds] if row.seeds else [0]
    found = {seed: results["cells"].get(f"{row.name}/{seed}") for seed in counting}
    return {seed: cell for seed, cell in found.items() if cell}


def values_of(results, row, kind, seeds=None):
    """Seed to AP of a row's cells that are done; `kind` is "bbox" or "segm", `seeds` as above."""
    found = cells_of(results, row, seeds)
    return {seed: cell[kind]["AP"] for seed, cell in found.items() if kind in cell}


def mean_and_deviation(values):
    """Mean and sample standard deviation; the latter is None of fewer than two values."""
    values = list(values)
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def paired_difference(values, control):
    """The differences of equal seeds, of two dicts of seed to AP."""
    return [values[seed] - control[seed] for seed in values if seed in control]


def unpaired_rows(grid, definition):
    """The names of rows whose seeds say nothing beside those of a table's others: checkpoints, the
    reference, and what was trained once for others to start or learn from."""
    trained = [row for row in grid.rows.values() if not row.fresh]
    sources = {name for row in trained for name in references(row)}
    sources = {name for name in sources if len(grid.rows[name].seeds) < 2}
    checkpoints = {row.name for row in grid.rows.values() if not row.seeds}
    return sources | checkpoints | {definition.get("reference")}


def with_deviation(mean, deviation, sign=""):
    """Both as text."""
    return f"{mean:{sign}.1f}" + (f" ± {deviation:.1f}" if deviation is not None else "")


def difference(values, control, paired):
    """A row against the control, as text: the differences of equal seeds, or if the two are not
    `paired`, that of the means."""
    if not paired and control:
        return f"{statistics.fmean(values.values()) - statistics.fmean(control.values()):+.1f}"
    found = paired_difference(values, control)
    if not found:
        return "-"
    positive = sum(each > 0 for each in found)
    return f"{with_deviation(*mean_and_deviation(found), sign='+')} ({positive}/{len(found)})"
