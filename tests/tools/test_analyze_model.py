"""tools/analysis/analyze_model.py: once as a process of its own, then by its main()."""

import json
import re
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, load_tool

from msad_kd import KDTrainer


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_teacher_by_branches(config_files, teacher_weights, config, tmp_path):
    command = [sys.executable, ROOT / "tools/analysis/analyze_model.py", "--config-file"]
    options = ["--weights", teacher_weights, "--test-images", 2, "--json", "costs.json"]
    words = [str(word) for word in (*command, config_files["teacher"], *options)]
    process = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / "costs.json").read_text())
    assert list(result["branches"]) == ["hr", "lr", "fused"] and result["images"] == 2
    fused = result["branches"]["fused"]
    assert fused["side"] == "64 + 32"
    model = KDTrainer.build_model(config("teacher"))
    params = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert fused["params_m"]["total"] == pytest.approx(params)
    header, _, *lines = [line for line in process.stdout.splitlines() if line.startswith("|")]
    assert cells(header)[:4] == ["part", "params (M)", "GMACs hr", "activations (M) hr"]
    parts = ["bottom-up", "FPN", "fusion", "RPN", "RoI heads", "rest", "total"]
    assert [cells(line)[0] for line in lines] == parts
    assert cells(lines[-1])[-2:] == [
        f"{fused[kind]['total']:.3f}" for kind in ("gmacs", "activations_m")
    ]
    assert "mean over 2" in process.stdout and "fused: 64 + 32 px" in process.stdout


def test_a_student_sees_noise_without_weights(config_files, tmp_path, capsys):
    options = ["--json", str(tmp_path / "costs.json"), "--image-size", "64", "128"]
    load_tool("analyze_model").main(["--config-file", str(config_files["student"]), *options])
    (costs,) = json.loads((tmp_path / "costs.json").read_text())["branches"].values()
    assert costs["side"] == "32" and costs["gmacs"]["RoI heads"] > 0
    out = capsys.readouterr().out
    assert "at 10 detections" in out and "the model: 32 px" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["costs.json"]


def test_a_stripped_student_needs_no_parts_of_its_losses(config, config_files, tmp_path):
    weights = tmp_path / "stripped.pth"
    torch.save({"model": KDTrainer.build_model(config("lr")).state_dict()}, weights)
    arguments = ["--config-file", str(config_files["student"]), "--weights", str(weights)]
    losses = ["KD.LOSSES", "[{'name': 'mgd', 'weight': 1.0}]", "KD.TEACHER.CONFIG_FILE", "no.yaml"]
    load_tool("analyze_model").main([*arguments, "--image-size", "64", "128", *losses])


def test_masks_cost_by_the_number_of_detections(config_files, tmp_path):
    heads = []
    for count in ("1", "3", "5"):
        arguments = ["--config-file", str(config_files["lr"]), "--detections", count]
        load_tool("analyze_model").main([*arguments, "--json", str(tmp_path / "costs.json")])
        costs = json.loads((tmp_path / "costs.json").read_text())["branches"][""]
        heads.append(costs["gmacs"]["RoI heads"])
    assert heads[2] - heads[1] == pytest.approx(heads[1] - heads[0]) and heads[0] < heads[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--weights", "nowhere.pth"], "'nowhere.pth' for the config .* does not exist"),
        (["--test-images", "0"], "--test-images: 0 is below 1"),
        (["--test-images", "1", "DATASETS.TEST", "()"], "no data set; set DATASETS.TEST"),
        (["MODEL.FPNN", "3"], "unknown config key: MODEL.FPNN"),
    ],
)
def test_mistakes_end_in_one_sentence(config_files, capsys, arguments, words):
    with pytest.raises(SystemExit, match="2"):
        load_tool("analyze_model").main(["--config-file", str(config_files["lr"]), *arguments])
    assert re.search(words, capsys.readouterr().err.splitlines()[-1])
