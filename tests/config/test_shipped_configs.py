"""The shipped configs: each builds and trains, and related ones differ only where they should."""

import functools

import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.modeling import META_ARCH_REGISTRY
from helpers import ROOT, coco_format, train
from shipped import FILES, NARROW, name_of, tiny_options

from msad_kd.config.build import build_config
from msad_kd.distill.student import check_losses
from msad_kd.distill.teacher_spec import TeacherSpec
from msad_kd.engine.trainer import KDTrainer
from msad_kd.utils.flat_config import flatten_config

STOCK = ("GeneralizedRCNN", "RetinaNet", "FCOS")

# These differ from a config that is tried in sizes and schedule alone, as a test below asserts.
VARIANTS = ("_3x.yaml", "_LR_multiscale_1x.yaml")
TRIED = [path for path in FILES if not path.name.endswith(VARIANTS) or "Swin" in path.name]
TRIED = [path for path in TRIED if not path.name.startswith("keypoint")]  # see test_real_coco.py
PROJECTS = sorted((ROOT / "projects").glob("*/configs/*/*.yaml"))
TRIED += [path for path in PROJECTS if "ladder" not in path.name]  # see test_mtpd.py for ladders


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """Configs name each other by paths from the repository's root."""
    monkeypatch.chdir(ROOT)


@functools.cache
def models():
    return {path: build_config(str(path), []) for path in FILES}


def without(cfg, *prefixes):
    return {k: v for k, v in flatten_config(cfg).items() if not k.startswith(prefixes)}


def seldom(paths):
    """Pytest's parameters for files, of which only the first of equal networks is no long test."""
    seen = set()
    other = ("SOLVER", "DATASETS", "INPUT", "TEST", "OUTPUT_DIR", "SEED", "KD.TEACHER.CONFIG_FILE")
    other += ("MODEL.WEIGHTS", "MODEL.PIXEL", "MODEL.ANCHOR_GENERATOR.SIZES", "KD.TEACHER.WEIGHTS")
    other += tuple(NARROW[::2])
    for path in paths:
        cfg = models().get(path) or build_config(str(path), [])
        network = repr((without(cfg, *other), bool(cfg.DATASETS.UNLABELED), cfg.INPUT.MIXUP))
        marks = [pytest.mark.long] * (network in seen)
        seen.add(network)
        yield pytest.param(path, marks=marks, id=name_of(path))


@pytest.mark.parametrize("path", [*seldom(TRIED)])
def test_a_step_and_a_prediction(path, data, tmp_path):
    names = ["DATASETS.COCO_FORMAT", coco_format(data, "tiny")]
    names += ["DATASETS.TRAIN", ("tiny_train",), "DATASETS.TEST", ()]
    if models().get(path) and models()[path].DATASETS.UNLABELED:
        names += ["DATASETS.UNLABELED", ("tiny_train",)]
    trainer = train(build_config(str(path), [*tiny_options(path, tmp_path), *names]))
    assert trainer.iter == 1
    inputs = next(iter(KDTrainer.build_test_loader(trainer.cfg, "tiny_val")))
    with torch.no_grad():
        (prediction,) = trainer.model.eval()(inputs)
    assert prediction["instances"].image_size == (inputs[0]["height"], inputs[0]["width"])


def test_every_student_equals_an_lr_baseline_but_for_the_distillation():
    students = {p: c for p, c in models().items() if "Distilled" in c.MODEL.META_ARCHITECTURE}
    assert len(students) >= 11
    differing = ("KD.", "OUTPUT_DIR", "MODEL.META_ARCHITECTURE", "MODEL.WEIGHTS")
    differing += ("MODEL.TIMM.PRETRAINED", "DATASETS.UNLABELED", "SOLVER.UNLABELED_PER_BATCH")
    for path, student in students.items():
        baselines = [
            without(cfg, *differing)
            for other, cfg in models().items()
            if other.parent == path.parent and cfg.MODEL.META_ARCHITECTURE in STOCK
        ]
        assert without(student, *differing) in baselines, path


def test_every_student_and_its_teacher_are_one_network():
    """Equal but for anchors of twice the size, on levels of twice the stride."""
    readers = ("RPN", "ROI_HEADS", "RETINANET", "FCOS")
    frame = ["WEIGHTS", "META_ARCHITECTURE", "BACKBONE.NAME", "ANCHOR_GENERATOR.SIZES"]
    frame += ["TIMM.PRETRAINED"]
    frame += ["MULTI_RESOLUTION", *(f"{part}.IN_FEATURES" for part in readers)]
    for path, cfg in models().items():
        if not cfg.KD.TEACHER.CONFIG_FILE:
            continue
        student, teacher = cfg.MODEL, build_config(cfg.KD.TEACHER.CONFIG_FILE, []).MODEL
        kind = student.META_ARCHITECTURE.removeprefix("Distilled")
        assert teacher.META_ARCHITECTURE == f"MultiResolution{kind}", path
        assert without(student, *frame) == without(teacher, *frame)
        if kind != "FCOS":  # which has no anchors
            sizes = [[cfg.KD.SCALE * s for s in sides] for sides in student.ANCHOR_GENERATOR.SIZES]
            assert teacher.ANCHOR_GENERATOR.SIZES == sizes
        shift = cfg.KD.SCALE.bit_length() - 1
        for part in readers[:2] if kind == "RCNN" else [kind.upper()]:
            levels = [f"p{int(level[1:]) + shift}" for level in student[part].IN_FEATURES]
            assert teacher[part].IN_FEATURES == levels


def test_coco_has_the_papers_sizes():
    for path, cfg in models().items():
        if path.parent.name != "COCO":
            continue
        high = "_HR_" in path.name or "_teacher_" in path.name
        coarse = high or "_LR_P3-P7_" in path.name
        sides = (32, 64, 128, 256, 512) if coarse else (16, 32, 64, 128, 256)
        if "rcnn" in path.name:
            assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == [[side] for side in sides]
        elif "retinanet" in path.name:
            three = [[side * 2 ** (i / 3) for i in range(3)] for side in sides]
            np.testing.assert_allclose(cfg.MODEL.ANCHOR_GENERATOR.SIZES, three, rtol=1e-15)
        else:
            assert cfg.MODEL.FCOS.IN_FEATURES == [f"p{s}" for s in range(2 + coarse, 7 + coarse)]
        sizes = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
        assert sizes == ((800, 1333) if high else (400, 667))
        trained = cfg.INPUT.MIN_SIZE_TRAIN
        if "multiscale" in path.name:
            assert (min(trained), max(trained), cfg.INPUT.MAX_SIZE_TRAIN) == (320, 800, 1333)
        else:
            factor = 2 if high else 1
            assert trained == tuple(factor * s for s in range(320, 401, 16))


def test_coco_has_every_recipe_of_every_detector():
    roles = ["teacher", "student", "HR", "LR", "LR_multiscale"]
    for detector in ("mask_rcnn", "faster_rcnn", "retinanet", "fcos", "keypoint_rcnn"):
        more = ["LR_P3-P7"] * (detector in ("retinanet", "fcos"))
        for role in roles[:4] if detector == "keypoint_rcnn" else roles + more:
            for schedule in ("1x", "3x"):
                path = ROOT / f"configs/COCO/{detector}_R_50_FPN_{role}_{schedule}.yaml"
                cfg = models()[path]
                assert cfg.OUTPUT_DIR == f"./output/coco/{path.stem}"
                assert cfg.MODEL.MASK_ON == (detector == "mask_rcnn")
                assert cfg.MODEL.KEYPOINT_ON == (detector == "keypoint_rcnn")
                assert cfg.SOLVER.REFERENCE_WORLD_SIZE > 0


@pytest.mark.parametrize("schedule", ["1x", "3x"])
def test_keypoint_rcnn_is_the_model_zoos(schedule):
    cfg, own = get_cfg(), ("OUTPUT_DIR", "SEED", "SOLVER.REFERENCE_WORLD_SIZE")
    cfg.merge_from_file(str(ROOT / f"configs/COCO/keypoint_rcnn_R_50_FPN_HR_{schedule}.yaml"))
    zoo = model_zoo.get_config(f"COCO-Keypoints/keypoint_rcnn_R_50_FPN_{schedule}.yaml")
    assert without(cfg, *own) == without(zoo, *own)


def test_the_variants_differ_only_in_schedule_and_sizes():
    for path, cfg in models().items():
        if path.name.endswith("_3x.yaml") and "Swin" not in path.name:  # a Swin has no 1x
            origin = models()[path.with_name(path.name.replace("_3x", "_1x"))]
            differing = ("SOLVER.STEPS", "SOLVER.MAX_ITER", "OUTPUT_DIR", "KD.TEACHER")
            assert cfg.SOLVER.MAX_ITER == 3 * origin.SOLVER.MAX_ITER
            assert cfg.KD.TEACHER.WEIGHTS == origin.KD.TEACHER.WEIGHTS.replace("_1x", "_3x")
            assert cfg.KD.TEACHER.CONFIG_FILE == origin.KD.TEACHER.CONFIG_FILE.replace("_1x", "_3x")
        elif "multiscale" in path.name:
            origin = models()[path.with_name(path.name.replace("_multiscale", ""))]
            differing = ("INPUT.MIN_SIZE_TRAIN", "INPUT.MAX_SIZE_TRAIN", "OUTPUT_DIR")
        else:
            continue
        assert without(cfg, *differing) == without(origin, *differing), path


# Batch, learning rate and iterations (thousands) of MSAD's released models.
RELEASED = {
    "0.75": {"teacher": (8, 0.01, 180), "student": (32, 0.02, 45)},
    "0.5": {"teacher": (8, 0.01, 180), "student": (32, 0.01, 45)},
    "0.25": {"teacher": (16, 0.01, 90), "student": (32, 0.02, 45)},
}


@pytest.mark.parametrize("width", RELEASED)
def test_narrow_students_have_the_papers_widths_and_schedules(width):
    def read(name, role):
        file = ROOT / f"configs/COCO/fcos_R_50_{name}FPN_{role}_1x.yaml"
        return build_config(str(file), ["SOLVER.REFERENCE_WORLD_SIZE", 0, "MODEL.DEVICE", "cpu"])

    for role in ("teacher", "student", "LR"):
        cfg, wide = read(f"x{width}_", role), read("", role)
        schedule = RELEASED[width].get(role, RELEASED[width]["student"])
        solver = cfg.SOLVER
        assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.MAX_ITER / 1000) == schedule
        assert solver.STEPS == (solver.MAX_ITER * 2 // 3, solver.MAX_ITER * 8 // 9)
        differing = ("SOLVER.", "OUTPUT_DIR", "KD.TEACHER", "MODEL.RESNETS", "MODEL.WEIGHTS")
        assert without(cfg, *differing) == without(wide, *differing)
        with torch.device("meta"):
            networks = [META_ARCH_REGISTRY.get(x.MODEL.META_ARCHITECTURE)(x) for x in (cfg, wide)]
        narrow, whole = (dict(x.backbone.bottom_up.named_parameters()) for x in networks)
        assert narrow.keys() == whole.keys()
        for name, weight in narrow.items():
            sides = [side if side == 3 else float(width) * side for side in whole[name].shape[:2]]
            assert list(weight.shape[:2]) == sides, name
        if role == "student":
            check_losses(cfg, TeacherSpec.from_config(cfg))


def test_cityscapes_has_its_own_sizes_and_classes():
    for role in ("teacher", "HR", "LR", "student"):
        cfg = models()[ROOT / f"configs/Cityscapes/mask_rcnn_R_50_FPN_{role}.yaml"]
        factor = 2 if role in ("HR", "teacher") else 1
        assert cfg.INPUT.MIN_SIZE_TRAIN == tuple(factor * s for s in range(400, 513, 16))
        assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (factor * 512, factor * 1024)
        assert cfg.DATASETS.TRAIN == ("cityscapes_fine_instance_seg_train",)
        assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 8


def test_stock_detectron2_reads_the_plain_configs():
    count = 0
    for path in FILES:
        # Stock Detectron2 has no FCOS that a config can build, and no Swin.
        stock = (
            path.name.startswith(("mask", "faster", "key", "retina")) and "Swin" not in path.name
        )
        if path.parent.name == "COCO" and stock and ("_LR_" in path.name or "_HR_" in path.name):
            cfg = get_cfg()
            cfg.merge_from_file(str(path))
            assert cfg.MODEL.META_ARCHITECTURE in STOCK
            count += 1
    assert count > 20
