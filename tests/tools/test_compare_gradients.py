"""tools/analysis/compare_gradients.py: once as a process of its own, then by its parts."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, load_tool

from msad_kd import KDTrainer
from msad_kd.utils.errors import InputError

LOSSES = "[{'name': 'l1', 'weight': 0.6, 'warmup_iters': 9}, {'name': 'mse', 'weight': 1.0, %s}]"


tool = load_tool("compare_gradients")


def test_summary():
    # Ten images in two batches. One has 11 of the 20; each has 1 in boxes.
    few, many = torch.ones(4, 2), torch.ones(6, 2)
    many[0, 0] = 11.0
    detection = [torch.full((4, 2), 4.0), torch.full((6, 2), 2 / 3)]
    expected = {"in_boxes": 0.5, "in_tenth": 0.55, "norm": pytest.approx((0.5 + 2.0) / 2)}
    assert tool.summary([few, many], detection) == expected
    nothing = torch.zeros(4, 2)
    assert set(tool.summary([nothing], [nothing]).values()) == {None}


def test_where_the_losses_of_a_student_pull(config_files, teacher_weights, tmp_path):
    command = [sys.executable, str(ROOT / "tools/analysis/compare_gradients.py"), "--batches", "2"]
    command += ["--config-file", str(config_files["student"]), "--json", str(tmp_path / "g.json")]
    command += ["KD.LOSSES", LOSSES % "'levels': ['p2']", "KD.TEACHER.WEIGHTS"]
    done = subprocess.run([*command, str(teacher_weights)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
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
    args = SimpleNamespace(config_file=str(config_files["student"]), weights="", batches=1)
    args.opts = ["KD.TEACHER.WEIGHTS", str(teacher_weights)]
    start = tool.measure(args)
    args.weights = str(weights)
    other = tool.measure(args)
    assert other["levels"] != start["levels"]
    assert f"weights: '{weights}'" in tool.markdown(other)


@pytest.mark.parametrize(("role", "losses"), [("lr", LOSSES % ""), ("student", "[]")])
def test_a_config_without_losses(config_files, role, losses):
    args = SimpleNamespace(config_file=str(config_files[role]), weights="", batches=1)
    args.opts = ["KD.LOSSES", losses.replace(", }", "}")]
    words = f"{role}.yaml' is not the config of a student with KD.LOSSES"
    with pytest.raises(InputError, match=words):
        tool.measure(args)
