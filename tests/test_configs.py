"""The configs that come with the project: each builds and trains, and pairs that belong together
differ in nothing else."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from helpers import ROOT, TINY_NET, coco_format, flattened, train

from msad_kd.setup import build_config
from msad_kd.trainer import KDTrainer

FILES = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if not p.name.startswith("Base"))
IDS = [str(path.relative_to(ROOT / "configs")) for path in FILES]
NARROW = [item for pair in flattened(TINY_NET, "MODEL.").items() for item in pair]
# As many as the tiny data set has; a head of another width would make no difference.
NARROW += ["MODEL.ROI_HEADS.NUM_CLASSES", 8]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """Configs name each other by paths from the repository's root."""
    monkeypatch.chdir(ROOT)


def shrunk(cfg):
    """INPUT keys for images of about 50 to 100 px."""
    by = 8 if cfg.INPUT.MIN_SIZE_TEST >= 400 else 2
    keys = ["INPUT.MIN_SIZE_TRAIN", tuple(size // by for size in cfg.INPUT.MIN_SIZE_TRAIN)]
    for key in ("MAX_SIZE_TRAIN", "MIN_SIZE_TEST", "MAX_SIZE_TEST"):
        keys += [f"INPUT.{key}", cfg.INPUT[key] // by]
    return keys


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_a_step_and_a_prediction(path, data, tmp_path):
    cfg = build_config(str(path), [])
    options = [
        *NARROW,
        *shrunk(cfg),
        *("DATASETS.COCO_FORMAT", coco_format(data, "tiny")),
        *("DATASETS.TRAIN", ("tiny_train",), "DATASETS.TEST", ()),
        *("SOLVER.REFERENCE_WORLD_SIZE", 0, "SOLVER.IMS_PER_BATCH", 2),
        *("SOLVER.MAX_ITER", 1, "SOLVER.STEPS", (), "OUTPUT_DIR", str(tmp_path / "run")),
        *("DATALOADER.NUM_WORKERS", 0),
    ]
    if cfg.KD.TEACHER.CONFIG_FILE:
        teacher = build_model(build_config(cfg.KD.TEACHER.CONFIG_FILE, NARROW))
        torch.save({"model": teacher.state_dict()}, tmp_path / "teacher.pth")
        options += ["KD.TEACHER.WEIGHTS", str(tmp_path / "teacher.pth")]
        options += ["KD.TEACHER.OPTS", NARROW]
    trainer = train(build_config(str(path), options))
    assert trainer.iter == 1
    inputs = next(iter(KDTrainer.build_test_loader(trainer.cfg, "tiny_val")))
    with torch.no_grad():
        (prediction,) = trainer.model.eval()(inputs)
    assert prediction["instances"].image_size == (inputs[0]["height"], inputs[0]["width"])


def models():
    return {path: build_config(str(path), []) for path in FILES}


def without(cfg, *prefixes):
    return {k: v for k, v in flattened(cfg).items() if not k.startswith(prefixes)}


def test_every_student_has_a_baseline_that_is_equal_in_all_else():
    every = models()
    students = {p: c for p, c in every.items() if c.MODEL.META_ARCHITECTURE == "DistilledRCNN"}
    assert len(students) >= 2
    # The weights: a student's come from its teacher.
    own = ("KD.", "OUTPUT_DIR", "MODEL.META_ARCHITECTURE", "MODEL.WEIGHTS")
    for path, student in students.items():
        baselines = [
            cfg
            for other, cfg in every.items()
            if other.parent == path.parent and cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
        ]
        assert without(student, *own) in [without(cfg, *own) for cfg in baselines], path


def test_every_student_and_its_teacher_are_one_net_in_two_frames():
    """Equal but for anchors of twice the size, on levels of twice the stride."""
    frame = (
        "WEIGHTS",
        "META_ARCHITECTURE",
        "BACKBONE.NAME",
        "ANCHOR_GENERATOR.SIZES",
        "MULTI_RESOLUTION",
    )
    frame += ("RPN.IN_FEATURES", "ROI_HEADS.IN_FEATURES")
    for cfg in models().values():
        if not cfg.KD.TEACHER.CONFIG_FILE:
            continue
        teacher = build_config(cfg.KD.TEACHER.CONFIG_FILE, [])
        if teacher.MODEL.META_ARCHITECTURE != "MultiResolutionRCNN":
            continue
        mine, theirs = cfg.MODEL, teacher.MODEL
        assert without(mine, *frame) == without(theirs, *frame)
        doubled = [[cfg.KD.SCALE * side for side in level] for level in mine.ANCHOR_GENERATOR.SIZES]
        assert theirs.ANCHOR_GENERATOR.SIZES == doubled
        shift = cfg.KD.SCALE.bit_length() - 1
        for part in ("RPN", "ROI_HEADS"):
            levels = [f"p{int(level[1:]) + shift}" for level in mine[part].IN_FEATURES]
            assert theirs[part].IN_FEATURES == levels


def test_coco_has_the_papers_sizes():
    for path, cfg in models().items():
        if path.parent.name != "COCO":
            continue
        high = "_HR_" in path.name or "_teacher_" in path.name
        sides = (32, 64, 128, 256, 512) if high else (16, 32, 64, 128, 256)
        assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == [[side] for side in sides]
        sizes = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
        assert sizes == ((800, 1333) if high else (400, 667))
        factor = 2 if high else 1
        assert cfg.INPUT.MIN_SIZE_TRAIN == tuple(factor * s for s in range(320, 401, 16))


def test_stock_detectron2_reads_the_plain_configs():
    for path in FILES:
        if path.parent.name == "COCO" and ("_LR_" in path.name or "_HR_" in path.name):
            cfg = get_cfg()
            cfg.merge_from_file(str(path))
            assert cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
