"""tools/analysis/compare_gradients.py: once as a process of its own, then by its parts."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers import load_tool, run_script

from msad_kd import KDTrainer
from msad_kd.utils.errors import InputError

LOSSES = "[{'name': 'l1', 'weight': 0.6, 'warmup_iters': 9}, {'name': 'mse', 'weight': 1.0%s}]"

tool = load_tool("compare_gradients")


def test_summary():
    # Ten images in two batches. One has 11 of the 20; each has 1 in boxes.
    few, many = torch.ones(4, 2), torch.ones(6, 2)
    many[0, 0] = 11.0
    detection = [torch.full((4, 2), 4.0), torch.full((6, 2), 2 / 3)]
    expected = {"in_boxes": 0.5, "in_tenth": 0.55, "norm": pytest.approx((0.5 + 2.0) / 2)}
    assert tool.summary([few, many], detection) == expected
    nothing = torch.zeros(4, 2)
    assert set((none := tool.summary([nothing], [nothing])).values()) == {None}
    result = {"levels": {"p2": {"cells": 0.5, "losses": {"l1": none}}}, "weights": ""}
    line = tool.markdown({**result, "batches": 1, "images": 2}).splitlines()[2]
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "p2",
        "l1",
        "-",
        "0.50",
        "-",
        "-",
    ]


def test_cells_that_boxes_touch():
    boxes = torch.tensor([[0.0, 0.0, 4.0, 3.0], [7.0, 5.0, 13.0, 6.0]])
    assert tool.cells_in_boxes(boxes, 4, 2, 4).int().tolist() == [[1, 0, 0, 0], [0, 1, 1, 1]]
    assert not tool.cells_in_boxes(boxes[:0], 4, 2, 4).any()
    beyond = torch.tensor([[-9.0, -9.0, 8.0, 3.0]])
    assert tool.cells_in_boxes(beyond, 4, 2, 4).int().tolist() == [[1, 1, 0, 0], [0] * 4]


def test_where_the_losses_of_a_student_pull(config_files, teacher_weights, tmp_path):
    arguments = ["--config-file", config_files["student"], "--json", tmp_path / "g.json"]
    arguments += ["--batches", 2, "KD.LOSSES", LOSSES % ", 'levels': ['p2']"]
    arguments += ["KD.TEACHER.WEIGHTS", teacher_weights]
    done = run_script("tools/analysis/compare_gradients.py", *arguments)
    assert "| p2      | mse" in done.stdout and "2 training batches of 2 images" in done.stdout
    levels = json.loads((tmp_path / "g.json").read_text())["levels"]
    assert list(levels) == ["p2", "p3", "p4", "p5", "p6"]
    p2 = levels["p2"]
    assert p2["losses"].keys() == {"detection", "l1", "mse"}
    assert levels["p3"]["losses"].keys() >= {"l1"} and "mse" not in levels["p3"]["losses"]
    assert 0 < p2["cells"] < 1
    # The gradient of l1 is a sign: alike in every cell.
    assert p2["losses"]["l1"]["in_boxes"] == pytest.approx(p2["cells"], abs=0.01)
    assert p2["losses"]["detection"]["norm"] == 1.0
    assert p2["losses"]["mse"]["norm"] > 0


def test_at_a_checkpoint(config, config_files, teacher_weights, tmp_path):
    weights = tmp_path / "student.pth"
    torch.save({"model": KDTrainer.build_model(config("lr")).state_dict()}, weights)
    args = {"config_file": str(config_files["student"]), "batches": 1}
    # A batch is one pass, also if a step of the training has two.
    args["opts"] = ["KD.TEACHER.WEIGHTS", str(teacher_weights), "SOLVER.ACCUMULATE", 2]
    _, _, batches = tool.load_student(SimpleNamespace(**args, weights=""))
    assert [len(batch) for batch in batches] == [2]
    start, other = (tool.measure(SimpleNamespace(**args, weights=x)) for x in ("", str(weights)))
    assert other["levels"] != start["levels"]
    assert f"weights: '{weights}'" in tool.markdown(other)


@pytest.mark.parametrize(("role", "losses"), [("lr", LOSSES % ""), ("student", "[]")])
def test_a_config_without_losses(config_files, role, losses):
    args = SimpleNamespace(config_file=str(config_files[role]), opts=["KD.LOSSES", losses])
    with pytest.raises(InputError, match=f"{role}.yaml' is not the config of a student with KD.L"):
        tool.measure(args)
