"""What distill.py reads and writes: the data once they are sound, and no folder of another run."""

import argparse
import json
import sys

import pytest
import torch
from helpers import coco_format, load_tool

from msad_kd import KDTrainer
from msad_kd.config.build import build_config
from msad_kd.utils.errors import InputError


@pytest.fixture
def said(monkeypatch):
    """A list of whether a check of the data was quick; the first one fails."""
    quick = []

    def run(*arguments):
        quick.append("--quick" in arguments)
        if len(quick) == 1:
            sys.exit("a fault")

    monkeypatch.setattr(load_tool("tools.distill"), "run_tool", run)
    return quick


def test_data_are_read_whole_until_they_were_sound(said, config_files, data, tmp_path):
    tool, args = load_tool("tools.distill"), argparse.Namespace(output=tmp_path)
    (tmp_path / "data").mkdir()
    copy = tmp_path / "train.json"
    copy.write_bytes((data / "annotations" / "instances_train.json").read_bytes())
    entries = [{"name": "copy", "json": str(copy), "images": str(data / "train")}]
    keys = ["DATASETS.COCO_FORMAT", entries, "DATASETS.TRAIN", ["copy"], "DATASETS.TEST", ["copy"]]
    cfg = build_config(str(config_files["lr"]), keys)
    with pytest.raises(SystemExit):
        tool.check_data(args, cfg)
    for _ in range(2):
        tool.check_data(args, cfg)
    assert said == [False, False, True]
    with open(copy, "a") as file:
        file.write(" ")
    with pytest.raises(SystemExit, match=f"'{copy}' has changed since .* was begun.*--output"):
        tool.check_data(args, cfg)
    assert len(said) == 3


def test_without_objects_there_is_nothing_to_compare_by(said, config_files, data, tmp_path):
    tool = load_tool("tools.distill")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "SOUND").touch()
    content = json.loads((data / "annotations" / "instances_val.json").read_text())
    (tmp_path / "bare.json").write_text(json.dumps({**content, "annotations": []}))
    entry = {"name": "bare", "json": str(tmp_path / "bare.json"), "images": str(data / "val")}
    keys = ["DATASETS.COCO_FORMAT", [*coco_format(data, "tiny"), entry], "DATASETS.TEST", ["bare"]]
    cfg = build_config(str(config_files["lr"]), keys)
    said.append(False)  # it was sound
    with pytest.raises(SystemExit, match="distill.py: 'bare' has no objects"):
        tool.check_data(argparse.Namespace(output=tmp_path), cfg)
    weights = str(tmp_path / "lr.pth")
    torch.save({"model": KDTrainer.build_model(cfg).state_dict()}, weights)
    words = ["--sizes", "32", "--output", str(tmp_path / "sweep"), "--model", "a"]
    with pytest.raises(SystemExit, match="'bare' has no objects, so there is no AP"):
        load_tool("resolution_sweep").main(
            [*words, str(config_files["lr"]), weights, *map(str, keys)]
        )


def test_nothing_is_written_where_a_run_is_at_work(config_files, tmp_path):
    tool = load_tool("tools.distill")
    words = ["--config-file", str(config_files["hr"]), "--output", str(tmp_path), "--dry-run"]
    with tool.locked(tmp_path), pytest.raises(SystemExit, match="distill.py: another run"):
        tool.main(words)
    assert [x.name for x in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize(("scores", "labels"), [([0.5], "2.0"), ([0.5, 0.8] * 4, "1.5")])
def test_labels_of_an_image_beside_its_objects(scores, labels, config_files, data, tmp_path):
    truth = json.loads((data / "annotations" / "instances_train.json").read_text())
    objects = len(truth["annotations"]) / len(truth["images"])
    keys = ["KD.UNLABELED.SCORE", scores, "DATASETS.TRAIN", ["tiny_train"]]
    cfg = build_config(str(config_files["lr"]), keys)
    # The file has the classes in another order than the student.
    names = [x["name"] for x in sorted(truth["categories"], key=lambda x: x["id"])][::-1]
    found = [(8, 0.9), (8, 0.5), (8, 0.4), (7, 0.9), (7, 0.7)]
    annotations = [dict(zip(("category_id", "score"), each)) for each in found]
    content = {"images": [{}, {}], "categories": [{"name": x} for x in names]}
    (tmp_path / "labels.json").write_text(json.dumps({**content, "annotations": annotations}))
    said = load_tool("tools.distill").describe_labels(tmp_path / "labels.json", cfg)
    assert said.startswith(f"An image without labels gets {labels} labels (")
    assert f"a labelled one has {objects:.1f} objects" in said


def test_labels_that_teach_that_images_are_empty(config_files, data, tmp_path):
    """No detection is an object: refused. Few are: a warning. No detection: the teacher labels."""
    cfg, file = build_config(str(config_files["lr"]), []), tmp_path / "labels.json"
    describe = load_tool("tools.distill").describe_labels
    content = {"images": [{}] * 40, "categories": [{"name": "shape"}], "annotations": []}
    file.write_text(json.dumps(content))
    assert "gets 0.0 labels" in describe(file, cfg)
    content["annotations"] = [{"category_id": 1, "score": 0.4}]
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="none of the detections in .*labels.json' has a score"):
        describe(file, cfg)
    content["annotations"] += [{"category_id": 1, "score": 0.6}]
    file.write_text(json.dumps(content))
    assert describe(file, cfg).startswith("Warning: An image without labels gets 0.0 labels")


def test_keypoints_on_a_backbone_of_timm_are_not_exported(config_files, tmp_path, capsys):
    keys = ["MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.KEYPOINT_ON", True]
    cfg = build_config(str(config_files["lr"]), keys)
    load_tool("tools.distill").export_student(argparse.Namespace(output=tmp_path), cfg)
    said = capsys.readouterr().out
    assert said.startswith("Not exported: Detectron2 has no build_timm_fpn_backbone")
