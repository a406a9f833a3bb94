"""Data sets in COCO format from the config, and the errors about wrong ones."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from helpers import TEST_SCENES, TRAIN_SCENES, coco_format

from msad_kd.config.build import build_config
from msad_kd.data.coco_format import load_checked
from msad_kd.engine.trainer import KDTrainer
from msad_kd.utils.errors import InputError


@pytest.fixture(autouse=True)
def forget():
    """Remove the data sets and the metadata that a test adds."""
    data_sets, metadata = DatasetCatalog.list(), MetadataCatalog.list()
    yield
    for name in set(DatasetCatalog.list()) - set(data_sets):
        DatasetCatalog.remove(name)
    for name in set(MetadataCatalog.list()) - set(metadata):
        MetadataCatalog.pop(name)


def register(entries):
    return build_config("", ["DATASETS.COCO_FORMAT", entries])


def test_registered_and_loaded(data, monkeypatch):
    for _ in range(2):  # registering twice is allowed
        register(coco_format(data, "mine"))
    dicts = get_detection_dataset_dicts(["mine_train"])
    assert len(dicts) == TRAIN_SCENES
    assert all(entry["annotations"] for entry in dicts)
    metadata = MetadataCatalog.get("mine_train")
    assert len(metadata.thing_classes) == 8 and metadata.evaluator_type == "coco"
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data.parent))  # where relative paths start
    json_file = f"{data.name}/annotations/instances_val.json"
    register([{"name": "mine", "json": json_file, "images": f"{data.name}/val"}])
    assert len(DatasetCatalog.get("mine")) == TEST_SCENES


@pytest.mark.parametrize(
    "change", [{"json": "other.json"}, {"images": "elsewhere"}, {"name": "coco_2017_val"}]
)
def test_a_name_that_is_taken(data, change):
    (entry, _) = coco_format(data, "mine")
    register([entry])
    with pytest.raises(InputError, match="'(mine_train|coco_2017_val)' exists already; rename"):
        register([{**entry, **change}])


@pytest.mark.parametrize(
    "entry", ["mine", {"name": "mine", "json": "a"}, {"name": "n", "json": "a", "image": "b"}]
)
def test_an_entry_with_other_fields(entry):
    with pytest.raises(InputError, match="COCO_FORMAT: .* fields name, json and images"):
        register([entry])


def test_a_missing_folder(data, tmp_path):
    annotations = data / "annotations" / "instances_val.json"
    with pytest.raises(InputError, match="'mine': the image folder '.*nowhere' does not exist"):
        load_checked(str(annotations), str(tmp_path / "nowhere"), "mine")


def test_training_and_evaluation_name_what_is_missing(config, tmp_path):
    entry = {"name": "gone", "json": str(tmp_path / "no.json"), "images": str(tmp_path / "no")}
    keys = ["DATASETS.COCO_FORMAT", [entry], "DATASETS.TRAIN", ("gone",)]
    own = config("lr", *keys, "DATASETS.TEST", ("gone",))
    names = ("coco_2017_val",)
    builtin = config("lr", "DATASETS.TRAIN", names, "DATASETS.TEST", names)
    for cfg, words in (
        (own, "'gone': the annotation file '.*no.json' .*DETECTRON2_DATASETS"),
        (builtin, "coco_2017_val.*instances_val2017.json.*DETECTRON2"),
    ):
        for build in (KDTrainer.build_train_loader, lambda c: KDTrainer.test(c, None)):
            with pytest.raises(InputError, match=words):
                build(cfg)


IMAGE = {"id": 1, "file_name": "000000.png", "height": 64, "width": 96}


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        json.dumps({"images": [IMAGE], "annotations": []}),
        json.dumps({"images": [IMAGE], "annotations": [], "categories": []}),
        json.dumps({"annotations": [], "categories": [{"id": 1, "name": "a"}]}),
    ],
)
def test_not_coco_format(content, data, tmp_path):
    file = tmp_path / "annotations.json"
    file.write_text(content)
    with pytest.raises(InputError, match=r"'mine': '.*annotations.json' is not in COCO format"):
        load_checked(str(file), str(data / "val"), "mine")


def test_missing_images_are_counted_and_one_is_named(data, tmp_path):
    content = json.loads((data / "annotations" / "instances_train.json").read_text())
    content["images"][1]["file_name"] = "lost.png"
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(content))
    words = f"1 of the {TRAIN_SCENES} images in '.*' are missing or no regular .* e.g. '.*lost.png'"
    with pytest.raises(InputError, match=words):
        load_checked(str(file), str(data / "train"), "mine")
