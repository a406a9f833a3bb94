"""tools/compare_features.py: of models that are the target, near it and far from it."""

import json
import subprocess
import sys

import pytest
import torch
from detectron2.modeling import build_model
from helpers import ROOT

from msad_kd.errors import InputError


@pytest.fixture
def tool(monkeypatch):
    """The tool as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import compare_features

    return compare_features


@pytest.fixture
def weights(config, tmp_path):
    """Files of the student's net: "first" and "second", and "scaled", "first" with p2 doubled."""
    files = {name: tmp_path / f"{name}.pth" for name in ("first", "second", "scaled")}
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        torch.save({"model": build_model(config("lr")).state_dict()}, files[name])
    state = torch.load(files["first"], weights_only=True)["model"]
    for kind in ("weight", "bias"):
        state[f"backbone.fpn_output2.{kind}"] *= 2
    torch.save({"model": state}, files["scaled"])
    return {name: str(file) for name, file in files.items()}


def test_distances(tool):
    target = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]])
    assert tool.distances(target, target) == {"distance": 0.0, "r2": 1.0}
    means = target.mean(0).expand(3, 2)
    assert tool.distances(means, target) == {"distance": pytest.approx(4 / 3), "r2": 0.0}
    # Squared error 6, squared deviation 8 + 6.
    assert tool.distances(target + 1, target) == {"distance": 1.0, "r2": pytest.approx(1 - 6 / 14)}


def test_against_a_teacher_of_the_students_net(config_files, weights, tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "compare_features.py"), "--split", "train"]
    command += ["--config-file", str(config_files["student"]), "--json", str(tmp_path / "f.json")]
    for name, file in weights.items():
        command += ["--model", name, file]
    command += ["KD.TEACHER.CONFIG_FILE", str(config_files["lr"]), "KD.TEACHER.BRANCH", "lr"]
    done = subprocess.run(
        [*command, "KD.TEACHER.WEIGHTS", weights["first"]], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["images"] == 6 and len(found["data"]) == 1
    assert list(found["levels"]) == ["p2", "p3", "p4", "p5", "p6"]
    for level, entries in found["levels"].items():
        magnitude = entries.pop("target")["magnitude"]
        assert magnitude > 0
        assert entries["first"]["distance"] == 0 and entries["first"]["r2"] == 1
        assert entries["second"]["distance"] > 0 and entries["second"]["r2"] < 1
        scaled = magnitude if level == "p2" else 0
        assert entries["scaled"]["distance"] == pytest.approx(scaled, rel=1e-5)
        row = f"| {level}      |"
        assert row in done.stdout
    # Doubled, the features are not the target's, and a convolution makes them so.
    p2 = found["levels"]["p2"]
    assert p2["scaled"]["r2"] < 0.9 and p2["scaled"]["fitted"] > 0.999
    assert p2["second"]["fitted"] < 0.9
    assert "fitted" not in found["levels"]["p6"]["first"]  # a cell or two of an image: too few
    assert "6 images of" in done.stdout


def test_against_a_fused_teacher(tool, config_files, weights, teacher_weights, capsys):
    arguments = ["--config-file", str(config_files["student"]), "--split", "train", "--images", "5"]
    arguments += ["--model", "first", weights["first"], "KD.TEACHER.WEIGHTS", str(teacher_weights)]
    tool.main(tool.build_parser().parse_args(arguments))
    printed = capsys.readouterr().out
    assert "5 images of" in printed and printed.count("| first ") == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "first", "other.pth"], "--model: names are to differ"),
        (["--model", "target", "other.pth"], "none is 'target'"),
        (["--model", "other", "gone.pth"], "'gone.pth' for the student's config .* does not exist"),
        (["--split", "test"], "five images or more.*there are 3"),
        (["KD.TEACHER.CONFIG_FILE", ""], "KD.TEACHER.CONFIG_FILE is empty"),
        (["KD.TEACHER.WEIGHTS", "gone.pth"], "'gone.pth' .* does not exist"),
    ],
)
def test_what_does_not_do(tool, config_files, weights, teacher_weights, arguments, words):
    given = ["--config-file", str(config_files["student"]), "--model", "first", weights["first"]]
    given += ["--split", "train", "--images", "5"]
    options = ["KD.TEACHER.WEIGHTS", str(teacher_weights)]
    flags, opts = (arguments, []) if arguments[0].startswith("--") else ([], arguments)
    with pytest.raises(InputError, match=words):
        tool.main(tool.build_parser().parse_args([*given, *flags, *options, *opts]))
