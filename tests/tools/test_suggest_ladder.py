"""suggest_ladder.py: end to end with tiny models, and its error messages."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from detectron2.modeling import build_model
from helpers import ROOT, load_tool

from msad_kd.config.stages import read_stages
from msad_kd.utils.errors import InputError


@pytest.fixture
def tool():
    """tool(ARGUMENT, ...): run it in this process."""
    suggest_ladder = load_tool("suggest_ladder")
    return lambda *args: suggest_ladder.main(suggest_ladder.build_parser().parse_args(args))


@pytest.fixture
def pool(config, config_files, teacher_weights, tmp_path):
    """The arguments for a student, for the teachers "fused" and "plain", and for the output."""
    for role in ("lr", "hr"):
        torch.manual_seed(0)  # the same net, so the same weights
        torch.save({"model": build_model(config(role)).state_dict()}, tmp_path / f"{role}.pth")
    return {
        "student": ["--student", str(config_files["student"]), str(tmp_path / "lr.pth")],
        "fused": ["--teacher", "fused", str(config_files["teacher"]), str(teacher_weights)],
        "plain": ["--teacher", "plain", str(config_files["hr"]), str(tmp_path / "hr.pth")],
        "output": ["--output", str(tmp_path / "suggested")],
    }


def test_from_models_to_stages(pool, config_files, tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "analysis" / "suggest_ladder.py")]
    arguments = [*pool["student"], *pool["fused"], *pool["plain"], *pool["output"]]
    arguments += ["--teacher", "same", *pool["plain"][2:], "TEST.DETECTIONS_PER_IMAGE", "3"]
    arguments += ["--image", "same=lr", "--ap", "same=0.5", "--ap", "fused=40.2"]
    arguments += ["--images", "6", "--iterations", "7"]
    result = subprocess.run(command + arguments, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "suggested" / "ladder.json").read_text())

    names = ["student", "fused", "plain", "same"]
    assert list(results["costs"]) == names
    for a in names:
        assert list(results["costs"][a]) == names
        for b in names:
            cost = results["costs"][a][b]
            assert cost["low"] <= cost["value"] <= cost["high"]
            assert list(cost["levels"]) == ["stride 8", "stride 16"]
            # "same" has the student's weights and reads the student's image.
            alike = a == b or {a, b} == {"student", "same"}
            assert cost["value"] < 1e-6 if alike else cost["value"] > 0.01
    # 64 x 96 px have 2 x 3 cells at stride 32: too few of four images for 16 channels.
    assert "stride 32 left out: its 36 rows are too few for 16 channels" in result.stdout
    assert "plain: p2 left out" in result.stdout and "student: p6 left out" in result.stdout
    assert (results["images"], results["cells"], results["strides"]) == (6, 64, [8, 16])
    assert results["ap"]["fused"] == 40.2 and 0 <= results["ap"]["plain"] < 40  # measured
    assert results["method"].startswith("MTPD-style")

    order, excluded = results["order"], results["excluded"]
    assert order[-1] == "fused"
    assert sorted([*order, *excluded]) == ["fused", "plain", "same"]
    assert f"student -> {' -> '.join(order)}" in result.stdout
    assert all(f"Left out: {name}, {reason}" in result.stdout for name, reason in excluded.items())

    block = (tmp_path / "suggested" / "stages.yaml").read_text()
    assert block in result.stdout
    stages = yaml.safe_load(block)["KD"]["LADDER"]["STAGES"]
    assert stages == results["stages"]
    assert [stage["name"] for stage in stages] == order
    fused = {"kind": "fused", "config_file": str(config_files["teacher"])}
    fused |= {"losses": [{"name": "l1", "weight": 0.6, "warmup_iters": 4}]}
    assert (fused | {"iterations": 7, "base_lr": 0.001}).items() <= stages[-1].items()
    starts = [stage["start"] for stage in stages]
    first = "teacher" if order[0] == "fused" else "teacher_heads"
    assert starts == [first] + ["previous"] * (len(order) - 1)
    files = {path.name: path.read_bytes()[:4] for path in (tmp_path / "suggested").iterdir()}
    assert files.keys() == {"ladder.json", "ladder.png", "stages.yaml"}  # and no features
    assert files["ladder.png"] == b"\x89PNG"


def test_one_teacher_and_an_untrained_student(tool, pool, capsys, tmp_path):
    tool(*pool["student"][:2], *pool["plain"], *pool["output"], "--images", "6")
    printed = capsys.readouterr().out
    assert "Warning: the student has no trained weights" in printed
    assert "student -> plain" in printed
    content = yaml.safe_load((tmp_path / "suggested" / "stages.yaml").read_text())
    (stage,) = content["KD"]["LADDER"]["STAGES"]
    assert (stage["kind"], stage["image"], stage["iterations"]) == ("plain", "hr", 4)


def test_train_net_reads_the_stages(config):
    suggest_ladder, ladder_pool = load_tool("suggest_ladder"), load_tool("ladder_pool")
    own = {"config_file": "x.yaml", "weights": "x.pth", "opts": ["KEY", "1"]}
    pool = [
        ladder_pool.Entry("plain", None, {}, {"name": "plain", **own, "kind": "plain"}),
        ladder_pool.Entry("fused", None, {}, {"name": "fused", **own, "kind": "fused"}),
    ]
    settings = {"losses": config("student").KD.LOSSES, "iterations": 9, "base_lr": 0.1}
    suggested = suggest_ladder.ladder_stages(["fused", "plain"], pool, settings)
    read = read_stages(suggested)
    assert [(x.name, x.start) for x in read] == [("fused", "teacher"), ("plain", "previous")]


def test_a_config_may_state_its_ap(config, config_files):
    ladder_pool = load_tool("ladder_pool")
    cfg = config("student")
    expected = ["TEST.EXPECTED_RESULTS", "[['segm', 'AP', 30.0, 0.1], ['bbox', 'AP', 33.0, 0.1]]"]
    hr = str(config_files["hr"])  # also as the checkpoint, which is not read
    entries = ladder_pool.read_teachers([["plain", hr, hr, *expected]], [], cfg)
    assert ladder_pool.known_aps([], entries) == {"plain": 33.0}
    assert ladder_pool.known_aps(["plain=34.5"], entries) == {"plain": 34.5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--teacher", "fused", "x.yaml", "x.pth"], "--teacher fused: give each .* its own name"),
        (["--teacher", "a/b", "x.yaml", "x.pth"], "--teacher a/b: .* letters"),
        (["--teacher", "other", "x.yaml"], "--teacher other: give NAME CONFIG WEIGHTS"),
        (["--teacher", "other", "gone.yaml", "x.pth"], "--teacher other: .*'gone.yaml' does not"),
        (["--student", "a.yaml", "b.pth", "c"], "--student: give CONFIG and"),
        (["--student", "gone.yaml"], "config file 'gone.yaml' does not exist"),
        (["--ap", "other=40"], r"--ap other=40: give NAME=VALUE; the teachers are \['fused'\]"),
        (["--ap", "fused=much"], "--ap fused=much: the AP must be a number"),
        (["--image", "fused=lr"], "--teacher fused: its image is 'lr'.*multi-resolution one both"),
        (["--images", "4"], "five images or more.*there are 4"),
        (["--cells", "1", "--images", "5"], "5 images of 1 cells a level are too few for 16"),
        (["--opts", "DATASETS.TRAIN", "()"], "no data set is named; set DATASETS.TRAIN"),
        (["--opts", "DATASETS.TRAIN", "('coco_2017_train',)"], "set DETECTRON2_DATASETS to the"),
        (["--opts", "KD.SCALE", "4"], "--teacher fused: KD.SCALE is 2 in .* and 4"),
        (["--opts", "KD.SCAL", "4"], "unknown config key: KD.SCAL; did you mean KD.SCALE"),
    ],
)
def test_invalid_arguments(tool, pool, arguments, message):
    with pytest.raises(InputError, match=message):
        tool(*pool["student"], *pool["fused"], *pool["output"], *arguments)


@pytest.mark.parametrize("option", ["--images", "--cells", "--iterations"])
def test_numbers_below_one(tool, option, capsys):
    with pytest.raises(SystemExit, match="2"):
        tool("--student", "a.yaml", "--teacher", "a", "a.yaml", "a.pth", option, "0")
    assert f"{option}: 0 is below 1" in capsys.readouterr().err


def test_unusable_files(tool, pool):
    def run(*teacher, student=None):
        tool(*(student or pool["student"]), *teacher, *pool["output"])

    with pytest.raises(InputError, match="--teacher plain: .*'gone.pth' .* does not exist"):
        run(*pool["plain"][:3], "gone.pth")
    with pytest.raises(InputError, match="'gone.pth' for the student's config .* does not exist"):
        run(*pool["plain"], student=[*pool["student"][:2], "gone.pth"])
    with pytest.raises(InputError, match="--teacher plain: its image is 'both'.*reads hr or lr"):
        run(*pool["plain"], "--image", "plain=both")
    with pytest.raises(InputError, match="--teacher plain: .*does not fit .*hr.yaml"):
        run(*pool["plain"][:3], pool["fused"][-1])


def test_when_the_ap_cannot_be_measured(tool, pool):
    wrong = [*pool["plain"], "MODEL.ROI_HEADS.NUM_CLASSES", "3"]
    state = torch.load(wrong[3], weights_only=True)["model"]
    for part, rows in (("cls_score", 4), ("bbox_pred", 12)):
        for kind in ("weight", "bias"):
            key = f"roi_heads.box_predictor.{part}.{kind}"
            state[key] = state[key][:rows]
    for key in [key for key in state if "mask_head.predictor" in key]:
        state[key] = state[key][:3]
    torch.save({"model": state}, wrong[3])
    pair = [*pool["student"], *wrong, *pool["fused"], *pool["output"], "--images", "6"]
    with pytest.raises(InputError, match="plain predicts 3 classes and the data have 8, .*--ap pl"):
        tool(*pair, "--ap", "fused=40")
    with pytest.raises(InputError, match="DATASETS.TEST is empty, .*--ap plain=..."):
        tool(*pair, "--ap", "fused=40", "--opts", "DATASETS.TEST", "()")
