"""Every number of COCO's AP is that of pycocotools, whatever computes it."""

import copy
import json
import os

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances

from msad_kd.evaluation.coco import (
    IMPLEMENTATIONS,
    AnyCOCOEvaluator,
    _is_installed,
    choose_implementation,
)
from msad_kd.evaluation.rle import encode
from msad_kd.utils.replaced import replaced

OTHERS = [x for x in IMPLEMENTATIONS if x != "pycocotools" and _is_installed(x)]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A data set with masks, keypoints, crowds and a class without objects, and what is found.

    Image 3 has 150 objects, image 4 none. Scores are rounded: many are equal.
    """
    rng, size, annotations, pairs = np.random.default_rng(0), (120, 160), [], []
    for image, amount in enumerate((10, 20, 5, 150, 0)):
        sides = np.exp(rng.normal(3, 0.8, (amount, 2))).clip(6, 110)
        boxes = np.concatenate([at := rng.uniform(0, size[::-1] - sides), at + sides], axis=1)
        masks = np.zeros((amount, *size), bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.round().astype(int)):
            mask[y0:y1, x0:x1] = True
        points = np.full((amount, 17, 3), 2.0)
        points[..., :2] = rng.random((amount, 17, 2)) * sides[:, None] + at[:, None]
        points[rng.random((amount, 17)) < 0.3] = 0  # not labelled
        classes = rng.integers(3, size=amount)
        for k, rle in enumerate(encode(masks, boxes)):
            annotation = {"id": len(annotations) + 1, "image_id": image, "iscrowd": int(k % 9 == 8)}
            annotation |= {"category_id": int(classes[k]) + 1, "segmentation": rle}
            annotation |= {"bbox": [*at[k].tolist(), *sides[k].tolist()]}
            annotation |= {"keypoints": points[k].ravel().tolist(), "area": int(masks[k].sum())}
            annotations.append(annotation | {"num_keypoints": int(points[k, :, 2].sum()) // 2})
        twice = np.tile(np.arange(amount), 3)
        wrong = rng.integers(4, size=len(twice)) * (rng.random(len(twice)) < 0.2)
        found = Instances(size, scores=torch.tensor(rng.random(len(twice)).round(2)))
        found.pred_boxes = Boxes(boxes[twice] + rng.normal(0, 2, (len(twice), 4)))
        found.pred_classes = torch.tensor((classes[twice] + wrong) % 4)
        moved = [np.roll(masks[k], rng.integers(-2, 3, 2), (0, 1)) for k in twice]
        found.pred_masks = torch.tensor(np.array(moved)).reshape(-1, *size)
        found.pred_keypoints = torch.tensor(points[twice] + rng.normal(0, 1, (len(twice), 17, 3)))
        pairs.append(([{"image_id": image}], [{"instances": found}]))
    images = [{"id": i, "file_name": f"{i}.png", "height": 120, "width": 160} for i in range(5)]
    names = [{"id": i + 1, "name": name} for i, name in enumerate("abcd")]
    file = tmp_path_factory.mktemp("dense") / "dense.json"
    content = {"images": images, "annotations": annotations, "categories": names}
    file.write_text(json.dumps(content))
    register_coco_instances("dense", {}, str(file), "")
    DatasetCatalog.get("dense")  # this registers the classes
    return pairs


def all_numbers(evaluator, pairs, images):
    """Return the twelve numbers (keypoints: ten), and every precision and recall, of each task."""
    seen = {}

    def look(coco_eval, task, class_names=None):
        values = coco_eval.eval
        seen[task] = [np.array(coco_eval.stats), values["precision"], values["recall"]]
        return {}

    evaluator.reset()
    for inputs, outputs in copy.deepcopy(pairs):  # Detectron2 shifts keypoints in place
        evaluator.process(inputs, outputs)
    with replaced(evaluator, _derive_coco_results=look):
        evaluator.evaluate(images)
    return seen


@pytest.mark.parametrize("images", [None, [0, 3]], ids=["all images", "two images"])
@pytest.mark.parametrize("limit", [100, 400])
@pytest.mark.parametrize("implementation", OTHERS)
@pytest.mark.filterwarnings("error:hotcoco")
def test_every_number_is_that_of_pycocotools(dense, implementation, limit, images):
    stock = COCOEvaluator("dense", max_dets_per_image=limit, use_fast_impl=False)
    options = {"implementation": implementation, "max_dets_per_image": limit}
    found = all_numbers(AnyCOCOEvaluator("dense", **options), dense, images)
    expected = all_numbers(stock, dense, images)
    assert found.keys() == expected.keys() == {"bbox", "segm", "keypoints"}
    for task, numbers in expected.items():
        assert 0.05 < numbers[0][0] < 0.95 and len(numbers[0]) == (10 if "key" in task else 12)
        for one, other in zip(found[task], numbers, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def test_a_forked_process_does_without_hotcoco_if_its_parent_has_used_it():
    """It would wait for ever."""
    pytest.importorskip("hotcoco")
    assert choose_implementation("auto") == "hotcoco"
    child = os.fork()
    if not child:
        code = 2
        try:
            code = int(choose_implementation("auto") == "hotcoco")
        finally:  # this process must not go on with the tests
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
