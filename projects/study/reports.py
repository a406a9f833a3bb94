"""Tables, cells.csv and pictures, made from the results of a study's cells."""

import pandas as pd

from msad_kd.checkpoint.files import replacing, write_json
from projects.study import pictures

KINDS = {"bbox": "box", "segm": "mask", "keypoints": "keypoint"}
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
FACTS = {"gmacs": "GMACs", "detections": "detections", "params_m": "params (M)"}
FACTS |= {"iterations": "iterations", "training_seconds": "training (s)"}
FACTS |= {"total_seconds": "total (s)", "gradient_ratio": "KD gradient", "command": "command"}
NOTES = """AP: mean ± standard deviation over the seeds. Against the control: the mean of the \
differences of equal seeds ± their standard deviation, and how many of them are positive; for \
checkpoints and teachers, the difference of the means. KD gradient: the norm of the distillation \
losses' gradient relative to the detection losses', at the last layer of the backbone's bottom-up \
path. Training: its duration, in steps of the table's baseline; in parentheses together with the \
training of the checkpoints that it uses.

Machine: {}.
"""
COMPARISON_NOTES = """
GMACs (multiply-adds, heads included) and latency: of one image, {} detections in every model. \
Latency: from the resized image to the detections, median (quartiles), all models in turn on the \
same images. Machine: {}.
"""


def frame(cells, results):
    """Return the cells that are done as a DataFrame, one line each, in the grid's order."""
    found = {kind for result in results["cells"].values() for kind in result}
    aps = [(kind, metric) for kind in KINDS if kind in found for metric in METRICS]
    columns = ["row", "seed", *(f"{KINDS[kind]} {metric}" for kind, metric in aps), *FACTS.values()]
    lines = []
    for key, cell in cells.items():
        if result := results["cells"].get(key):
            values = [result.get(kind, {}).get(metric) for kind, metric in aps]
            lines.append([cell.row.name, cell.seed, *values, *map(result.get, FACTS)])
    return pd.DataFrame(lines, columns=columns)


def of_row(data, row, column, seeds=()):
    """Return a column of a row's cells by seed; seed 0, of a checkpoint, is in every selection."""
    lines = data[(data["row"] == row) & (data["seed"].isin([0, *seeds]) if seeds else True)]
    return lines.set_index("seed")[column].dropna().astype(float)


def spread(values, sign=""):
    """Format the mean of values, with their standard deviation if there are several."""
    deviation = f" ± {values.std():.1f}" if len(values) > 1 else ""
    return f"{values.mean():{sign}.1f}{deviation}"


def unpaired(grid):
    """Return the names of rows that are not compared seed by seed: checkpoints and teachers."""
    used = {name for row in grid.rows.values() if row.trained for name in row.references()}
    names = {name for name, row in grid.rows.items() if not row.seeds}
    names |= {name for name in used if len(grid.rows[name].seeds) == 1}

    def is_unpaired(name):
        source = grid.rows[name].checkpoint_of
        return name in names or bool(source) and is_unpaired(source)

    return {name for name in grid.rows if is_unpaired(name)}


def differences(grid, data, table, row, kind):
    """Return a row's AP less the control's: a series by seed, or of one number without a name."""
    values, control = (of_row(data, r, f"{kind} AP", table.seeds) for r in (row, table.control))
    seeds = [{*grid.rows[name].seeds} for name in (row, table.control)]
    if {row, table.control} & unpaired(grid) or seeds[0].isdisjoint(seeds[1]):
        return pd.Series([values.mean() - control.mean()]).dropna()
    return (values - control).dropna().rename("by seed")


def kinds_of(data, rows):
    """Return which of "box", "mask" and "keypoint" AP was measured for rows."""
    aps = data[data["row"].isin(rows)].dropna(axis="columns", how="all")
    return [kind for kind in KINDS.values() if f"{kind} AP" in aps]


def table_text(grid, data, table):
    """Return a table of the grid as Markdown."""
    lines = []
    step, length = (of_row(data, table.baseline, c).mean() for c in ("training (s)", "iterations"))
    step = step / length
    for row in map(grid.rows.get, table.rows):
        kinds = kinds_of(data, table.rows)
        aps = {kind: of_row(data, row.name, f"{kind} AP", table.seeds) for kind in kinds}
        count = max(map(len, aps.values()))
        # A model without masks has no AP of these.
        missing = "-" if count else "not run"
        line = {"row": f"`{row.name}`", "model": row.title, "seeds": count if row.seeds else "-"}
        for kind, values in aps.items():
            line[f"{kind} AP"] = spread(values) if len(values) else missing
            if table.control:
                gains = differences(grid, data, table, row.name, kind)
                text = spread(gains, "+") if len(gains) and row.name != table.control else "-"
                if gains.name and text != "-":
                    text += f" ({(gains > 0).sum()}/{len(gains)})"
                line[f"{kind}, against the control"] = text
        facts = ("KD gradient", "training (s)", "total (s)")
        ratio, own, total = (of_row(data, row.name, x, table.seeds).mean() for x in facts)
        line["KD gradient"] = f"{ratio:.2f}"
        line["training"] = f"{own / step:,.0f} ({total / step:,.0f})".replace(" (nan)", "")
        lines.append(line)
    lines = pd.DataFrame(lines).replace("nan", "-")
    lines = lines.loc[:, (lines != "-").any()]
    head = f"Control: {grid.rows[table.control].title}.\n\n" if table.control else ""
    return f"## {table.title}\n\n{head}{lines.to_markdown(index=False, disable_numparse=True)}\n\n"


def write(grid, cells, results, folder):
    """Write tables.md, cells.csv and the pictures of the grid's tables and curves."""
    data = frame(cells, results)
    folder.mkdir(parents=True, exist_ok=True)
    data.replace({"seed": {0: None}}).to_csv(folder / "cells.csv", index=False)
    machines = dict.fromkeys(result["machine"] for result in results["cells"].values())
    text = ""
    for table in (table for table in grid.tables if kinds_of(data, table.rows)):
        text += table_text(grid, data, table)
        if table.picture:
            rows = [grid.rows[name] for name in table.rows if name != table.control]
            gains = {
                kind: {row.title: differences(grid, data, table, row.name, kind) for row in rows}
                for kind in kinds_of(data, table.rows)
            }
            figure = pictures.draw_differences(table.title, grid.rows[table.control].title, gains)
            _save(figure, folder / f"bars_{table.name}.png")
    (folder / "tables.md").write_text(text + NOTES.format("; ".join(machines)))
    for curve in grid.curves:
        panels = []
        for kind in (f"{kind} AP" for kind in kinds_of(data, grid.rows)):
            lines = {label: {} for label in curve.lines}
            for label, name in ((label, n) for label, names in curve.lines.items() for n in names):
                if len(aps := of_row(data, name, kind, curve.seeds)):
                    lines[label][of_row(data, name, "iterations").max()] = aps
            levels = {}
            for label, name in curve.levels.items():
                aps = of_row(data, name, kind, curve.seeds)  # a teacher may have other seeds
                levels[label] = (aps if len(aps) else of_row(data, name, kind)).mean()
            panels.append((kind, lines, levels))
        if panels:
            _save(pictures.draw_curves(curve.title, panels), folder / f"curves_{curve.name}.png")


def _save(figure, path):
    with replacing(path) as part:
        figure.savefig(part, dpi=100, format="png")


def write_comparison(folder, lines, measured):
    """Write table.md, table.json, scenes.png and ap_cost.png of a comparison; return table.md.

    `lines` has title, AP, cost and latency of each model, `measured` what measure.py says.
    """
    kinds = {kind: name for kind, name in KINDS.items() if all(kind in line for line in lines)}
    table = []
    for line in lines:
        times = line["latency_ms"]
        aps = {f"{name} AP": f"{line[kind]['AP']:.1f}" for kind, name in kinds.items()}
        cells = {"model": line["title"], "test side (px)": line["side"], **aps}
        cells |= {"GMACs": f"{line['gmacs']:.3f}", "params (M)": f"{line['params_m']:.2f}"}
        cells["latency (ms)"] = f"{times['median']:.0f} ({times['low']:.0f}-{times['high']:.0f})"
        table.append(cells)
    text = pd.DataFrame(table).to_markdown(index=False, disable_numparse=True) + "\n"
    text += COMPARISON_NOTES.format(measured["detections"], measured["machine"])
    (folder / "table.md").write_text(text)
    write_json(folder / "table.json", {**measured, "models": lines})
    _save(pictures.draw_ap_cost(lines, kinds, measured["detections"]), folder / "ap_cost.png")
    if (folder / "comparison" / "scenes.png").is_file():
        (folder / "comparison" / "scenes.png").replace(folder / "scenes.png")
    return text
