"""How far runs are, told from what they write into their folders."""

import json
import re

import yaml

from projects.Shapes.jobs import clock


def read_settings(folder):
    """The config of a run, as Detectron2 wrote it into its folder; {} if it is not there yet."""
    try:
        return yaml.safe_load((folder / "config.yaml").read_text()) or {}
    except (OSError, yaml.YAMLError):
        return {}


def _last_metrics(folder, name="total_loss"):
    """The last line of metrics.json that has a metric, by default the loss, so a training step's;
    {} if there is none yet."""
    try:
        lines = (folder / "metrics.json").read_text().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            metrics = json.loads(line)
        except ValueError:  # being written
            continue
        if name in metrics:
            return metrics
    return {}


def training_progress(folder):
    """Iteration, loss and time left of a run of `train_net.py`, or of the last stage of a ladder;
    empty before the 20th iteration."""
    stages = sorted(folder.glob("stage_*"))
    run = stages[-1] if stages else folder
    metrics = _last_metrics(run)
    if not metrics:
        return ""
    total = read_settings(run).get("SOLVER", {}).get("MAX_ITER", "?")
    left = clock(metrics.get("eta_seconds", 0))
    stage = f"stage {len(stages)}, " if stages else ""
    done = metrics["iteration"] + 1
    return f"{stage}{done}/{total}, loss {metrics['total_loss']:.2f}, {left} left"


def gradient_ratio(folder):
    """What a run, or the last stage of a ladder, told last of its distillation's gradient as a
    share of the detection losses', by Detectron2's smoothing the median of the last 20 times that
    it was measured; None if it did not.
    """
    run = [folder, *sorted(folder.glob("stage_*"))][-1]
    return _last_metrics(run, "kd/gradient_ratio").get("kd/gradient_ratio")


def iterations_done(folder, since):
    """Iterations that a run has behind it, all stages of a ladder together.

    Args:
        since: when it was started last, in seconds since the epoch. What it told before that counts
            up to its last checkpoint, from which it goes on.
    """
    runs = sorted(folder.glob("stage_*")) or [folder]
    return sum(_iterations_of_run(run, since) for run in runs)


def _iterations_of_run(run, since):
    told = _last_metrics(run).get("iteration", -1) + 1
    try:
        if (run / "metrics.json").stat().st_mtime >= since:
            return told
        checkpoint = (run / "last_checkpoint").read_text().strip()
    except OSError:  # not begun, or stopped before its first checkpoint
        return 0
    number = re.fullmatch(r"model_(\d+)\.pth", checkpoint)
    return int(number[1]) + 1 if number else told  # model_final.pth: all of it


def evaluation_progress(folder, models=1):
    """Images seen by a run of `measure.py evaluate` that has to evaluate `models` models."""
    try:
        log = (folder / "log.txt").read_text()
    except OSError:
        return ""
    begun = log.split("Start inference on")
    images = re.findall(r"Inference done (\d+/\d+)", begun[-1])
    if len(begun) == 1 or not images:
        return ""
    return f"{images[-1]} images" + (f", model {len(begun) - 1} of {models}" if models > 1 else "")
