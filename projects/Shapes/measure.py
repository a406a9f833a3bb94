"""Measures trained models in a process of its own: accuracy, cost, pictures. `demo.py` runs it as

    python projects/Shapes/measure.py '{"task": "evaluate", "folder": ..., "rows": [...]}'

where a row has a `key` and what makes a model: `config` (a file), `options` (KEY VALUE pairs on top
of it) and `weights` (a checkpoint). The results go to `results.json` in the folder.
"""

import copy
import json
import math
import os
import sys
from pathlib import Path

if not __package__:  # run as a script, which does not put the repository on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from detectron2.data import MetadataCatalog, get_detection_dataset_dicts
from detectron2.utils.logger import setup_logger

from msad_kd import KDTrainer
from msad_kd.checkpoint import load_strictly
from msad_kd.cost import count_gmacs, device_name, input_sides, time_models
from msad_kd.errors import InputError
from msad_kd.setup import build_config
from msad_kd.trainer import build_mapper
from projects.Shapes import pictures

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
SMALL, MEDIUM = 32**2, 96**2  # COCO's bounds of the areas, in pixels
COST_IMAGES = 30


def load_model(row, folder):
    """The config and the model of a row; every key of the checkpoint has to fit.

    A student is loaded with the plain config of its baseline, so it is a stock model here.
    """
    cfg = build_config(row["config"], row["options"])
    cfg.defrost()
    cfg.OUTPUT_DIR = str(folder)
    cfg.freeze()
    model = KDTrainer.build_model(cfg)
    load_strictly(model, row["weights"], f"the config '{row['config']}'")
    return cfg, model.eval()


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


def write_json(path, content):
    """Writes a file that is never seen half written."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(part, path)


def evaluate(rows, folder):
    """Box and mask AP of each row on the test set of its config, written as soon as it is there."""
    results, present = {"rows": {}}, None
    for row in rows:
        cfg, model = load_model(row, folder / row["key"])
        if present is None:
            annotations = Path(MetadataCatalog.get(cfg.DATASETS.TEST[0]).json_file).read_text()
            present = sizes_present(a["area"] for a in json.loads(annotations)["annotations"])
            results["device"] = device_name(cfg)
        metrics = KDTrainer.test(cfg, model)
        results["rows"][row["key"]] = {
            kind: tidy_metrics(metrics[kind], present) for kind in ("bbox", "segm")
        }
        write_json(folder / "results.json", results)


def cost(rows, folder):
    """GMACs, parameters and latency of each row, in one process and on the same images.

    With all the models at hand it also draws the scenes as the last two rows' models see them.
    """
    configs, models, inputs = {}, {}, {}
    for row in rows:
        configs[row["key"]], models[row["key"]] = load_model(row, folder)
    data_set = configs[rows[0]["key"]].DATASETS.TEST[0]
    dicts = get_detection_dataset_dicts(data_set, filter_empty=False)
    for key, cfg in configs.items():
        mapper = build_mapper(cfg, is_train=False)
        inputs[key] = [mapper(copy.deepcopy(each)) for each in dicts[:COST_IMAGES]]
    latency = time_models(models, inputs)
    results = {}
    for key, model in models.items():
        branch = getattr(model, "test_branch", None)
        results[key] = {
            "side": input_sides(inputs[key][0], branch),
            "gmacs": count_gmacs(model, inputs[key]),
            "params_m": sum(p.numel() for p in model.parameters()) / 1e6,
            "latency_ms": latency[key],
        }
    columns = [
        (row["model"], models[row["key"]], build_mapper(configs[row["key"]], is_train=False))
        for row in rows[-2:]
    ]
    pictures.draw_scenes(folder / "scenes.png", dicts, columns, MetadataCatalog.get(data_set))
    device = device_name(configs[rows[0]["key"]])
    write_json(folder / "results.json", {"device": device, "rows": results})


def main():
    task = json.loads(sys.argv[1])
    folder = Path(task.pop("folder"))
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("detectron2", "msad_kd"):
        setup_logger(str(folder), name=name)
    try:
        {"evaluate": evaluate, "cost": cost}[task.pop("task")](folder=folder, **task)
    except InputError as error:
        sys.exit(f"measure.py: {error}")


if __name__ == "__main__":
    main()
