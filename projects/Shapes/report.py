"""What the demo says: the comparison with recorded results, the table, the gap closed."""

import platform
from importlib import metadata
from pathlib import Path

from tabulate import tabulate

from projects.Shapes.jobs import DemoError, clock, count_cores

TOLERANCE = 0.2
KINDS = {"bbox": "box", "segm": "mask"}
STARTS = ("lr", "lr-from-teacher")  # both without distillation; the second starts as the student
HEADINGS = (
    "model",
    "test side (px)",
    "box AP",
    "mask AP",
    "APs",
    "APm",
    "APl",
    "GMACs",
    "params (M)",
    "latency (ms)",
)
NOTES = (
    "APs, APm, APl: box AP of objects below 32x32, up to 96x96 and above 96x96 pixels; '-': none "
    "occurs. GMACs: multiply-adds of the whole model, heads included, mean over images. Latency: "
    "one image, from resized pixels to detections, median (quartiles), {threads}, all models in "
    "turn on the same images. The student is measured as the stock model it is, by the config of "
    "its baseline."
)


def verify(name, weights, measured, recorded):
    """Compares what a checkpoint gives here with what was recorded when it was made.

    Args:
        name: of the model, for people.
        weights: the file.
        measured, recorded: {"bbox": {"AP": ...}, "segm": {"AP": ...}}.

    Returns:
        the sentence that tells the outcome.

    Raises:
        DemoError: an AP differs by more than `TOLERANCE`.
    """
    both = {kind: (measured[kind]["AP"], recorded[kind]["AP"]) for kind in KINDS}
    for kind, (here, there) in both.items():
        if not abs(here - there) <= TOLERANCE:
            raise DemoError(
                f"{name} has {KINDS[kind]} AP {here:.1f} here, but {there:.1f} was recorded beside "
                f"'{weights}', so the file, the data (--val), a setting (--set) or the installation"
                " is not what it was: restore it, or train all with `make demo-full`"
            )
    values = ", ".join(f"{KINDS[kind]} AP {here:.1f}" for kind, (here, _) in both.items())
    return f"{name}: {values}, as recorded (within {TOLERANCE})"


def gap_closed(student, baseline, high):
    """(student - baseline) / (high - baseline); None where high does not exceed baseline."""
    if high <= baseline:
        return None
    return (student - baseline) / (high - baseline)


def close_gaps(rows):
    """The gap closed in box and mask AP, from the table's rows, by the row where it begins."""
    by_key = {row["key"]: row for row in rows}
    return {
        start: {
            kind: gap_closed(*(by_key[key][kind]["AP"] for key in ("student", start, "hr")))
            for kind in KINDS.values()
        }
        for start in STARTS
    }


def _number(value, digits=1):
    return "-" if value is None else f"{value:.{digits}f}"


def _cells(row):
    latency = row["latency_ms"]
    return [
        row["model"],
        row["side"],
        _number(row["box"]["AP"]),
        _number(row["mask"]["AP"]),
        *(_number(row["box"][name]) for name in ("APs", "APm", "APl")),
        _number(row["gmacs"], 2),
        _number(row["params_m"], 2),
        f"{latency['median']:.0f} ({latency['low']:.0f}-{latency['high']:.0f})",
    ]


def table(rows):
    """The rows as a Markdown table.

    Args:
        rows: dicts as in `table.json`.
    """
    align = ["left", *["right"] * (len(HEADINGS) - 1)]
    return tabulate(
        [_cells(row) for row in rows],
        headers=HEADINGS,
        tablefmt="pipe",
        colalign=align,
        disable_numparse=True,
    )


def gap_sentence(start, closed):
    """What share of a gap the student has closed, in words.

    Args:
        start: the name of the model where the gap begins.
        closed: "box" and "mask" to a fraction or None.
    """
    told = f"Gap closed, (student - {start}) / (stock HR - {start}): "
    if None in closed.values():
        return f"{told}cannot be told, for stock HR is not above {start}."
    shares = ", ".join(f"{kind} AP {100 * share:.0f} %" for kind, share in closed.items())
    return f"{told}{shares}."


def recipe_sentence(names, run):
    """In what the trainings differ, in words.

    Args:
        names: of the models, by key.
        run: that of `table.json`.
    """
    told = []
    for key, rate in run["learning_rate"].items():
        sides = "/".join(map(str, run["train_sides"][key]))
        told.append(f"{names[key]} {rate:g}, {sides} px")
    return f"Learning rate and training images: {'; '.join(told)}."


def markdown(summary):
    """The content of `table.md`, from that of `table.json`."""
    run, gaps = summary["run"], summary["gap_closed"]
    names = {row["key"]: row["model"] for row in summary["rows"]}
    gpu = run["device"] != "no GPU"
    threads = f"on {run['device']}" if gpu else "one CPU thread"
    lines = [
        table(summary["rows"]),
        "",
        "  \n".join(gap_sentence(names[key], closed) for key, closed in gaps.items()),
        "",
        NOTES.format(threads=threads),
        "",
        "LR baseline, LR from the teacher, student: "
        f"{run['iterations']} iterations of {run['batch_size']} images, "
        f"seed {run['seed']}, the same order of the data; "
        + ("HR and teacher trained, too." if run["full"] else "HR and teacher from checkpoints."),
        recipe_sentence(names, run),
        "Data: " + ", ".join(f"{name} {value}" for name, value in run["data"].items()) + ".",
        f"Machine: {run['machine']}. Total time {clock(run['seconds'])}.",
    ]
    return "\n".join(lines) + "\n"


def machine(device):
    """The machine and the versions that results depend on, in one line.

    Args:
        device: the GPU's name, or "no GPU".
    """
    versions = []
    for package in ("torch", "detectron2"):
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{package} of unknown version")
    cores = count_cores()
    return ", ".join(
        [_cpu_model(), f"{cores} core{'s' * (cores != 1)}", device]
        + [f"Python {platform.python_version()}", *versions]
    )


def _cpu_model():
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
