"""The study's tables and pictures, from what its cells gave."""

import csv
import statistics
from pathlib import Path

from tabulate import tabulate

from projects.Shapes.costs import median_seconds, training_costs
from projects.Shapes.grid import REFERENCES
from projects.Shapes.measure import METRICS
from projects.Shapes.report import KINDS, gap_closed

FILES = ("tables.md", "cells.csv", "bars_*.png", "curves_*.png")
NOTES = (
    "AP: mean ± standard deviation over the seeds. Against the control: mean of the differences of "
    "equal seeds ± their standard deviation, and how many of them are positive. Gap: (row - "
    "{baseline}) / ({reference} - {baseline}), of the means. GMACs: multiply-adds of a test image, "
    "heads included. Training: its cost in steps of '{baseline}', by the measured time of a step; "
    "in parentheses together with what made the checkpoints it starts or learns from."
)


def values_of(results, row, kind):
    """Seed to AP of a row's cells that are done.

    Args:
        kind: "bbox" or "segm".
    """
    found = {seed: results["cells"].get(f"{row.name}/{seed}", {}) for seed in row.seeds or (0,)}
    return {seed: cell[kind]["AP"] for seed, cell in found.items() if kind in cell}


def mean_and_deviation(values):
    """Mean and sample standard deviation; the latter is None of fewer than two values."""
    values = list(values)
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def paired_difference(values, control):
    """The differences of equal seeds, of two dicts of seed to AP.

    A control that is a checkpoint, so has no seed, is set against every seed.
    """
    if set(control) == {0}:
        return [value - control[0] for value in values.values()]
    return [values[seed] - control[seed] for seed in values if seed in control]


def _spread(mean, deviation, sign=""):
    return f"{mean:{sign}.1f}" + (f" ± {deviation:.1f}" if deviation is not None else "")


def _difference(values, control):
    found = paired_difference(values, control)
    if not found:
        return "-"
    positive = sum(each > 0 for each in found)
    return f"{_spread(*mean_and_deviation(found), sign='+')} ({positive}/{len(found)})"


def table(grid, cells, results, definition, costs):
    """A table of study.yaml as Markdown; None as long as none of its cells is done.

    Args:
        costs: from `training_costs`.
    """
    rows = [grid.rows[name] for name in definition["rows"]]
    kinds = [k for k in KINDS if any(values_of(results, row, k) for row in rows)]
    if not kinds:
        return None
    named = {key: grid.rows[definition[key]] for key in REFERENCES if key in definition}
    step = baseline_step(grid, cells, results, definition)
    lines = []
    for row in rows:
        line = {"row": row.title, "seeds": 0}
        for kind in kinds:
            line |= _ap_columns(results, row, named, kind)
        line["seeds"] = len(values_of(results, row, kinds[0])) if row.seeds else "-"
        done = [results["cells"].get(f"{row.name}/{seed}") for seed in row.seeds or (0,)]
        gmacs = [cell["gmacs"] for cell in done if cell]
        line["GMACs"] = f"{statistics.fmean(gmacs):.2f}" if gmacs else "-"
        if step:
            own, whole = (cost / step for cost in costs.get(row.name, (0, 0)))
            line["training"] = f"{own:,.0f} ({whole:,.0f})" if row.name in costs else "-"
        lines.append(line)
    text = tabulate(lines, headers="keys", tablefmt="pipe", disable_numparse=True)
    head = f"## {definition['title']}\n\n"
    if "control" in named:
        head += f"Control: {named['control'].title}.\n\n"
    return head + text + "\n"


def baseline_step(grid, cells, results, definition):
    """Seconds of a step of a table's baseline; None if there is no such or it was not timed."""
    row = grid.rows.get(definition.get("baseline"))
    if row is None or not row.seeds:
        return None
    return median_seconds(results).get(cells[f"{row.name}/{row.seeds[0]}"].recipe)


def _ap_columns(results, row, named, kind):
    name, values = KINDS[kind], values_of(results, row, kind)
    if not values:
        return {f"{name} AP": "not run"}
    mean, deviation = mean_and_deviation(values.values())
    columns = {f"{name} AP": _spread(mean, deviation)}
    if "control" in named:
        same = row is named["control"]
        control = values_of(results, named["control"], kind)
        columns[f"{name}, against the control"] = "-" if same else _difference(values, control)
    if "baseline" in named and "reference" in named:
        ends = [values_of(results, named[key], kind) for key in ("baseline", "reference")]
        closed = None
        if all(ends):
            closed = gap_closed(mean, *(statistics.fmean(end.values()) for end in ends))
        columns[f"{name} gap"] = "-" if closed is None else f"{100 * closed:.0f} %"
    return columns


def markdown(grid, cells, results):
    """All tables, each with what its columns mean, and the machines."""
    parts, costs = [], training_costs(grid, cells, results)
    for definition in grid.tables:
        text = table(grid, cells, results, definition, costs)
        if text:
            parts.append(text)
            if "baseline" in definition and "reference" in definition:
                titles = {k: grid.rows[definition[k]].title for k in ("baseline", "reference")}
                parts.append(NOTES.format(**titles) + "\n")
    machines = dict.fromkeys(cell["machine"] for cell in results["cells"].values())
    data = ", ".join(f"{name} {value}" for name, value in grid.data.items())
    parts.append(f"Data: {data}.\nMachine: {'; '.join(machines)}.\n")
    return "\n".join(parts)


def write_cells(path, cells, results):
    """A line a cell: all metrics, cost and command."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        names = [f"{KINDS[kind]} {metric}" for kind in KINDS for metric in METRICS]
        writer.writerow(["row", "seed", *names, "GMACs", "params (M)", "iterations", "command"])
        for key, cell in cells.items():
            found = results["cells"].get(key)
            if found:
                aps = [found.get(kind, {}).get(metric) for kind in KINDS for metric in METRICS]
                cost = [found[name] for name in ("gmacs", "params_m", "iterations", "command")]
                writer.writerow([cell.row.name, cell.seed or "", *aps, *cost])


def draw_bars(path, grid, results, definition):
    """A bar a row with its mean, a dot a seed; a line where the control is."""
    from matplotlib.figure import Figure

    rows = [grid.rows[name] for name in definition["rows"]]
    rows = [row for row in rows if values_of(results, row, "bbox")][::-1]
    kinds = [kind for kind in KINDS if any(values_of(results, row, kind) for row in rows)]
    if not rows:
        return
    size = (4 + 3.5 * len(kinds), 1.2 + 0.28 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    for kind, axes in zip(kinds, figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]):
        for place, row in enumerate(rows):
            values = values_of(results, row, kind)
            if values:
                color = "tab:blue" if row.config != row.test_config else "lightsteelblue"
                axes.barh(place, statistics.fmean(values.values()), color=color, zorder=1)
                axes.scatter(values.values(), [place] * len(values), s=9, color="black", zorder=3)
        control = values_of(results, grid.rows[definition.get("control", rows[0].name)], kind)
        if control and "control" in definition:
            axes.axvline(statistics.fmean(control.values()), color="tab:red", lw=1, zorder=2)
        axes.set_yticks(range(len(rows)), [row.title for row in rows])
        axes.set_xlabel(f"{KINDS[kind]} AP")
    figure.suptitle(f"{definition['title']} (red: the control; dots: seeds)", fontsize="medium")
    figure.savefig(path, dpi=110)


def draw_curves(path, grid, cells, results, curve):
    """AP against iterations: each point is a training of that length, with its whole schedule."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for kind, axes in zip(KINDS, figure.subplots(1, 2)):
        for title, names in curve["lines"].items():
            points = []
            for name in names:
                row = grid.rows[name]
                values = values_of(results, row, kind)
                if values:
                    iterations = cells[f"{name}/{row.seeds[0]}"].iterations
                    points.append((iterations, values.values()))
            if points:
                x, each = zip(*sorted(points, key=lambda point: point[0]))
                means, low, high = zip(*((statistics.fmean(v), min(v), max(v)) for v in each))
                axes.plot(x, means, marker="o", label=title)
                axes.fill_between(x, low, high, alpha=0.2)
        for (title, name), style in zip(curve.get("levels", {}).items(), ("--", ":", "-.")):
            values = values_of(results, grid.rows[name], kind)
            if values:
                level = statistics.fmean(values.values())
                axes.axhline(level, ls=style, color="gray", label=title)
        axes.set_xscale("log")
        axes.set_xlabel("iterations")
        axes.set_ylabel(f"{KINDS[kind]} AP")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    figure.suptitle(curve["title"], fontsize="medium")
    figure.savefig(path, dpi=110)


def write(grid, cells, results, folder):
    """Writes tables.md, cells.csv and the pictures."""
    folder = Path(folder)
    (folder / "tables.md").write_text(markdown(grid, cells, results))
    write_cells(folder / "cells.csv", cells, results)
    for definition in grid.tables:
        draw_bars(folder / f"bars_{definition['name']}.png", grid, results, definition)
    for curve in grid.curves:
        draw_curves(folder / f"curves_{curve['name']}.png", grid, cells, results, curve)
