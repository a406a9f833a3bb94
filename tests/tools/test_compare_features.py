"""tools/analysis/compare_features.py: of models that are the target, near it and far from it."""

import json
import re

import pytest
import torch
from detectron2.modeling import build_model
from helpers import load_tool, run_script

from msad_kd.checkpoint.start import init_from_teacher
from msad_kd.distill.teacher_spec import TeacherSpec

tool = load_tool("compare_features")


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


def test_distances():
    target = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]])
    assert tool.distances(target, target) == {"distance": 0.0, "r2": 1.0}
    assert tool.distances(target, target[:1].expand(3, 2)) == {"distance": 1.5}
    means = target.mean(0).expand(3, 2)
    assert tool.distances(means, target) == {"distance": pytest.approx(4 / 3), "r2": 0.0}
    # Squared error 6, squared deviation 8 + 6.
    assert tool.distances(target + 1, target) == {"distance": 1.0, "r2": pytest.approx(1 - 6 / 14)}


@pytest.mark.long
def test_plain_models(config_files, weights, tmp_path):
    arguments = ["--config-file", config_files["student"], "--split", "train"]
    arguments += ["--json", tmp_path / "new" / "f.json"]
    for name, file in weights.items():
        arguments += ["--model", name, file]
    arguments += ["KD.TEACHER.CONFIG_FILE", config_files["lr"], "KD.TEACHER.BRANCH", "lr"]
    arguments += ["KD.TEACHER.WEIGHTS", weights["first"]]
    done = run_script("tools/analysis/compare_features.py", *arguments)
    result = json.loads((tmp_path / "new" / "f.json").read_text())
    assert result["images"] == 6 and len(result["data"]) == 1
    assert list(result["levels"]) == ["p2", "p3", "p4", "p5", "p6"]
    for level, entries in result["levels"].items():
        magnitude = result["magnitude"][level]
        assert magnitude > 0
        assert entries["first"]["distance"] == 0 and entries["first"]["r2"] == 1
        assert entries["second"]["distance"] > 0 and entries["second"]["r2"] < 1
        scaled = magnitude if level == "p2" else 0
        assert entries["scaled"]["distance"] == pytest.approx(scaled, rel=1e-5)
        assert re.search(rf"^\| {level} +\| +{magnitude:.3f} \| first ", done.stdout, re.M)
    # Doubled, the features are not the target's, and a convolution makes them so.
    p2 = result["levels"]["p2"]
    assert p2["scaled"]["r2"] < 0.9 and p2["scaled"]["fitted"] > 0.999
    assert p2["second"]["fitted"] < 0.9
    assert "fitted" not in result["levels"]["p6"]["first"]  # a cell or two of an image: too few
    assert "6 images of" in done.stdout and "R2: share of the target's variance" in done.stdout
    for name in weights:  # each progress bar names its model
        assert f"{name}: 100%" in done.stderr


def test_a_fused_teacher_and_where_its_student_started(
    student_config, config_files, teacher_weights, capsys, tmp_path
):
    cfg = student_config()
    model = build_model(cfg)
    init_from_teacher(model, TeacherSpec.from_config(cfg).build().model)
    start, file = str(tmp_path / "start.pth"), tmp_path / "found.json"
    torch.save({"model": model.state_dict()}, start)
    (train,) = cfg.DATASETS.TRAIN
    arguments = ["--config-file", str(config_files["student"]), "--model", "start", start]
    arguments += ["--images", "5", "--cells", "7", "--json", str(file)]
    options = ["KD.TEACHER.WEIGHTS", str(teacher_weights), "DATASETS.TEST", f"('{train}',)"]
    tool.main([*arguments, *options])
    printed = capsys.readouterr().out
    result = json.loads(file.read_text())
    assert result["cells"] == 7 and "5 images of" in printed and "branch fused" in printed
    for entries in result["levels"].values():
        assert list(entries) == ["start", tool.START]
        assert entries["start"] == pytest.approx(entries[tool.START])
        assert entries["start"]["distance"] > 0

    tool.main([*arguments, *options, "KD.TEACHER.BRANCH", "lr"])
    for entries in json.loads(file.read_text())["levels"].values():
        assert entries["start"]["distance"] == 0


def test_a_teacher_of_another_width(config_files, weights, config, tmp_path, capsys):
    wide = ["MODEL.FPN.OUT_CHANNELS", "24"]
    file = str(tmp_path / "wide.pth")
    torch.save({"model": build_model(config("hr", *wide)).state_dict()}, file)
    arguments = ["--config-file", str(config_files["student"]), "--split", "train"]
    arguments += ["--model", "first", weights["first"]]
    options = ["KD.TEACHER.CONFIG_FILE", str(config_files["hr"]), "KD.TEACHER.BRANCH", "hr"]
    options += ["KD.TEACHER.WEIGHTS", file, "KD.TEACHER.OPTS", str(wide)]
    tool.main([*arguments, *options])
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| p2"))
    *_, distance, r2, fitted, _ = (cell.strip() for cell in row.split("|"))
    assert (distance, r2) == ("-", "-") and float(fitted) < 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "first", "other.pth"], "--model first: names must differ"),
        (["--model", tool.START, "other.pth"], f"names must differ, also from '{tool.START}'"),
        (["--model", "a|b", "other.pth"], r"--model a\|b: names .* have no"),
        (["--model", "other", "gone.pth"], "'gone.pth' for --model other does not exist"),
        (["--split", "test", "DATASETS.TEST", "()"], "set DATASETS.TEST"),
    ],
)
def test_mistakes(config_files, weights, arguments, words, capsys):
    given = ["--config-file", str(config_files["student"]), "--model", "first", weights["first"]]
    with pytest.raises(SystemExit) as end:
        tool.main([*given, *arguments])
    assert re.search(words, f"{end.value} {capsys.readouterr().err}")  # the second: argparse's own
