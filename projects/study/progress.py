"""Reads how far a training is from the files that Detectron2 writes into its folder."""

import json


def stage_folders(folder):
    """Return the folders of a ladder's stages so far, or of another training its own folder."""
    return sorted(folder.glob("stage_*")) or [folder]


def last_metrics(folder, name="total_loss"):
    """Return the last line of metrics.json that has a metric, or {} if there is none yet."""
    path = folder / "metrics.json"
    for line in reversed(path.read_text().splitlines() if path.is_file() else []):
        # A line that is being written has no end yet.
        metrics = json.loads(line) if line.endswith("}") else {}
        if name in metrics:
            return metrics
    return {}


def iterations_done(folder):
    """Return the iterations that a training has logged, all stages of a ladder together."""
    logs = (last_metrics(stage) for stage in stage_folders(folder))
    return sum(log.get("iteration", -1) + 1 for log in logs)


def training_seconds(folder):
    """Return the time that a training's steps took, all stages of a ladder together."""
    logs = [last_metrics(stage, "time") for stage in stage_folders(folder)]
    return sum(log["time"] * (log["iteration"] + 1) for log in logs if log)


def gradient_ratio(folder):
    """Return the norm of the distillation losses' gradient relative to the detection losses'.

    It is the last (smoothed) value that a training or a ladder's last stage logged, or None.
    """
    return last_metrics(stage_folders(folder)[-1], "kd/gradient_ratio").get("kd/gradient_ratio")
