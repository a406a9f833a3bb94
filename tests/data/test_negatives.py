"""An image without objects is a negative example, whatever crops it."""

import pytest
import torch
from detectron2.data import get_detection_dataset_dicts
from helpers import build, build_student, losses_of

from msad_kd.data.mapper import build_mapper

CROPS = {
    "no crop": [],
    "crop": ["INPUT.CROP.ENABLED", True],
    "crop of bitmasks": ["INPUT.CROP.ENABLED", True, "INPUT.MASK_FORMAT", "bitmask"],
    "jitter": ["INPUT.JITTER.SIZE", 64],
}


@pytest.mark.parametrize("crop", CROPS.values(), ids=CROPS)
@pytest.mark.parametrize("role", ["lr", "teacher", "student"])
def test_images_without_objects_are_negatives(config, student_config, role, crop):
    losses = [{"name": name, "weight": 1.0} for name in ("l1", "roi_class", "roi_mask")]
    student = role == "student"
    cfg = student_config(*crop, "KD.LOSSES", losses) if student else config(role, *crop)
    one, crowd, full = get_detection_dataset_dicts(cfg.DATASETS.TRAIN)[:3]
    one = {**one, "annotations": []}
    crowd = {**crowd, "annotations": [{**x, "iscrowd": 1} for x in crowd["annotations"]]}
    mapper = build_mapper(cfg, is_train=True)
    model = (build_student if student else build)(cfg)
    for entries in ([one, crowd], [one, full]):  # none in the batch, and some
        inputs = [mapper(entry) for entry in entries]
        assert [len(x["instances"]) > 0 for x in inputs] == [x is full for x in entries]
        found = losses_of(model, inputs)
        assert all(torch.isfinite(value) for value in found.values())
        assert any(value > 0 for value in found.values())
        if full not in entries:  # nothing to localise
            parts = ("loss_rpn_loc", "loss_box_reg", "loss_mask")
            assert all(value == 0 for name, value in found.items() if name.startswith(parts))
