"""Reads how far a training is from the files that Detectron2 writes into its folder."""

import contextlib
import json


def stage_folders(folder):
    """Return the folders of a ladder's stages so far, or of another training its own folder."""
    return sorted(folder.glob("stage_*")) or [folder]


def read_metrics(folder, name="total_loss"):
    """Yield the lines of metrics.json that have a metric, the last one first."""
    path = folder / "metrics.json"
    for line in reversed(path.read_text().splitlines() if path.is_file() else []):
        # A line that is being written, or that a full disk cut, is no JSON.
        with contextlib.suppress(ValueError):
            if name in (metrics := json.loads(line)):
                yield metrics


def last_metrics(folder, name="total_loss"):
    """Return the last line of metrics.json that has a metric, or {} if there is none yet."""
    return next(read_metrics(folder, name), {})


def iterations_done(folder):
    """Return the iterations that a training has logged, all stages of a ladder together."""
    logs = (last_metrics(stage) for stage in stage_folders(folder))
    return sum(log.get("iteration", -1) + 1 for log in logs)


def training_seconds(folder):
    """Return the time that a training's steps took, all stages of a ladder together."""
    seconds = 0
    for stage in stage_folders(folder):
        # Each line has the median of the steps since the one before. Steps that were done again
        # after a stop count once.
        times = {x["iteration"]: x["time"] for x in reversed([*read_metrics(stage, "time")])}
        steps = sorted(times)
        seconds += sum((b - a) * times[b] for a, b in zip([-1, *steps], steps))
    return seconds


def gradient_ratio(folder):
    """Return the norm of the distillation losses' gradient relative to the detection losses'.

    It is the last (smoothed) value that a training or a ladder's last stage logged, or None.
    """
    return last_metrics(stage_folders(folder)[-1], "kd/gradient_ratio").get("kd/gradient_ratio")
