"""tools/check_dataset.py: test data that give no AP, or one that means nothing."""

import ast
import re

from annotation_files import valid_content


def test_test_images_that_are_trained_on(check, pair, mine):
    entries = [{"name": "folder", "images": str(mine / "photos")}]
    test = valid_content()
    arguments = [*pair(valid_content(), test), "DATASETS.TEST", "('one','two')"]
    _, text = check(*arguments)
    assert "data set 'one' is in DATASETS.TEST, too: its AP is of images that were tr" in text
    entries += ast.literal_eval(arguments[arguments.index("DATASETS.COCO_FORMAT") + 1])
    keys = ["DATASETS.COCO_FORMAT", str(entries), "DATASETS.TRAIN", "()"]
    keys += ["DATASETS.UNLABELED", "('folder',)", "SOLVER.UNLABELED_PER_BATCH", "2"]
    _, text = check(*pair(valid_content(), test), *keys)
    assert re.search("'two' has images that are training images, too: .*7.png, .*9.png", text)


def test_test_data_without_objects(check, pair):
    _, text = check(*pair(valid_content(), {**valid_content(), "annotations": []}))
    assert "data set 'two' has no objects, so there is no AP" in text
