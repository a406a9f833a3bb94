"""A model needs all classes of the data, and may have more."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers import coco_format, train

from msad_kd import KDTrainer
from msad_kd.modeling.classes import class_key, has_masks, number_of_classes
from msad_kd.utils.errors import InputError

HEADS = "MODEL.ROI_HEADS.NUM_CLASSES"
DENSE = ("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES")


def sentence(key, classes, data_set):
    return rf"{key} is {classes}, but .* '{data_set}' has 8 classes \(circle, .*; set it to 8$"


@pytest.fixture
def few(data, tmp_path):
    """DATASETS.COCO_FORMAT of training data with four classes, and test data with eight."""
    train_set, test_set = coco_format(data, "few")
    content = json.loads((data / "annotations/instances_train.json").read_text())
    content["categories"] = content["categories"][:4]
    content["annotations"] = [x for x in content["annotations"] if x["category_id"] <= 4]
    (tmp_path / "few.json").write_text(json.dumps(content))
    yield [{**train_set, "json": str(tmp_path / "few.json")}, test_set]
    for name in ("few_train", "few_val"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.parametrize("options", [(HEADS, 7), (*DENSE, 7)])
def test_too_few_classes_for_the_training_data(config, options):
    levels = ["MODEL.RETINANET.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"]]
    with pytest.raises(InputError, match=sentence(options[-2], 7, "tiny_train")):
        KDTrainer(config("lr", *levels, *options))


def test_too_few_classes_for_the_test_data_are_told_before_training(config, few):
    options = ["DATASETS.COCO_FORMAT", few, "DATASETS.TRAIN", ("few_train",)]
    with pytest.raises(InputError, match=sentence(HEADS, 4, "few_val")):
        KDTrainer(config("lr", *options, "DATASETS.TEST", ("few_val",), HEADS, 4))


def test_too_few_classes_in_an_evaluation(config):
    with pytest.raises(InputError, match=sentence(HEADS, 7, "tiny_val")):
        KDTrainer.build_test_loader(config("lr", HEADS, 7), "tiny_val")


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
