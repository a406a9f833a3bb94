"""Fixtures: a tiny data set, tiny configs of every role, a tiny teacher that was trained."""

import copy
import functools
import logging
import os

import pytest
import torch
from detectors import write_configs
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    get_detection_dataset_dicts,
)
from detectron2.utils.logger import setup_logger
from helpers import NO_TEST, SCENE_SIZE, TEST_SCENES, TRAIN_SCENES, train

from msad_kd import TwoResolutionMapper
from msad_kd.config.build import build_config
from projects.Shapes.generate import generate

# More threads only get in each other's way in models this small.
torch.set_num_threads(1)
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a process that was forked cannot train on a GPU

# Otherwise a trainer of Detectron2 sets it up, in a way that caplog misses what it says.
logging.getLogger("detectron2").setLevel(logging.INFO)
LOGGERS = [
    (logger, logger.handlers[:], logger.propagate, logger.level)
    for logger in map(logging.getLogger, ("detectron2", "fvcore", "msad_kd"))
]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The folder of a COCO-format data set: annotations/instances_*.json, train/ and val/."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    counts = {"train": TRAIN_SCENES, "val": TEST_SCENES}
    generate(folder, size=SCENE_SIZE, max_shapes=6, progress=False, **counts)
    return folder


@pytest.fixture(autouse=True)
def catalogs(monkeypatch):
    """Give every test copies of Detectron2's catalogs, so that what it registers is forgotten."""
    monkeypatch.setattr(DatasetCatalog, "data", dict(DatasetCatalog.data))
    metadata = {name: copy.copy(values) for name, values in MetadataCatalog.data.items()}
    monkeypatch.setattr(MetadataCatalog, "data", metadata)


@pytest.fixture(autouse=True)
def logs():
    """Undo what commands of earlier tests did to logging: they would write to closed files."""
    logging.raiseExceptions = True  # train_net.py turns it off
    for logger, handlers, propagate, level in LOGGERS:
        logger.handlers[:] = handlers
        logger.propagate = propagate
        logger.setLevel(level)
    setup_logger.cache_clear()


@pytest.fixture(scope="session")
def files_of(data, tmp_path_factory):
    """files_of(detector): its config files, role to file: "lr", "hr", "teacher" and "student"."""
    return functools.cache(
        lambda detector: write_configs(tmp_path_factory.mktemp(detector), data, detector)
    )


@pytest.fixture(scope="session")
def config_files(files_of):
    """Those of Mask R-CNN."""
    return files_of("mask_rcnn")


@pytest.fixture
def detector(request):
    """Mask R-CNN, or what a test is parametrized with; the fixtures below are the detector's."""
    return getattr(request, "param", "mask_rcnn")


@pytest.fixture
def config(files_of, detector, tmp_path):
    """config(role, KEY, VALUE, ...): a fresh config with an empty OUTPUT_DIR of its own."""
    made = []

    def make(role, *opts):
        output = tmp_path / f"{role}_{len(made)}"
        made.append(output)
        return build_config(str(files_of(detector)[role]), ["OUTPUT_DIR", str(output), *opts])

    return make


@pytest.fixture(scope="session")
def trained_teacher(files_of, tmp_path_factory):
    """trained_teacher(detector): the checkpoint of a teacher that was trained for a few steps."""

    @functools.cache
    def weights(detector):
        folder = tmp_path_factory.mktemp(f"{detector}_teacher")
        torch.manual_seed(0)
        options = ["OUTPUT_DIR", str(folder), *NO_TEST]
        train(build_config(str(files_of(detector)["teacher"]), options))
        return folder / "model_final.pth"

    return weights


@pytest.fixture(scope="session")
def teacher_weights(trained_teacher):
    """That of Mask R-CNN."""
    return trained_teacher("mask_rcnn")


@pytest.fixture
def student_config(config, detector, trained_teacher):
    """student_config(KEY, VALUE, ...): the config of a student of the trained teacher."""

    def make(*opts):
        return config("student", "KD.TEACHER.WEIGHTS", str(trained_teacher(detector)), *opts)

    return make


@pytest.fixture
def batch():
    """batch(cfg, frame): mapped data of the first images; frame None: by the stock mapper."""

    def make(cfg, frame=None, count=2, is_train=True):
        stock = DatasetMapper(cfg, is_train)
        mapper = TwoResolutionMapper(cfg, is_train, frame=frame) if frame else stock
        names = cfg.DATASETS.TRAIN if is_train else cfg.DATASETS.TEST
        return [mapper(entry) for entry in get_detection_dataset_dicts(names)[:count]]

    return make


@pytest.fixture
def files_read(monkeypatch):
    """The config files that are read during the test, in order."""
    files, merge = [], CfgNode.merge_from_file

    def record(self, file, *args, **keywords):
        files.append(str(file))
        return merge(self, file, *args, **keywords)

    monkeypatch.setattr(CfgNode, "merge_from_file", record)
    return files
