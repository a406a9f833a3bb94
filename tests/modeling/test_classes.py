"""A model needs all classes of the data, and may have more."""

import pytest
from helpers import train

from msad_kd import KDTrainer
from msad_kd.modeling.classes import class_key, has_masks, number_of_classes
from msad_kd.utils.errors import InputError

HEADS = "MODEL.ROI_HEADS.NUM_CLASSES"
DENSE = ("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES")


def refused(key, classes, data_set):
    words = rf"{key} is {classes}, but .* '{data_set}' has 8 classes \(circle, .*; set it to 8$"
    return pytest.raises(InputError, match=words)


@pytest.mark.parametrize("options", [(HEADS, 7), (*DENSE, 7)])
def test_too_few_classes_in_training_and_evaluation(config, options):
    cfg = config("lr", "MODEL.RETINANET.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"], *options)
    with refused(options[-2], 7, "tiny_train"):
        KDTrainer(cfg)
    with refused(options[-2], 7, "tiny_val"):
        KDTrainer.build_test_loader(cfg, "tiny_val")


def test_more_classes_than_the_data_are_trained_and_evaluated(config):
    trainer = train(config("lr", HEADS, 20, "SOLVER.MAX_ITER", 1))
    assert {"bbox", "segm"} <= trainer._last_eval_results.keys()


def test_classes_and_masks_of_a_config(config):
    plain, dense = config("lr"), config("lr", *DENSE, 5)
    assert (class_key(plain), number_of_classes(plain), has_masks(plain)) == (HEADS, 8, True)
    assert (class_key(dense), number_of_classes(dense), has_masks(dense)) == (DENSE[2], 5, False)
    assert number_of_classes(config("teacher")) == 8
    unknown = config("lr", "MODEL.META_ARCHITECTURE", "ProposalNetwork")
    assert class_key(unknown) is number_of_classes(unknown) is None
    assert not has_masks(config("lr", "MODEL.MASK_ON", False))
