#!/usr/bin/env python
"""Compare runs of tools/benchmark.py: how a step's cost grows, as a table and a picture.

    python tools/analysis/compare_benchmarks.py --output output/growth \
        "batch 1=output/b1/benchmark.json" "batch 2=output/b2/benchmark.json"

It writes growth.md and growth.png. Memory is that of the training process: what the models and the
optimizer hold, and what a step takes on top.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for benchmark_report

from benchmark_report import PARTS, plt, ratio
from tabulate import tabulate

from msad_kd import InputError
from msad_kd.checkpoint.files import replacing


def read_results(pairs):
    """Return the results of LABEL=FILE arguments, by label."""
    results = {}
    for pair in pairs:
        label, found, path = pair.rpartition("=")
        try:
            results[label] = json.loads(Path(path).read_text())
            results[label]["rounds"]["student"], results[label]["memory"]["student"]
        except (OSError, ValueError, KeyError, TypeError):
            found = ""
        if not found:
            raise InputError(f"'{pair}' is no LABEL=FILE of a benchmark.json")
    return results


def table(results):
    """Return a line for each run, as Markdown: steps, ratios and the memory of a student's step."""
    lines = []
    for label, result in results.items():
        rounds, memory = result["rounds"], result["memory"]
        lr = median(sum(x[part] for part in PARTS) for x in rounds["LR"])
        ratios = [ratio(rounds, name, "LR") for name in ("plain teacher", "student")]
        gigabytes = [
            f"{sum(memory[name].values()) / 2**30:.1f}" if name in memory else "-"
            for name in ("LR", "HR", "student")
        ]
        lines.append([label, f"{lr:.1f} s", *ratios, *gigabytes])
    headings = ["", "LR step", "plain teacher: step / LR step", "default: step / LR step"]
    headings += [f"{name}, GiB" for name in ("LR", "HR", "student")]
    return tabulate(lines, headings, "pipe", disable_numparse=True)


def draw(results, path):
    """Draw the parts of each run's student step, relative to its LR step, as stacked bars."""
    figure, axes = plt.subplots(figsize=(7, 0.45 * len(results) + 1.5))
    left = dict.fromkeys(results, 0.0)
    for part in PARTS:
        widths = []
        for result in results.values():
            lr = median(sum(x[p] for p in PARTS) for x in result["rounds"]["LR"])
            widths.append(median(x[part] for x in result["rounds"]["student"]) / lr)
        axes.barh(list(left), widths, left=list(left.values()), label=part)
        left = {name: start + width for (name, start), width in zip(left.items(), widths)}
    axes.axvline(1, color="black", lw=0.8)
    axes.set_xlabel("student's step, in LR steps")
    axes.invert_yaxis()
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.savefig(path, bbox_inches="tight", dpi=120, format="png")
    plt.close(figure)


def main(arguments=None):
    """Run the command line; an expected error ends it with one sentence."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="+", metavar="LABEL=FILE", help="a run's benchmark.json")
    parser.add_argument("--output", type=Path, default=Path("output/growth"), help="folder")
    args = parser.parse_args(arguments)
    try:
        results = read_results(args.results)
    except InputError as error:
        parser.error(str(error))
    args.output.mkdir(parents=True, exist_ok=True)
    text = table(results)
    with replacing(args.output / "growth.md") as part:
        part.write_text(text + "\n")
    with replacing(args.output / "growth.png") as part:
        draw(results, part)
    print(text)


if __name__ == "__main__":
    main()
