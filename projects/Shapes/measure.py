"""Measures trained models in a process of its own: accuracy, cost, pictures. `demo.py` runs it as

    python projects/Shapes/measure.py '{"task": "evaluate", "folder": ..., "rows": [...]}'

where a row has a `key` and what makes a model: `config` (a file), `options` (KEY VALUE pairs on top
of it) and `weights` (a checkpoint). The results go to `results.json` in the folder.
"""

import copy
import json
import math
import sys
import time
from pathlib import Path

if not __package__:  # run as a script, which does not put the repository on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts
from detectron2.utils.events import EventStorage
from detectron2.utils.logger import setup_logger

from msad_kd import KDTrainer
from msad_kd.checkpoint.files import write_json
from msad_kd.config.build import build_config
from msad_kd.config.stages import read_stages, stage_config
from msad_kd.data.mapper import build_mapper
from msad_kd.evaluation.cost import count_gmacs, device_name, input_sides, time_models
from msad_kd.utils.errors import InputError
from projects.Shapes import pictures

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
SMALL, MEDIUM = 32**2, 96**2  # COCO's bounds of the areas, in pixels
COST_IMAGES = 30
WARM_ROUNDS, ROUNDS = 3, 15


def load_model(row, folder):
    """The config and the model of a row; every key of the checkpoint has to fit.

    A student is loaded with the plain config of its baseline, so it is a stock model here.
    """
    cfg = build_config(row["config"], row["options"])
    cfg.defrost()
    cfg.OUTPUT_DIR = str(folder)
    cfg.freeze()
    return cfg, KDTrainer.load_model(cfg, row["weights"], f"the config '{row['config']}'")


def sizes_present(areas):
    """Which of APs, APm and APl there are objects for, by their areas in pixels."""
    present = set()
    for area in areas:
        present |= {"APs"} if area <= SMALL else set()
        present |= {"APm"} if SMALL <= area <= MEDIUM else set()
        present |= {"APl"} if area >= MEDIUM else set()
    return present


def tidy_metrics(metrics, present):
    """COCO's six metrics, without NaN: None for a size of which there is no object, and 0 where a
    model found nothing at all."""
    absent = {"APs", "APm", "APl"} - present
    return {
        name: None if name in absent else value if math.isfinite(value) else 0.0
        for name, value in ((name, float(metrics[name])) for name in METRICS)
    }


def cost_inputs(cfg):
    """The first images of the test set, mapped."""
    mapper = build_mapper(cfg, is_train=False)
    dicts = get_detection_dataset_dicts(cfg.DATASETS.TEST, filter_empty=False)
    return [mapper(copy.deepcopy(each)) for each in dicts[:COST_IMAGES]]


def evaluate(rows, folder):
    """AP of each row on the test set of its config, and what a test image costs it: its side, GMACs
    and the parameters. Written as soon as it is there."""
    results, present = {"rows": {}}, None
    for row in rows:
        cfg, model = load_model(row, folder / row["key"])
        if present is None:
            annotations = Path(MetadataCatalog.get(cfg.DATASETS.TEST[0]).json_file).read_text()
            present = sizes_present(a["area"] for a in json.loads(annotations)["annotations"])
            results["device"] = device_name(cfg)
        metrics = KDTrainer.test(cfg, model)
        inputs = cost_inputs(cfg)
        results["rows"][row["key"]] = {
            **{kind: tidy_metrics(found, present) for kind, found in metrics.items()},
            "side": input_sides(inputs[0], getattr(model, "test_branch", None)),
            "gmacs": count_gmacs(model, inputs),
            "params_m": sum(p.numel() for p in model.parameters()) / 1e6,
        }
        write_json(folder / "results.json", results)


def latency(rows, folder):
    """The latency of each row, in one process and on the same images.

    With all the models at hand it also draws the scenes as LR baseline and student see them.
    """
    configs, models = {}, {}
    for row in rows:
        configs[row["key"]], models[row["key"]] = load_model(row, folder)
    times = time_models(models, {key: cost_inputs(cfg) for key, cfg in configs.items()})
    columns = [
        (row["model"], models[row["key"]], build_mapper(configs[row["key"]], is_train=False))
        for row in rows
        if row["key"] in ("lr", "student")
    ]
    first = configs[rows[0]["key"]]
    data_set = first.DATASETS.TEST[0]
    dicts = get_detection_dataset_dicts(data_set, filter_empty=False)
    pictures.draw_scenes(folder / "scenes.png", dicts, columns, MetadataCatalog.get(data_set))
    results = {key: {"latency_ms": each} for key, each in times.items()}
    write_json(folder / "results.json", {"device": device_name(first), "rows": results})


def stage_configs(cfg):
    """The configs of a ladder's stages; of another training its own config. They start from nothing
    where the checkpoint they name is not there."""
    stages = read_stages(cfg.KD.LADDER.STAGES)
    configs = [stage_config(cfg, stages, index) for index in range(len(stages))] or [cfg]
    for own in configs:
        own.defrost()
        if not Path(own.MODEL.WEIGHTS).is_file():
            own.MODEL.WEIGHTS = ""
        own.KD.TEACHER.EVAL_BEFORE_TRAIN, own.DATASETS.TEST = False, ()
    return configs


def finished_clock():
    """The time at which all that was started is done, on a GPU, too."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def steps(rows, folder):
    """What trainings cost: the time of a step of each, in one process, all in turn.

    A row's `config` and `options` are those of an ordinary training. The results have the seconds
    of a step in each round; of a ladder, the mean of its stages, by their iterations.
    """
    trainers = {}
    for row in rows:
        configs = stage_configs(build_config(row["config"], row["options"]))
        total = sum(cfg.SOLVER.MAX_ITER for cfg in configs)
        trainers[row["key"]] = []
        for cfg in configs:
            cfg.OUTPUT_DIR = str(folder)
            trainer = KDTrainer(cfg)
            trainer.resume_or_load(resume=False)
            trainers[row["key"]].append((trainer, cfg.SOLVER.MAX_ITER / total))
    seconds = {key: [0.0] * ROUNDS for key in trainers}
    for iteration in range(-WARM_ROUNDS, ROUNDS):
        for key, stages in trainers.items():
            for trainer, share in stages:
                trainer.iter = iteration + WARM_ROUNDS
                with EventStorage(trainer.iter) as trainer.storage:
                    begin = finished_clock()
                    trainer.run_step()
                    if iteration >= 0:
                        seconds[key][iteration] += share * (finished_clock() - begin)
    write_json(folder / "results.json", {"device": device_name(cfg), "seconds": seconds})


def main():
    """Does the task that the first argument describes, as JSON; see `plan.measuring_job`."""
    task = json.loads(sys.argv[1])
    folder = Path(task.pop("folder"))
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("detectron2", "msad_kd"):
        setup_logger(str(folder), name=name)
    try:
        {"evaluate": evaluate, "latency": latency, "steps": steps}[task.pop("task")](
            folder=folder, **task
        )
    except InputError as error:
        sys.exit(f"measure.py: {error}")


if __name__ == "__main__":
    main()
