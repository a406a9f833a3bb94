"""Report the measurements of tools/benchmark.py as tables and a picture."""

from statistics import median

from matplotlib.figure import Figure
from tabulate import tabulate

PARTS = ("mapper", "student forward", "teacher", "losses", "backward", "optimizer")


def ratio(rounds, one, other, parts=PARTS):
    """Return median, least and greatest ratio of two sides within a round, as text."""
    pairs = zip(rounds[one], rounds[other])
    return spread([sum(a[p] for p in parts) / sum(b[p] for p in parts) for a, b in pairs])


def spread(values):
    """Return median, least and greatest of some numbers as text."""
    return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def bound(result):
    """Return what the teacher computes, how fast, and what a faster one could gain at most.

    No convolution of the teacher is taken to be faster than a plain product of fp32 matrices.
    """
    rounds, ideal, steps = result["rounds"], [], []
    pairs = zip(result["teacher_gflop"], result["product_gflops"])
    seconds = [gflop / speed for gflop, speed in pairs]
    for time, student, lr in zip(seconds, rounds["student"], rounds["LR"]):
        ideal.append(time / student["teacher"])
        steps.append((sum(student.values()) - student["teacher"] + time) / sum(lr.values()))
    return (
        f"teacher: {median(result['teacher_gflop']):.3g} GFLOP at {spread(ideal)} of the speed of "
        f"a plain product of matrices; at its full speed, the next ratio would be {spread(steps)}"
    )


def markdown(result):
    """Return tables of the steps and of inference; the last line is the student's ratio."""
    rounds, rows = result["rounds"], []
    for name, entries in rounds.items():
        times = [1000 * median(x[part] for x in entries) for part in PARTS]
        step = 1000 * median(sum(x[part] for part in PARTS) for x in entries)
        memory = [result["memory"][name][x] / 2**20 for x in ("held", "step")]
        numbers = [f"{number:.0f}" for number in (*times, step, *memory)]
        rows.append([name, *numbers, ratio(rounds, name, "LR")])
    headings = ["ms", *PARTS, "step", "held (MiB)", "peak (MiB)", "step / LR step"]
    sides = ", ".join(f"{n}: {x} px" for n, x in zip(rounds, result["image_sizes"]))
    versus = ["vs:", result["vs"]] if result["vs"] else []
    lines = [
        " ".join(map(str, (result["config"], *result["options"], *versus))),
        "",
        f"{result['machine']}. {sides}; batch {result['batch']}. {result['clock']}, medians and "
        f"(least-greatest) of {len(rounds['LR'])} rounds. Held: weights of student and teacher, "
        "and the optimizer's state. Peak: what a step takes on top, at the most."
        + "".join(f" Left out: {key}." for key in result["left_out"]),
        "",
        tabulate(rows, headings, "pipe", disable_numparse=True),
        "",
    ]
    for count, latency in result["latency_ms"].items():
        for name, x in latency.items():
            time = f"{x['median']:.0f} ms ({x['low']:.0f}-{x['high']:.0f})"
            lines.append(f"inference of {name}, batch {count}: {time}, wall time and quartiles")
    if "HR" in rounds:
        lines.append(f"student mapper / HR mapper: {ratio(rounds, 'student', 'HR', ['mapper'])}")
    teachers = ratio(rounds, "student", "plain teacher", ["teacher"])
    lines.append(f"teacher / plain teacher: {teachers}")
    if result["fp32_on_cpu"]:  # a GPU computes convolutions in TF32
        lines.append(bound(result))
    lines.append(f"student step / LR step: {ratio(rounds, 'student', 'LR')}")
    return "\n".join(lines)


def medians(entries):
    """Return the median seconds of each part over rounds."""
    return {part: median(x[part] for x in entries) for part in PARTS}


def draw_bars(bars, label, file):
    """Draw stacked bars to a PNG file: ``bars`` has the width of each part by the bar's name."""
    figure = Figure(figsize=(7, 0.5 * len(bars) + 1.5))
    axes = figure.subplots()
    left = dict.fromkeys(bars, 0.0)
    for part in PARTS:
        widths = [parts[part] for parts in bars.values()]
        axes.barh(list(left), widths, left=list(left.values()), label=part)
        left = {name: start + width for (name, start), width in zip(left.items(), widths)}
    axes.set_xlabel(label)
    axes.invert_yaxis()
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.savefig(file, bbox_inches="tight", dpi=120, format="png")


def draw(result, file):
    """Draw the parts of each side's step."""
    bars = {name: medians(entries) for name, entries in result["rounds"].items()}
    draw_bars(bars, f"seconds a step ({result['clock']})", file)
