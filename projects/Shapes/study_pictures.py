"""The study's pictures: bars of a table's rows, curves of AP against iterations."""

import statistics

from matplotlib.figure import Figure

from projects.Shapes.report import KINDS
from projects.Shapes.study_values import values_of


def draw_bars(grid, results, definition):
    """A bar a row with its mean, a dot a seed; a line where the control is.

    Returns:
        a Figure; None as long as none of the table's cells is done.
    """
    seeds = definition.get("seeds")
    rows = [grid.rows[name] for name in definition["rows"]]
    rows = [row for row in rows if values_of(results, row, "bbox", seeds)][::-1]
    if not rows:
        return None
    kinds = [kind for kind in KINDS if any(values_of(results, row, kind, seeds) for row in rows)]
    size = (4 + 3.5 * len(kinds), 1.2 + 0.28 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    for kind, axes in zip(kinds, figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]):
        for place, row in enumerate(rows):
            values = values_of(results, row, kind, seeds)
            if values:
                color = "tab:blue" if row.config != row.test_config else "lightsteelblue"
                bar = axes.barh(place, statistics.fmean(values.values()), color=color, zorder=1)
                clear = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
                axes.bar_label(bar, fmt="%.1f", padding=6, fontsize="small", bbox=clear)
                axes.scatter(values.values(), [place] * len(values), s=9, color="black", zorder=3)
        if "control" in definition:
            control = values_of(results, grid.rows[definition["control"]], kind, seeds)
            if control:
                axes.axvline(statistics.fmean(control.values()), color="tab:red", lw=1, zorder=2)
        axes.set_yticks(range(len(rows)), [row.title for row in rows])
        axes.margins(x=0.12)  # for the numbers
        axes.set_xlabel(f"{KINDS[kind]} AP")
    figure.suptitle(f"{definition['title']} (red: the control; dots: seeds)", fontsize="medium")
    return figure


def draw_curves(grid, cells, results, curve):
    """AP against iterations: each point is a training of that length, with its whole schedule.

    Returns:
        a Figure; None as long as none of its points is done.
    """
    seeds = curve.get("seeds")
    lengths = {
        cells[f"{name}/{grid.rows[name].seeds[0]}"].iterations
        for names in curve["lines"].values()
        for name in names
        if values_of(results, grid.rows[name], "bbox", seeds)
    }
    if not lengths:
        return None
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for kind, axes in zip(KINDS, figure.subplots(1, 2)):
        for title, names in curve["lines"].items():
            points = []
            for name in names:
                row = grid.rows[name]
                values = values_of(results, row, kind, seeds)
                if values:
                    iterations = cells[f"{name}/{row.seeds[0]}"].iterations
                    points.append((iterations, values.values()))
            if points:
                x, each = zip(*sorted(points, key=lambda point: point[0]))
                means, low, high = zip(*((statistics.fmean(v), min(v), max(v)) for v in each))
                axes.plot(x, means, marker="o", label=title)
                axes.fill_between(x, low, high, alpha=0.2)
        for (title, name), style in zip(curve.get("levels", {}).items(), ("--", ":", "-.")):
            values = values_of(results, grid.rows[name], kind, seeds)
            if values:
                level = statistics.fmean(values.values())
                axes.axhline(level, ls=style, color="gray", label=title)
        axes.set_xscale("log")
        axes.set_xticks(sorted(lengths), [f"{length:,}" for length in sorted(lengths)])
        axes.minorticks_off()
        axes.set_xlabel("iterations")
        axes.set_ylabel(f"{KINDS[kind]} AP")
    lines = figure.axes[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=4, fontsize="small")
    figure.suptitle(curve["title"], fontsize="medium")
    return figure
