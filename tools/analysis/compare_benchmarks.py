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

from benchmark_report import PARTS, draw_bars, medians, ratio
from tabulate import tabulate

from msad_kd.checkpoint.files import replacing
from msad_kd.utils.errors import InputError, in_one_sentence


def read_results(pairs):
    """Return the results of LABEL=FILE arguments, by label."""
    results = {}
    for pair in pairs:
        label, found, path = pair.rpartition("=")
        if label in results:
            raise InputError(f"two runs have the label '{label}'")
        try:
            results[label] = json.loads(Path(path).read_text())
            results[label]["rounds"]["student"], results[label]["memory"]["student"]
        except (OSError, ValueError, KeyError, TypeError):
            found = ""
        if not found:
            raise InputError(f"'{pair}' is no LABEL=FILE of a benchmark.json")
    return results


def lr_step(result):
    """Return the median seconds of a plain step at low resolution."""
    return median(sum(x[part] for part in PARTS) for x in result["rounds"]["LR"])


def _rounded(number):
    return f"{number:.1f}" if number >= 1 else f"{number:.2g}"


def table(results):
    """Return a line for each run, as Markdown: steps, ratios and the memory of a student's step."""
    lines = []
    for label, result in results.items():
        rounds, memory = result["rounds"], result["memory"]
        ratios = [ratio(rounds, name, "LR") for name in ("plain teacher", "student")]
        gigabytes = [
            _rounded(sum(memory[name].values()) / 2**30) if name in memory else "-"
            for name in ("LR", "HR", "student")
        ]
        time = f"{_rounded(lr_step(result))} s"
        lines.append([label, f"{time} ({result['clock']})", *ratios, *gigabytes])
    headings = ["", "LR step", "plain teacher: step / LR step", "default: step / LR step"]
    headings += [f"{name}, GiB" for name in ("LR", "HR", "student")]
    return tabulate(lines, headings, "pipe", disable_numparse=True)


def draw(results, path):
    """Draw the parts of each run's student step, in LR steps."""
    bars = {}
    for label, result in results.items():
        parts = medians(result["rounds"]["student"])
        bars[label] = {part: time / lr_step(result) for part, time in parts.items()}
    draw_bars(bars, "student's step, in LR steps", path)


def main(arguments=None):
    """Run the command line; an expected error ends it with one sentence."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="+", metavar="LABEL=FILE", help="a run's benchmark.json")
    parser.add_argument("--output", type=Path, default=Path("output/growth"), help="folder")
    args = parser.parse_args(arguments)
    with in_one_sentence(parser.prog):
        results = read_results(args.results)
        text = table(results)
        with replacing(args.output / "growth.md") as part:
            part.write_text(text + "\n")
        with replacing(args.output / "growth.png") as part:
            draw(results, part)
    print(text)


if __name__ == "__main__":
    main()
