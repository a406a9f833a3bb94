"""Measures trained models in a process of its own: AP, cost and latency.

The runner starts `python -m projects.study.measure TASK FOLDER`. FOLDER/task.json has the models by
key: `config`, `options` (KEY VALUE pairs on top) and `weights`. The results go to results.json.
"""

import argparse
import json
import math
import platform
import re
from importlib import metadata
from pathlib import Path

from detectron2.data import get_detection_dataset_dicts
from detectron2.utils.logger import setup_logger

from msad_kd import KDTrainer
from msad_kd.checkpoint.files import write_json
from msad_kd.config.build import build_config
from msad_kd.data.classes import align_classes, with_classes_of
from msad_kd.data.mapper import build_mapper
from msad_kd.evaluation import cost
from projects.study.jobs import count_cores
from projects.study.reports import METRICS
from projects.study.scenes import draw_scenes

COST_IMAGES = 30


def load(model, folder, detections=None):
    """Return the config of a model and the model; a student is a stock model here.

    With a number of `detections`, every image has as many, to measure costs; see `fix_detections`.
    """
    cfg = build_config(model["config"], [*model["options"], "OUTPUT_DIR", str(folder)])
    cfg = cost.fix_detections(cfg, detections) if detections else cfg
    return cfg, KDTrainer.load_model(cfg, model["weights"], f"the config '{model['config']}'")


def tidy_metrics(metrics):
    """Return COCO's metrics without NaN: None for sizes that do not occur, 0 if none is found."""
    metrics = {name: float(metrics.get(name, "nan")) for name in METRICS}  # keypoints: no APs
    absent = 0.0 if math.isnan(metrics["AP"]) else None
    return {name: value if math.isfinite(value) else absent for name, value in metrics.items()}


def cost_inputs(cfg):
    """Return the first test images, mapped."""
    mapper = build_mapper(cfg, is_train=False)
    dicts = get_detection_dataset_dicts(cfg.DATASETS.TEST, filter_empty=False)
    return [mapper(each) for each in dicts[:COST_IMAGES]]


def measure_cost(cfg, model):
    """Return image side, GMACs at the config's number of detections, and parameters."""
    inputs = cost_inputs(cfg)
    return {
        "side": cost.input_sides(inputs[0], getattr(model, "test_branch", None)),
        "gmacs": cost.count_gmacs(model, inputs),
        "detections": cfg.TEST.DETECTIONS_PER_IMAGE,
        "params_m": sum(p.numel() for p in model.parameters()) / 1e6,
    }


def evaluate(models, detections, folder):
    """Return AP on the test set of its config, and cost, of each model.

    AP is with test-time augmentation where TEST.AUG is enabled. Costs are of one pass without it.
    """
    results = {}
    for key, each in models.items():
        cfg, model = load(each, folder)
        augmented = cfg.TEST.AUG.ENABLED
        metrics = (KDTrainer.test_with_TTA if augmented else KDTrainer.test)(cfg, model)
        metrics = {kind.removesuffix("_TTA"): found for kind, found in metrics.items()}
        results[key] = {kind: tidy_metrics(found) for kind, found in metrics.items()}
        results[key] |= measure_cost(*load(each, folder, detections))
    return {"machine": machine(cost.device_name(cfg)), "models": results}


def compare(models, detections, folder, scenes):
    """Return cost and latency of models, in turn on the same images, and draw what they detect.

    `scenes` has the title of each column of the picture and the key of its model.
    """
    loaded = {key: load(each, folder, detections) for key, each in models.items()}
    results = {key: measure_cost(*pair) for key, pair in loaded.items()}
    inputs = {key: cost_inputs(cfg) for key, (cfg, _) in loaded.items()}
    times = cost.time_models({key: model for key, (_, model) in loaded.items()}, inputs)
    for key, latency in times.items():
        results[key]["latency_ms"] = latency
    columns = []
    for title, key in scenes.items():
        cfg, model = load(models[key], folder)
        columns.append((f"{title} ({results[key]['side']} px)", model, build_mapper(cfg, False)))
    cfg, model = next(iter(loaded.values()))
    if columns:
        # The ground truth, too, has the model's order of the classes.
        align_classes(with_classes_of(cfg, model), cfg.DATASETS.TEST)
        draw_scenes(folder / "scenes.png", cfg.DATASETS.TEST[0], columns)
    return {"machine": machine(cost.device_name(cfg)), "detections": detections, "models": results}


def machine(device):
    """Return the machine and the versions that results depend on, in one line."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    versions = [f"{name} {metadata.version(name)}" for name in ("torch", "detectron2")]
    parts = [model[1] if model else platform.machine(), f"{count_cores()} cores", device]
    return ", ".join([*parts, f"Python {platform.python_version()}", *versions])


def main(arguments=None):
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tasks = {"evaluate": evaluate, "compare": compare}
    parser.add_argument("task", choices=tasks)
    parser.add_argument("folder", type=Path, help="holds task.json; gets logs and results.json")
    args = parser.parse_args(arguments)
    for name in ("detectron2", "msad_kd"):
        setup_logger(str(args.folder), name=name)
    task = json.loads((args.folder / "task.json").read_text())
    write_json(args.folder / "results.json", tasks[args.task](folder=args.folder, **task))


if __name__ == "__main__":
    main()
