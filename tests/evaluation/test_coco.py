"""All implementations of COCO's AP give the same numbers; which one runs is logged."""

import contextlib
import copy
import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances, polygons_to_bitmask
from helpers import ROOT, coco_format, evaluate, names_of

from msad_kd import KDTrainer
from msad_kd.checkpoint.checkpoint import load_strictly
from msad_kd.config.build import build_config
from msad_kd.evaluation import coco as module
from msad_kd.evaluation.build import build_evaluator
from msad_kd.evaluation.coco import IMPLEMENTATIONS, AnyCOCOEvaluator, choose_implementation
from msad_kd.utils.errors import InputError
from projects.Shapes.generate import generate
from projects.Shapes.placement import CLASS_NAMES

INSTALLED = [name for name in IMPLEMENTATIONS if module._is_installed(name)]
METRICS = {"AP", "AP50", "AP75", "APs", "APm", "APl"}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """The config of large scenes, with small, medium and large objects and a few crowds."""
    folder = tmp_path_factory.mktemp("evaluated")
    # Larger than those that the checkpoint was trained on.
    like = {"classes": 5, "difficulty": 0.1, "hue_spread": 50.0, "max_shapes": 8}
    like.update(size=(448, 448), min_radius=3.5, max_radius=30.0)
    generate(folder / "data", train=1, val=16, progress=False, **like)
    path = folder / "data/annotations/instances_val.json"
    content = json.loads(path.read_text())
    for annotation in content["annotations"][::9]:
        annotation["iscrowd"] = 1
    path.write_text(json.dumps(content))
    named = coco_format(folder / "data", "evaluated")
    options = ["DATASETS.COCO_FORMAT", named, "DATASETS.TRAIN", (), "MODEL.DEVICE", "cpu"]
    options += ["DATASETS.TEST", ("evaluated_val",), "OUTPUT_DIR", str(folder)]
    options += ["DATALOADER.NUM_WORKERS", 0]
    return build_config(str(ROOT / "configs/Shapes/hr.yaml"), options)


@pytest.fixture(scope="module")
def predictions(scenes):
    """The predictions of a trained model: (inputs, outputs) of each image."""
    model = KDTrainer.build_model(scenes)
    load_strictly(model, str(ROOT / "projects/Shapes/checkpoints/hr.pth"), "the test")
    model.eval()
    with torch.no_grad():
        return [(x, model(x)) for x in KDTrainer.build_test_loader(scenes, "evaluated_val")]


@pytest.fixture(scope="module")
def stock(predictions):
    """The results of Detectron2's own evaluator with pycocotools, which are worth comparing."""
    results = evaluate(predictions, COCOEvaluator("evaluated_val", use_fast_impl=False))
    for metrics in results.values():
        assert METRICS | {"AP-circle"} <= metrics.keys()
        assert all(5 < metrics[name] < 95 for name in METRICS), metrics
    return results


def perfect(name="evaluated_val"):
    """The ground truth as predictions: (inputs, outputs) of each image."""
    pairs = []
    for entry in DatasetCatalog.get(name):
        size = entry["height"], entry["width"]
        objects = [each for each in entry["annotations"] if not each["iscrowd"]]
        boxes = torch.tensor([each["bbox"] for each in objects])
        boxes[:, 2:] += boxes[:, :2]
        masks = [polygons_to_bitmask(each["segmentation"], *size) for each in objects]
        found = Instances(
            size,
            pred_boxes=Boxes(boxes),
            scores=torch.ones(len(objects)),
            pred_classes=torch.tensor([each["category_id"] for each in objects]),
            pred_masks=torch.from_numpy(np.stack(masks)),
        )
        pairs.append(([entry], [{"instances": found}]))
    return pairs


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("implementation", INSTALLED)
def test_same_numbers_as_detectron2_by_pycocotools(predictions, stock, implementation, masks):
    pairs, more = copy.deepcopy(predictions), copy.deepcopy(predictions)
    for (_, (output,)), (_, (other,)) in zip(pairs, more):
        if not masks:
            output["instances"].remove("pred_masks")
            other["instances"].remove("pred_masks")
        other["instances"].pred_classes += 5  # the data lacks these classes: they do not count
        other["instances"] = Instances.cat([output["instances"], other["instances"]])
    evaluator = AnyCOCOEvaluator("evaluated_val", implementation=implementation, masks=masks)
    for each in (pairs, more):  # the second evaluation must find the kept ground truth unchanged
        found = evaluate(each, evaluator)
        assert found.keys() == ({"bbox", "segm"} if masks else {"bbox"})
        assert sorted(evaluator.metric_names()) == names_of(found)
        for task, metrics in found.items():
            assert metrics == pytest.approx(stock[task], abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("implementation", INSTALLED)
def test_a_perfect_prediction_scores_100(scenes, tmp_path, caplog, implementation):
    """The log names the implementation, and the predictions are written."""
    options = {"implementation": implementation, "output_dir": str(tmp_path)}
    with caplog.at_level(logging.INFO):
        found = evaluate(perfect(), AnyCOCOEvaluator("evaluated_val", **options))
    for task in ("bbox", "segm"):
        assert [found[task][name] for name in METRICS] == pytest.approx([100.0] * 6)
    messages = [r.message for r in caplog.records if r.name == "msad_kd.evaluation.coco"]
    assert messages == [f"COCO-style AP is computed by {implementation}"]
    api = "official" if implementation == "pycocotools" else "unofficial"
    assert f"Evaluating predictions with {api} COCO API" in caplog.text
    written = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert {result["category_id"] for result in written} <= {1, 2, 3, 4, 5}  # the file's own ids


@pytest.mark.parametrize(("masks", "tasks"), [(True, {"bbox", "segm"}), (False, {"bbox"})])
@pytest.mark.parametrize("implementation", INSTALLED)
def test_a_model_that_finds_nothing_has_nan(predictions, implementation, masks, tasks):
    evaluator = AnyCOCOEvaluator("evaluated_val", implementation=implementation, masks=masks)
    nothing = [(x, [{"instances": y[0]["instances"][:0]}]) for x, y in predictions]
    found = evaluate(nothing, evaluator)
    assert found.keys() == tasks
    assert sorted(evaluator.metric_names()) == names_of(found)
    assert all(value != value for metrics in found.values() for value in metrics.values())


def test_auto_takes_the_fastest_installed(monkeypatch):
    there = set(IMPLEMENTATIONS)
    monkeypatch.setattr(module, "_is_installed", there.__contains__)
    for name in IMPLEMENTATIONS:
        assert choose_implementation("auto") == name
        there.remove(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hotcoco", "'hotcoco', which is not installed .pip install"),
        ("detectron2", "'detectron2', which is not .*compile .*auto takes"),
        ("coco", "'coco'; use auto or one of .*hotcoco.*detectron2"),
    ],
)
def test_an_implementation_that_is_missing_or_unknown(monkeypatch, name, words):
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    monkeypatch.setitem(sys.modules, "detectron2.evaluation.fast_eval_api", None)
    assert choose_implementation("auto") == "pycocotools"
    with pytest.raises(InputError, match=words):
        build_config("", ["TEST.COCO_EVALUATOR", name])


def _set(parts, **values):
    """A change that sets keys of all records of some parts; None removes them."""

    def change(content):
        for part in parts:
            for number, record in enumerate(content[part]):
                for key, value in values.items():
                    record[key] = value(number, record) if callable(value) else value
                    if value is None:
                        del record[key]

    return change


def _negate_images(content):
    _set(["images"], id=lambda _, x: -x["id"])(content)
    _set(["annotations"], image_id=lambda _, x: -x["image_id"])(content)


def _name_images(content):
    _set(["images"], id=lambda _, x: f"scene {x['id']}")(content)
    _set(["annotations"], image_id=lambda _, x: f"scene {x['image_id']}")(content)


def _name_categories(content):
    _set(["categories"], id=lambda _, x: f"class {x['id']}")(content)
    _set(["annotations"], category_id=lambda _, x: f"class {x['category_id']}")(content)


def _shuffle(content):
    for records in content.values():
        if isinstance(records, list):
            records.reverse()


OBJECTS = ["annotations"]
AS_GIVEN = {
    "ids from 0": _set(OBJECTS, id=lambda number, _: number),
    "negative ids": _set(OBJECTS, id=lambda number, _: -number),
    "no ids": _set(OBJECTS, id=None),
    "ids as texts": _set(OBJECTS, id=lambda number, _: f"object {number}"),
    "one id for all": _set(OBJECTS, id=7),
    "no areas": _set(OBJECTS, area=None),
    "areas of 0": _set(OBJECTS, area=0),
    "no iscrowd": lambda x: (
        x.update(annotations=[y for y in x["annotations"] if not y["iscrowd"]]),
        _set(OBJECTS, iscrowd=None)(x),
    ),
    "iscrowd as bool": _set(OBJECTS, iscrowd=lambda _, x: bool(x["iscrowd"])),
    "image ids as texts": _name_images,
    "negative image ids": _negate_images,
    "category ids as texts": _name_categories,
    "in another order": _shuffle,
    "one without a mask": lambda content: content["annotations"][3].pop("segmentation"),
}


REFUSED = {  # by all, or by one implementation
    (
        "one without a mask",
        None,
    ): r"'given': 1 of its annotations have no segmentation, e.g. .* id 4",
    ("category ids as texts", None): "given.json': category 'class 1': id should be a whole number",
    ("image ids as texts", "hotcoco"): r"'given': hotcoco cannot read it .images.\d.: field 'id'",
    ("negative image ids", "hotcoco"): r"'given': hotcoco cannot read it .images.\d.: field 'id'",
}


@pytest.mark.parametrize("implementation", INSTALLED)
@pytest.mark.parametrize("kind", AS_GIVEN)
def test_ground_truth_as_it_comes(scenes, tmp_path, kind, implementation):
    """Perfect predictions have 100 in all metrics, or the file is refused by name."""
    folder = Path(scenes.OUTPUT_DIR) / "data"
    content = json.loads((folder / "annotations/instances_val.json").read_text())
    AS_GIVEN[kind](content)
    file = tmp_path / "given.json"
    file.write_text(json.dumps(content))
    register_coco_instances("given", {}, str(file), str(folder / "val"))
    cfg = scenes.clone()
    cfg.TEST.COCO_EVALUATOR = implementation
    cfg.DATASETS.CLASSES = list(CLASS_NAMES[:5])
    words = REFUSED.get((kind, None)) or REFUSED.get((kind, implementation))
    with pytest.raises(InputError, match=words) if words else contextlib.nullcontext():
        inputs = [sample for (sample,) in KDTrainer.build_test_loader(cfg, "given")]
        evaluator = KDTrainer.build_evaluator(cfg, "given")
    if words:
        if (kind, None) not in REFUSED:
            cfg.TEST.COCO_EVALUATOR = "auto"
            assert KDTrainer.build_evaluator(cfg, "given")._implementation == "pycocotools"
        return
    outputs = {entry["file_name"]: output for ((entry,), output) in perfect()}
    pairs = [([x], outputs[x["file_name"]]) for x in inputs]
    found = evaluate(pairs, evaluator)
    for task in ("bbox", "segm"):
        assert [found[task][name] for name in METRICS] == pytest.approx([100.0] * 6), task


@pytest.mark.parametrize("masks", [False, True])
def test_of_images_without_annotations_the_detections_are_written(scenes, tmp_path, caplog, masks):
    folder = Path(scenes.OUTPUT_DIR) / "data"
    content = json.loads((folder / "annotations/instances_val.json").read_text())
    del content["annotations"]
    (tmp_path / "secret.json").write_text(json.dumps(content))
    register_coco_instances("secret", {}, str(tmp_path / "secret.json"), str(folder / "val"))
    evaluator = AnyCOCOEvaluator("secret", masks=masks, output_dir=str(tmp_path))
    with caplog.at_level(logging.INFO):
        assert evaluate(perfect(), evaluator) == {}
    assert "Annotations are not available" in caplog.text
    found = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert len(found) == sum(len(x["instances"]) for _, (x,) in perfect())


def test_a_registered_function_is_asked_again_in_the_next_run(tmp_path):
    box = {"bbox": [4, 4, 20, 20], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "iscrowd": 0}
    image = {"file_name": "a.png", "height": 64, "width": 64, "image_id": 0}
    for left in (4, 30):  # as the function was, and as it is now
        for catalog in (DatasetCatalog, MetadataCatalog):
            catalog.pop("own", None)
        objects = [{**box, "bbox": [left, 4, 20, 20]}]
        DatasetCatalog.register("own", lambda x=objects: [{**image, "annotations": x}])
        MetadataCatalog.get("own").thing_classes = ["ant"]
        found = Instances((64, 64), pred_boxes=Boxes(torch.tensor([[left, 4.0, left + 20, 24.0]])))
        found.scores, found.pred_classes = torch.ones(1), torch.zeros(1, dtype=torch.int64)
        evaluator = AnyCOCOEvaluator("own", masks=False, output_dir=str(tmp_path))
        pairs = [([{"image_id": 0}], [{"instances": found}])]
        assert evaluate(pairs, evaluator)["bbox"]["AP"] == pytest.approx(100)


def test_another_kind_of_data_set_is_refused(config):
    MetadataCatalog.get("of_lvis").set(evaluator_type="lvis")
    with pytest.raises(InputError, match="evaluator 'lvis'; only coco and cityscapes"):
        build_evaluator(config("lr"), "of_lvis")
