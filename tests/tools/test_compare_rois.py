"""tools/analysis/compare_rois.py: by its parts, and once on a student."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes
from helpers import ground_truth, load_tool

from msad_kd.losses import RoIPredictions
from msad_kd.utils.errors import InputError

tool = load_tool("compare_rois")
# A region with IoU 0.8 with the first of two boxes, and one that meets neither.
TRUTH = np.array([[0, 0, 10, 10], [20, 20, 30, 30]])
REGIONS = torch.tensor([[0.0, 0.0, 10.0, 8.0], [40.0, 40.0, 50.0, 50.0]])
HEADS = SimpleNamespace(
    num_classes=2,
    proposal_matcher=Matcher([0.5], [0, 1], allow_low_quality_matches=False),
    box_predictor=SimpleNamespace(box2box_transform=Box2BoxTransform((1.0, 1.0, 1.0, 1.0))),
)


def test_targets():
    classes, corners = tool.targets_of(HEADS, Boxes(REGIONS), ground_truth((64, 64), TRUTH))
    assert classes.tolist() == [0, 2] and corners[0].tolist() == [0, 0, 10, 10]
    nothing = ground_truth((64, 64), TRUTH[:0])
    assert tool.targets_of(HEADS, Boxes(REGIONS), nothing)[0].tolist() == [2, 2]


def test_what_is_compared():
    targets = tool.targets_of(HEADS, Boxes(REGIONS), ground_truth((64, 64), TRUTH))
    uniform, sure = [1 / 3] * 3, [0.25, 0.5, 0.25]
    student, teacher = (torch.tensor(x).log() for x in ([uniform, sure], [sure, sure]))
    exact = torch.zeros(2, 8)
    exact[0, 1], exact[0, 3] = 1 / 8, np.log(10 / 8)  # dy, dh of class 0
    predictions = (
        RoIPredictions(student, torch.zeros(2, 8), None),
        RoIPredictions(teacher, exact, None),
    )
    found = tool.compare([HEADS, HEADS], REGIONS, *targets, predictions)
    kl = 0.5 * np.log(0.75) + 0.5 * np.log(1.5)
    expected = {"objects": [1, 0], "teacher": [1, 1], "kl_fg": [kl], "kl_bg": [0]}
    # The teacher's best is class 1 of both regions.
    expected |= {"differ_fg": [1], "differ_bg": [1]}
    expected |= {"iou_proposed": [0.8], "iou_student": [0.8], "iou_teacher": [1]}
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].tolist() == pytest.approx(values, abs=1e-6), name


def test_on_a_student(config_files, teacher_weights, tmp_path, capsys):
    arguments = ["--config-file", config_files["student"], "--json", tmp_path / "r.json"]
    sources = "student", "both", "teacher"
    losses = str([{"name": "roi_class", "weight": 1.0, "proposals": x} for x in sources])
    arguments += ["--batches", 2, "KD.LOSSES", losses, "KD.TEACHER.WEIGHTS", teacher_weights]
    parser = tool.build_parser(tool.__doc__)
    tool.report(parser, tool.measure, tool.markdown, [*map(str, arguments)])
    assert "2 training batches of 2 images; weights: the student's start" in capsys.readouterr().out
    found = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["proposals"] for row in found] == list(sources)
    own, both, theirs = found
    assert both["regions"] == own["regions"] + theirs["regions"] and own["norm"] > 0
    share = own["regions"] / both["regions"]
    average = share * own["objects"] + (1 - share) * theirs["objects"]
    assert both["objects"] == pytest.approx(average)
    assert 0 < own["objects"] < 1 and 0.5 <= own["iou_proposed"] <= 1


def test_a_config_without_roi_losses(config_files, teacher_weights):
    args = SimpleNamespace(config_file=str(config_files["student"]), weights="", batches=1)
    args.opts = ["KD.TEACHER.WEIGHTS", str(teacher_weights)]
    with pytest.raises(InputError, match="student.yaml' has no roi_ loss"):
        tool.measure(args)
