"""The results of suggest_ladder.py: printed, and written as JSON, YAML and a heat map."""

from dataclasses import asdict
from pathlib import Path

import yaml
from adaptation_cost import Cost
from matplotlib.figure import Figure
from tabulate import tabulate

from msad_kd.checkpoint.files import write_json

METHOD = "MTPD-style: backward greedy selection by held-out 1 - R^2 of an affine map of features"


def report(
    output: Path,
    costs: dict[str, dict[str, Cost]],
    order: list[str],
    excluded: dict[str, str],
    stages: list[dict],
    facts: dict,
) -> None:
    """Print the results, and write ladder.json, ladder.png and stages.yaml.

    Args:
        output: the folder.
        costs: ``costs[a][b]`` is C(a->b).
        order: the teachers, first to last.
        excluded: the other teachers, and why they are left out.
        stages: KD.LADDER.STAGES.
        facts: what else goes into the JSON: images, strides, ap, ...
    """
    print(f"\nC(row->column), with its 95 % interval over images; {METHOD}\n")
    rows = [
        [a, *(f"{c.value:.4f} ({c.low:.4f}-{c.high:.4f})" for c in row.values())]
        for a, row in costs.items()
    ]
    print(tabulate(rows, headers=["", *costs], tablefmt="github"))
    aps = ", ".join(f"{name} {ap:.1f}" for name, ap in facts["ap"].items())
    print(f"\nBox AP: {aps or 'not needed for one teacher'}")
    print(f"Order, MTPD-style: student -> {' -> '.join(order)}")
    for name, reason in excluded.items():
        print(f"Left out: {name}, {reason}")
    block = {"KD": {"LADDER": {"STAGES": stages}}}
    text = yaml.safe_dump(block, sort_keys=False, default_flow_style=None, width=96)
    text = f"# {METHOD}.\n{text}"
    print(f"\n{text}")
    (output / "stages.yaml").write_text(text)
    results = {"costs": {a: {b: asdict(c) for b, c in row.items()} for a, row in costs.items()}}
    results |= {"order": order, "excluded": excluded, "stages": stages}
    write_json(output / "ladder.json", {"method": METHOD, **facts, **results})
    _draw_heat_map(costs, output / "ladder.png")


def _draw_heat_map(costs: dict[str, dict[str, Cost]], file: Path) -> None:
    names = list(costs)
    values = [[costs[a][b].value for b in names] for a in names]
    side = 2 + 0.9 * len(names)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=max(1e-9, *map(max, values)))
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="to B", ylabel="from A", title="Adaptation cost C(A->B)")
    for row, a in enumerate(names):
        for column, b in enumerate(names):
            cost = costs[a][b]
            text = f"{cost.value:.3f}\n{cost.low:.3f}-{cost.high:.3f}"
            colour = "white" if cost.value < image.norm.vmax / 2 else "black"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=7)
    figure.colorbar(image, label="1 - R^2")
    figure.savefig(file, dpi=120)
