"""Data sets in COCO format from the config, and the errors about wrong ones."""

import pytest
from annotation_files import valid_content
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from helpers import TEST_SCENES, TRAIN_SCENES, coco_format

from msad_kd.config.build import build_config
from msad_kd.engine.trainer import KDTrainer
from msad_kd.utils.errors import InputError


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


@pytest.mark.parametrize(("root", "start"), [("~", ""), ("elsewhere", "~/")])
def test_a_tilde_is_the_home_folder(data, monkeypatch, root, start):
    monkeypatch.setenv("HOME", str(data.parent))
    monkeypatch.setenv("DETECTRON2_DATASETS", root)
    folder = f"{start}{data.name}"
    json_file = f"{folder}/annotations/instances_val.json"
    register([{"name": "mine", "json": json_file, "images": f"{folder}/val"}])
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
    ("entry", "words"),
    [
        ("mine", "data set 1 should be a dict"),
        ({"name": "mine", "json": "a"}, "data set 1 needs 'images'"),
        ({"name": "n", "json": "a", "image": "b"}, "'image'.*did you mean images"),
        ({"name": "n", "json": 3, "images": "b"}, "json of data set 1 should be a text"),
    ],
)
def test_an_entry_with_other_fields(entry, words):
    with pytest.raises(InputError, match=f"DATASETS.COCO_FORMAT: .*{words}"):
        register([entry])


def test_a_class_whose_name_is_no_text(files, config):
    content = valid_content()
    content["categories"][0]["name"] = ["cat"]
    entry = {"name": "mine", **dict(zip(("json", "images"), files(content)))}
    keys = ["DATASETS.COCO_FORMAT", [entry], "DATASETS.TRAIN", ("mine",), "DATASETS.TEST", ()]
    cfg = config("lr", *keys, "DATASETS.CLASSES", ["dog", "cat"])
    with pytest.raises(InputError, match="category 5: name should be a text"):
        KDTrainer.build_train_loader(cfg)


def test_training_and_evaluation_name_what_is_missing(config, tmp_path):
    entry = {"name": "gone", "json": str(tmp_path / "no.json"), "images": str(tmp_path / "no")}
    keys = ["DATASETS.COCO_FORMAT", [entry], "DATASETS.TRAIN", ("gone",)]
    own = config("lr", *keys, "DATASETS.TEST", ("gone",))
    names = ("coco_2014_minival_100",)
    builtin = config("lr", "DATASETS.TRAIN", names, "DATASETS.TEST", names)
    for cfg, words in (
        (own, "'gone': the annotation file '.*no.json' .*DETECTRON2_DATASETS"),
        (builtin, "coco_2014.*instances_minival2014_100.json.*DETECTRON2"),
    ):
        for build in (KDTrainer.build_train_loader, lambda c: KDTrainer.test(c, None)):
            with pytest.raises(InputError, match=words):
                build(cfg)
