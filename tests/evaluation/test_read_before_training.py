"""DATASETS.TEST is read before a model is built, so that its mistakes cost no training."""

import shutil
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.datasets.cityscapes import load_cityscapes_instances
from helpers import coco_format

from msad_kd import KDTrainer
from msad_kd.utils.errors import InputError
from projects.Shapes.generate import generate


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    """Give the test no model to train."""
    monkeypatch.setattr(KDTrainer, "build_model", lambda *_: pytest.fail("a model is built"))


def unknown_categories(file, _):
    """Give every annotation a category that the file does not have."""
    file.write_text(file.read_text().replace('"category_id": ', '"category_id": 7'))


MISTAKES = {  # tests/data has all that a file can have
    "no file": (lambda file, _: file.unlink(), "'.*instances_val.json' does not exist"),
    "no folder": (lambda _, images: shutil.rmtree(images), "image folder '.*val' does not exist"),
    "no JSON": (lambda file, _: file.write_text('{"images": [{'), "'.*instances_val.json'"),
    "a missing image": (lambda _, images: (images / "000001.png").unlink(), "1 of .*000001.png"),
    "unknown categories": (unknown_categories, "'.*instances_val.json'.*no category has its"),
}


@pytest.mark.parametrize("register", ["by the config", "by Detectron2's function"])
@pytest.mark.parametrize(("spoil", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_data_set_in_coco_format(config, data, tmp_path, spoil, words, register):
    shutil.copytree(data, tmp_path / "spoiled")
    (_, entry) = coco_format(tmp_path / "spoiled", "spoiled")
    options = ["DATASETS.TEST", ("spoiled_val",)]
    if register == "by the config":
        options += ["DATASETS.COCO_FORMAT", [*coco_format(data, "tiny"), entry]]
    else:
        register_coco_instances(entry["name"], {}, entry["json"], entry["images"])
    cfg = config("lr", *options)
    spoil(Path(entry["json"]), Path(entry["images"]))
    with pytest.raises(InputError, match=f"data set '?spoiled_val'?.*{words}"):
        KDTrainer(cfg)


EIGHTY = ("MODEL.ROI_HEADS.NUM_CLASSES", 80)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["DATASETS.TEST", ("coco_2014_minival_100",)], "minival2014_100.json"),
        (
            ["DATASETS.TEST", ("coco_2017_val_panoptic_separated",), *EIGHTY],
            "'coco_panoptic_seg'; only",
        ),
        (["DATASETS.TEST", ("cityscapes_fine_instance_seg_val",)], "cityscapes_fine.*exist"),
        (["MODEL.LOAD_PROPOSALS", True], "PROPOSAL_FILES_TEST"),
    ],
)
def test_other_mistakes(config, monkeypatch, options, words):
    nothing = lambda: [{"file_name": __file__, "annotations": []}]  # noqa: E731
    monkeypatch.setitem(DatasetCatalog.data, "coco_2017_val_panoptic_separated", nothing)
    with pytest.raises(InputError, match=words):
        KDTrainer(config("lr", "DATASETS.TRAIN", (), *options))


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("gtFine/val/*/*instanceIds.png", "2 of the 2 .* have no .*instanceIds.png"),
        (
            "gtFine/val/*/*_000001_*_gtFine_instanceIds.png",
            "1 of the 2 .* have no .*instanceIds.png",
        ),
        ("leftImg8bit/val/*/*_000001_*_leftImg8bit.png", "1 of the 2 .* have no .*leftImg8bit.png"),
        ("gtFine/val/*/*_000001_*_gtFine_polygons.json", "polygons.json"),
    ],
)
def test_cityscapes(config, tmp_path, lost, words):
    pytest.importorskip("cityscapesscripts")
    root = tmp_path / "datasets/cityscapes"
    generate(root.parent, train=1, val=2, size=(64, 128), format="cityscapes", progress=False)
    images, labels = (str(root / part / "val") for part in ("leftImg8bit", "gtFine"))
    DatasetCatalog.register("streets", lambda: load_cityscapes_instances(images, labels))
    classes = MetadataCatalog.get("cityscapes_fine_instance_seg_val").thing_classes
    MetadataCatalog.get("streets").set(
        evaluator_type="cityscapes_instance", image_dir=images, gt_dir=labels, thing_classes=classes
    )
    options = ["DATASETS.TRAIN", ("streets",), "DATASETS.TEST", ("streets",)]
    found = list(root.glob(lost))
    assert found
    for file in found:
        file.unlink()
    with pytest.raises(InputError, match=words):
        KDTrainer(config("lr", *options))


def test_nothing_is_read_without_test_data(config, monkeypatch):
    read = []
    monkeypatch.setattr(KDTrainer, "build_test_loader", lambda *args: read.append(args))
    with pytest.raises(pytest.fail.Exception, match="a model is built"):
        KDTrainer(config("lr", "DATASETS.TEST", ()))
    assert not read
