"""Warnings of what would mislead, before a training starts."""

import re

import numpy as np
import pytest

from msad_kd import KDTrainer
from msad_kd.data.statistics import enlarged_share

LARGE = ["INPUT.MAX_SIZE_TRAIN", 640, "INPUT.MIN_SIZE_TRAIN"]
SMALL = "100% of the images are smaller than the low resolution"


def test_the_share_of_images_that_are_enlarged():
    sides = np.array([[50, 100], [100, 100], [120, 400], [60, 300]])
    assert enlarged_share(sides, short=100, longest=1000) == 0.5
    assert enlarged_share(sides, short=100, longest=200) == 0.25  # 60 x 300 becomes 40 x 200
    assert enlarged_share(sides[:0], 100, 200) == 0


@pytest.mark.parametrize(
    ("role", "keys", "words"),
    [  # the images have 64 x 96 px
        ("teacher", [*LARGE, (160,)], f"{SMALL} .* 80 px"),
        ("teacher", ["INPUT.MIN_SIZE_TRAIN", (96,)], ""),
        ("lr", ["INPUT.MIN_SIZE_TRAIN", (96,)], ""),  # one resolution
        ("lr", ["MODEL.ROI_HEADS.NUM_CLASSES", 9], "NUM_CLASSES is 9, and the data have 8 classes"),
    ],
)
def test_what_is_warned_of(config, caplog, role, keys, words):
    KDTrainer(config(role, *keys))
    ours = [r for r in caplog.records if r.name.startswith("msad_kd") and r.levelname == "WARNING"]
    said = [record.getMessage() for record in ours]
    assert len(said) == bool(words) and all(re.search(words, x) for x in said), said
