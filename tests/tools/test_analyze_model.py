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
    process = subprocess.run(
        [str(word) for word in (*command, config_files["teacher"], *options)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    found = json.loads((tmp_path / "costs.json").read_text())
    assert list(found["branches"]) == ["hr", "lr", "fused"] and found["images"] == 2
    fused = found["branches"]["fused"]
    assert fused["side"] == "64 + 32" and fused["detections"] > 0
    model = KDTrainer.build_model(config("teacher"))
    params = sum(each.numel() for each in model.parameters()) / 1e6
    assert fused["params_m"]["total"] == pytest.approx(params)
    header, _, *lines = [line for line in process.stdout.splitlines() if line.startswith("|")]
    assert cells(header)[:4] == ["part", "params (M)", "GMACs hr", "activations (M) hr"]
    parts = ["bottom-up", "FPN", "fusion", "RPN", "RoI heads", "rest", "total"]
    assert [cells(line)[0] for line in lines] == parts
    assert cells(lines[-1])[-2:] == [
        f"{fused[kind]['total']:.3f}" for kind in ("gmacs", "activations_m")
    ]
    assert "mean over 2" in process.stdout and "sees 64 + 32 px" in process.stdout


def test_a_student_sees_noise_without_weights(config_files, tmp_path, capsys):
    options = ["--json", str(tmp_path / "costs.json"), "--image-size", "64", "128"]
    load_tool("analyze_model").main(["--config-file", str(config_files["student"]), *options])
    (costs,) = json.loads((tmp_path / "costs.json").read_text())["branches"].values()
    assert costs["side"] == "32" and costs["gmacs"]["RoI heads"] > 0
    assert "weights random: the model sees 32 px" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["costs.json"]


def test_an_exported_student_lacks_the_parts_of_its_losses(config, config_files, tmp_path, capsys):
    weights = tmp_path / "exported.pth"
    torch.save({"model": KDTrainer.build_model(config("lr")).state_dict()}, weights)
    arguments = ["--config-file", str(config_files["student"]), "--weights", str(weights)]
    losses = ["KD.LOSSES", "[{'name': 'mgd', 'weight': 1.0}]", "KD.TEACHER.CONFIG_FILE", "no.yaml"]
    load_tool("analyze_model").main([*arguments, "--image-size", "64", "128", *losses])
    assert f"weights of '{weights}'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--weights", "nowhere.pth"], "'nowhere.pth' for the config .* does not exist"),
        (["--test-images", "0"], "--test-images: 0 is below 1"),
        (["--test-images", "1", "DATASETS.TEST", "()"], "no data set; set DATASETS.TEST"),
        (["MODEL.FPNN", "3"], "unknown config key: MODEL.FPNN"),
    ],
)
def test_mistakes_are_told_in_a_sentence(config_files, capsys, arguments, words):
    with pytest.raises(SystemExit, match="2"):
        load_tool("analyze_model").main(["--config-file", str(config_files["lr"]), *arguments])
    assert re.search(words, capsys.readouterr().err.splitlines()[-1])
