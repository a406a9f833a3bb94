"""What suggest_ladder.py found: printed, and as JSON, heat map and YAML."""

from dataclasses import asdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import yaml
from tabulate import tabulate

from msad_kd.checkpoint.files import write_json
from msad_kd.ladder.adaptation_cost import Cost

METHOD = "MTPD-style: backward greedy selection on 1 - R^2 of an affine map of features, held out"


def report(
    output: Path,
    costs: dict[str, dict[str, Cost]],
    order: list[str],
    excluded: dict[str, str],
    stages: list[dict],
    facts: dict,
) -> None:
    """Print all of it, and write ladder.json, ladder.png and stages.yaml.

    Args:
        output: the folder.
        costs: ``costs[a][b]`` is C(a->b).
        order: the teachers, in the order to learn from.
        excluded: the others, with the reason.
        stages: KD.LADDER.STAGES.
        facts: what else belongs in the JSON: images, strides, AP, ...
    """
    print(f"\nC(row->column), in brackets its 95 % interval over images; {METHOD}\n")
    rows = [
        [a, *(f"{c.value:.4f} ({c.low:.4f}-{c.high:.4f})" for c in row.values())]
        for a, row in costs.items()
    ]
    print(tabulate(rows, headers=["", *costs], tablefmt="github"))
    aps = ", ".join(f"{name} {ap:.1f}" for name, ap in facts["ap"].items())
    print(f"\nBox AP: {aps or 'of no consequence, there being one teacher'}")
    print(f"Order, {METHOD.split(':')[0]}: student -> {' -> '.join(order)}")
    for name, reason in excluded.items():
        print(f"Left out: {name}, {reason}")
    block = stages_block(stages)
    print(f"\n{block}")
    (output / "stages.yaml").write_text(block)
    contents = {
        "method": METHOD,
        **facts,
        "costs": {a: {b: asdict(c) for b, c in row.items()} for a, row in costs.items()},
        "order": order,
        "excluded": excluded,
        "stages": stages,
    }
    write_json(output / "ladder.json", contents)
    heat_map(costs, output / "ladder.png")


def stages_block(stages: list[dict]) -> str:
    """KD.LADDER.STAGES, to be pasted into the student's config."""
    text = yaml.safe_dump(
        {"KD": {"LADDER": {"STAGES": stages}}}, sort_keys=False, default_flow_style=None, width=96
    )
    return f"# {METHOD}.\n{text}"


def heat_map(costs: dict[str, dict[str, Cost]], file: Path) -> None:
    """Draw the costs, the source on the vertical axis."""
    names = list(costs)
    values = [[costs[a][b].value for b in names] for a in names]
    side = 2 + 0.9 * len(names)
    figure, axes = plt.subplots(figsize=(side + 1, side), layout="constrained")
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=max(1e-9, *map(max, values)))
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("to B")
    axes.set_ylabel("from A")
    axes.set_title("Adaptation cost C(A->B)")
    middle = image.norm.vmax / 2
    for row, a in enumerate(names):
        for column, b in enumerate(names):
            cost = costs[a][b]
            text = f"{cost.value:.3f}\n{cost.low:.3f}-{cost.high:.3f}"
            colour = "white" if cost.value < middle else "black"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=7)
    figure.colorbar(image, label="1 - R^2")
    figure.savefig(file, dpi=120)
    plt.close(figure)
