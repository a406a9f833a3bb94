"""The COCO configs on images and annotations of COCO itself, by Detectron2's builtin names."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin import register_all_coco
from helpers import ROOT, train
from shipped import FILES, name_of, tiny_options

from msad_kd.config.build import build_config
from msad_kd.modeling.classes import has_masks

COCO = ROOT.parent / "shared" / "data" / "coco_100"
CONFIGS = [path for path in FILES if path.parent.name == "COCO"]
STUDENTS = [path for path in CONFIGS if path.name.endswith("_R_50_FPN_student_1x.yaml")]
pytestmark = [
    pytest.mark.skipif(not COCO.exists(), reason=f"{COCO}, images of COCO, is not there"),
]


def register(folder, count):
    """Register the first images with persons, count of each split, as Detectron2 does."""
    (folder / "coco" / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (folder / "coco" / split).symlink_to(COCO / split)
        names = [f"{kind}_{split}.json" for kind in ("person_keypoints", "instances")]
        contents = [json.loads((COCO / "annotations" / name).read_text()) for name in names]
        people = {x["image_id"] for x in contents[0]["annotations"] if x["num_keypoints"]}
        kept = sorted(people)[:count] if count else {x["id"] for x in contents[0]["images"]}
        for name, content in zip(names, contents):
            for records, key in (("images", "id"), ("annotations", "image_id")):
                content[records] = [x for x in content[records] if x[key] in kept]
            (folder / "coco" / "annotations" / name).write_text(json.dumps(content))
    for catalog in (DatasetCatalog, MetadataCatalog):
        for name in [name for name in catalog.data if "coco" in name]:
            del catalog.data[name]
    register_all_coco(str(folder))


def run(path, folder, count, monkeypatch):
    """Train a config two steps and evaluate it."""
    monkeypatch.chdir(ROOT)  # configs name each other by paths from there
    register(folder, count)
    cfg = build_config(str(path), [])
    more = ["MODEL.PIXEL_STD", [64.0] * 3, "TEST.DETECTIONS_PER_IMAGE", 5]
    more += ["MODEL.RESNETS.NORM", "BN", "MODEL.RPN.POST_NMS_TOPK_TEST", 20]
    more += ["MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (8,)]
    for part in ("ROI_HEADS", "RETINANET", "FCOS"):
        more += [f"MODEL.{part}.NUM_CLASSES", cfg.MODEL[part].NUM_CLASSES]
        more += [f"MODEL.{part}.SCORE_THRESH_TEST", 0.0]
    options = [*tiny_options(path, folder, more), "SOLVER.MAX_ITER", 2]
    trainer = train(build_config(str(path), [*options, "KD.TEACHER.EVAL_BEFORE_TRAIN", False]))
    assert trainer.iter == 2
    tasks = {"bbox/AP": True, "segm/AP": has_masks(cfg), "keypoints/AP": cfg.MODEL.KEYPOINT_ON}
    assert {task: task in trainer.storage.latest() for task in tasks} == tasks


@pytest.mark.parametrize("path", STUDENTS, ids=name_of)
def test_a_student_of_each_detector(path, tmp_path, monkeypatch):
    run(path, tmp_path, 2, monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_every_config(path, tmp_path, monkeypatch):
    run(path, tmp_path, None, monkeypatch)
