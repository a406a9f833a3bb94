"""The study's tables, and all of its files but results.json."""

import csv
import statistics
from pathlib import Path

from tabulate import tabulate

from msad_kd.checkpoint.files import replacing
from projects.Shapes.costs import median_seconds, training_costs
from projects.Shapes.measure import METRICS
from projects.Shapes.report import KINDS, gap_closed
from projects.Shapes.study_pictures import draw_bars, draw_curves
from projects.Shapes.study_values import (
    cells_of,
    difference,
    mean_and_deviation,
    unpaired_rows,
    values_of,
    with_deviation,
)

FILES = ("tables.md", "cells.csv", "bars_*.png", "curves_*.png")
GAP = (
    "Gap: (row - {baseline}) / ({reference} - {baseline}), of the means over the row's seeds; '-' "
    "where {reference} is not above {baseline}.\n"
)
NOTES = (
    "AP: mean ± standard deviation over the seeds. Against the control: mean of the differences of "
    "equal seeds ± their standard deviation, and how many of them are positive; the difference of "
    "the means, alone, for a checkpoint, the reference and what was trained once for other rows. "
    "GMACs: multiply-adds of a test image, heads included.\n"
)
GRADIENT = (
    "KD gradient: the norm of the distillation losses' gradient as a share of the detection "
    "losses', at the last layer of the backbone's bottom-up path; mean over the seeds.\n"
)
TRAINING = (
    "Training: its cost in steps of the table's baseline, by the measured time of a step; in "
    "parentheses together with what made the checkpoints it starts or learns from.\n"
)


def table(grid, cells, results, definition, costs):
    """A table of study.yaml as Markdown; None as long as none of its cells is done.

    Args:
        costs: from `training_costs`.
    """
    rows = [grid.rows[name] for name in definition["rows"]]
    seeds = definition.get("seeds")
    kinds = [k for k in KINDS if any(values_of(results, row, k, seeds) for row in rows)]
    if not kinds:
        return None
    step = baseline_step(grid, cells, results, definition)
    lines = []
    for row in rows:
        line = {"row": f"`{row.name}`", "model": row.title, "seeds": 0}
        for kind in kinds:
            line |= _ap_columns(grid, results, row, definition, kind)
        line["seeds"] = len(values_of(results, row, kinds[0], seeds)) if row.seeds else "-"
        done = cells_of(results, row, seeds).values()
        line["GMACs"] = _mean(cell["gmacs"] for cell in done)
        ratios = [cell.get("gradient_ratio") for cell in done]
        line["KD gradient"] = _mean(ratio for ratio in ratios if ratio is not None)
        if step:
            own, whole = (cost / step for cost in costs.get(row.name, (0, 0)))
            line["training"] = f"{own:,.0f} ({whole:,.0f})" if row.name in costs else "-"
        lines.append(line)
    if all(line["KD gradient"] == "-" for line in lines):
        for line in lines:
            del line["KD gradient"]
    text = tabulate(lines, headers="keys", tablefmt="pipe", disable_numparse=True)
    head = f"## {definition['title']}\n\n"
    if "control" in definition:
        head += f"Control: {grid.rows[definition['control']].title}.\n\n"
    return head + text + "\n"


def _mean(values):
    values = list(values)
    return f"{statistics.fmean(values):.2f}" if values else "-"


def baseline_step(grid, cells, results, definition):
    """Seconds of a step of a table's baseline; None if there is no such or it was not timed."""
    row = grid.rows.get(definition.get("baseline"))
    if row is None or not row.seeds:
        return None
    return median_seconds(results).get(cells[f"{row.name}/{row.seeds[0]}"].recipe)


def _ap_columns(grid, results, row, definition, kind):
    def values(name):
        return values_of(results, grid.rows[name], kind, definition.get("seeds"))

    name, own, control = KINDS[kind], values(row.name), definition.get("control")
    if not own:
        return {f"{name} AP": "not run"}
    mean, deviation = mean_and_deviation(own.values())
    columns = {f"{name} AP": with_deviation(mean, deviation)}
    if control:
        paired = row.name not in unpaired_rows(grid, definition)
        paired = paired and bool(grid.rows[control].seeds)
        against = difference(own, values(control), paired) if row.name != control else "-"
        columns[f"{name}, against the control"] = against
    if "baseline" in definition and "reference" in definition:
        ends = [_of_seeds(values(definition[key]), own) for key in ("baseline", "reference")]
        closed = gap_closed(mean, *map(statistics.fmean, ends)) if all(ends) else None
        columns[f"{name} gap"] = "-" if closed is None else f"{100 * closed:.0f} %"
    return columns


def _of_seeds(values, own):
    """Values of the seeds that a row has, or all of them where it has none of these."""
    return [values[seed] for seed in values if seed in own] or list(values.values())


def markdown(grid, cells, results):
    """All tables, what their columns mean, and the machines."""
    parts, costs = [], training_costs(grid, cells, results)
    for definition in grid.tables:
        text = table(grid, cells, results, definition, costs)
        if text:
            parts.append(text)
            if "baseline" in definition and "reference" in definition:
                titles = {k: grid.rows[definition[k]].title for k in ("baseline", "reference")}
                parts.append(GAP.format(**titles))
    parts += [NOTES] if parts else []
    if any("KD gradient" in text for text in parts):
        parts.append(GRADIENT)
    if any(baseline_step(grid, cells, results, definition) for definition in grid.tables):
        parts.append(TRAINING)
    machines = dict.fromkeys(cell["machine"] for cell in results["cells"].values())
    data = f"Data: {_told(grid.data)}.\n"
    if any(cells[key].row.fresh for key in results["cells"]):
        data += f"Fresh scenes: the same, but for {_told(grid.fresh)}.\n"
    parts.append(f"{data}Machine: {'; '.join(machines)}.\n")
    return "\n".join(parts)


def _told(arguments):
    return ", ".join(f"{name} {value}" for name, value in arguments.items())


def write_cells(path, cells, results):
    """A line a cell: all metrics, cost and command."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        names = [f"{KINDS[kind]} {metric}" for kind in KINDS for metric in METRICS]
        head = ["GMACs", "params (M)", "iterations", "KD gradient", "command"]
        writer.writerow(["row", "seed", *names, *head])
        for key, cell in cells.items():
            found = results["cells"].get(key)
            if found:
                aps = [found.get(kind, {}).get(metric) for kind in KINDS for metric in METRICS]
                cost = [found[name] for name in ("gmacs", "params_m", "iterations")]
                told = [found.get("gradient_ratio"), found["command"]]
                writer.writerow([cell.row.name, cell.seed or "", *aps, *cost, *told])


def write(grid, cells, results, folder):
    """Writes tables.md, cells.csv and the pictures."""
    folder = Path(folder)
    (folder / "tables.md").write_text(markdown(grid, cells, results))
    write_cells(folder / "cells.csv", cells, results)
    pictures = {
        **{f"bars_{each['name']}": draw_bars(grid, results, each) for each in grid.tables},
        **{f"curves_{c['name']}": draw_curves(grid, cells, results, c) for c in grid.curves},
    }
    for name, figure in pictures.items():
        if figure:
            with replacing(folder / f"{name}.png") as part:
                figure.savefig(part, dpi=110, format="png")
        else:  # an earlier one is of other rows
            (folder / f"{name}.png").unlink(missing_ok=True)
