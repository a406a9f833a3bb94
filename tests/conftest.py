"""Fixtures: a tiny data set, tiny configs of every role, a tiny teacher that was trained."""

import os
import sys
from pathlib import Path

import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detectron2.data import DatasetMapper, get_detection_dataset_dicts  # noqa: E402
from helpers import (  # noqa: E402
    BASES,
    SCENE_SIZE,
    TEST_SCENES,
    TRAIN_SCENES,
    WARMUP,
    coco_format,
    input_sizes,
    tiny_model,
    train,
)

from msad_kd import TwoResolutionMapper  # noqa: E402
from msad_kd.setup import build_config  # noqa: E402
from projects.Shapes.generate import generate  # noqa: E402
from projects.Shapes.jobs import Screen  # noqa: E402

# More threads only get in each other's way in models this small.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The folder of a COCO-format data set: annotations/instances_*.json, train/ and val/."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    counts = {"train": TRAIN_SCENES, "val": TEST_SCENES}
    generate(folder, size=SCENE_SIZE, max_shapes=6, progress=False, **counts)
    return folder


@pytest.fixture(scope="session")
def config_files(data, tmp_path_factory):
    """Role to config file: "lr", "hr", "teacher" and "student", which names no checkpoint yet."""
    folder = tmp_path_factory.mktemp("configs")
    common = {
        "DATASETS": {
            "TRAIN": ["tiny_train"],
            "TEST": ["tiny_val"],
            "COCO_FORMAT": coco_format(data, "tiny"),
        },
        "DATALOADER": {"NUM_WORKERS": 0},
        "SOLVER": {
            "OPTIMIZER": "ADAMW",
            "BASE_LR": 0.001,
            "WARMUP_ITERS": 2,
            "STEPS": [],
            "IMS_PER_BATCH": 2,
            "REFERENCE_WORLD_SIZE": 0,
            "MAX_ITER": 4,
            "CHECKPOINT_PERIOD": 100,
        },
        "TEST": {"DETECTIONS_PER_IMAGE": 20},
        "SEED": 3,
    }
    low = {**common, "INPUT": input_sizes(32), "MODEL": tiny_model(4, 8, 16, 32, 64)}
    high = {**common, "INPUT": input_sizes(64), "MODEL": tiny_model(8, 16, 32, 64, 128)}
    contents = {
        "lr": {"_BASE_": str(BASES["LR"]), **low},
        "hr": {"_BASE_": str(BASES["HR"]), **high},
        "teacher": {"_BASE_": str(BASES["Teacher"]), **high},
        "student": {
            "_BASE_": "lr.yaml",
            "MODEL": {"META_ARCHITECTURE": "DistilledRCNN"},
            "KD": {
                "LOSSES": [{"name": "l1", "weight": 0.6, "warmup_iters": WARMUP}],
                "TEACHER": {
                    "CONFIG_FILE": str(folder / "teacher.yaml"),
                    "EVAL_BEFORE_TRAIN": False,
                },
            },
        },
    }
    for role, content in contents.items():
        (folder / f"{role}.yaml").write_text(yaml.safe_dump(content))
    return {role: folder / f"{role}.yaml" for role in contents}


@pytest.fixture
def config(config_files, tmp_path):
    """config(role, KEY, VALUE, ...): a fresh config with an empty OUTPUT_DIR of its own."""
    made = []

    def make(role, *opts):
        output = tmp_path / f"{role}_{len(made)}"
        made.append(output)
        return build_config(str(config_files[role]), ["OUTPUT_DIR", str(output), *opts])

    return make


@pytest.fixture(scope="session")
def teacher_weights(config_files, tmp_path_factory):
    """The checkpoint of a teacher that was trained for a few steps."""
    folder = tmp_path_factory.mktemp("teacher")
    options = ["OUTPUT_DIR", str(folder), "DATASETS.TEST", []]
    train(build_config(str(config_files["teacher"]), options))
    return folder / "model_final.pth"


@pytest.fixture
def student_config(config, teacher_weights):
    """student_config(KEY, VALUE, ...): the config of a student of the trained teacher."""

    def make(*opts):
        return config("student", "KD.TEACHER.WEIGHTS", str(teacher_weights), *opts)

    return make


@pytest.fixture
def batch():
    """batch(cfg, frame): mapped data of the first images; frame None: by the stock mapper."""

    def make(cfg, frame=None, count=2, is_train=True):
        if frame is None:
            mapper = DatasetMapper(cfg, is_train)
        else:
            mapper = TwoResolutionMapper(cfg, is_train, frame=frame)
        names = cfg.DATASETS.TRAIN if is_train else cfg.DATASETS.TEST
        return [mapper(entry) for entry in get_detection_dataset_dicts(names)[:count]]

    return make


@pytest.fixture
def screen():
    """The demo's display, writing to nowhere."""
    with open(os.devnull, "w") as nowhere:
        yield Screen(nowhere)
