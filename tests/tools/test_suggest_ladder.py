"""suggest_ladder.py: end to end with tiny models, and its error messages."""

import json

import pytest
import torch
import yaml
from detectron2.modeling import build_model
from helpers import load_tool, run_script

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
    expected = ["TEST.EXPECTED_RESULTS", "[['segm', 'AP', 30.0, 0.1], ['bbox', 'AP', 0.5, 0.1]]"]
    arguments = [*pool["student"], *pool["fused"], *expected, *pool["plain"], *pool["output"]]
    arguments += ["--teacher", "same", *pool["plain"][2:], *expected, "--image", "same=lr"]
    arguments += ["--ap", "fused=40.2", "--images", "6", "--iterations", "7"]
    printed = run_script("tools/analysis/suggest_ladder.py", *arguments).stdout
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
    assert "stride 32 left out: its 36 rows are too few for 16 channels" in printed
    assert "plain: p2 left out" in printed and "student: p6 left out" in printed
    assert (results["images"], results["cells"], results["strides"]) == (6, 64, [8, 16])
    ap = results["ap"]
    assert (ap["fused"], ap["same"]) == (40.2, 0.5) and 0 <= ap["plain"] < 40  # it is measured
    assert results["method"].startswith("MTPD-style")

    order, excluded = results["order"], results["excluded"]
    assert order[-1] == "fused"
    assert sorted([*order, *excluded]) == ["fused", "plain", "same"]
    assert f"student -> {' -> '.join(order)}" in printed
    assert all(f"Left out: {name}, {reason}" in printed for name, reason in excluded.items())

    block = (tmp_path / "suggested" / "stages.yaml").read_text()
    assert block in printed
    stages = yaml.safe_load(block)["KD"]["LADDER"]["STAGES"]
    assert stages == results["stages"]
    assert [stage.name for stage in read_stages(stages)] == order  # train_net.py reads them
    fused = {"kind": "fused", "config_file": str(config_files["teacher"])}
    fused |= {"losses": [{"name": "l1", "weight": 0.6, "warmup_iters": 4}]}
    assert (fused | {"iterations": 7, "base_lr": 0.001}).items() <= stages[-1].items()
    starts = [stage["start"] for stage in stages]
    first = "teacher" if order[0] == "fused" else "teacher_heads"
    assert starts == [first] + ["previous"] * (len(order) - 1)
    files = {path.name: path.read_bytes()[:4] for path in (tmp_path / "suggested").iterdir()}
    assert files.keys() == {"ladder.json", "ladder.png", "stages.yaml"}  # and no features
    assert files["ladder.png"] == b"\x89PNG"


@pytest.mark.parametrize(("name", "start"), [("fused", "teacher"), ("plain", "teacher_heads")])
def test_one_teacher_and_an_untrained_student(tool, pool, capsys, tmp_path, name, start):
    tool(*pool["student"][:2], *pool[name], *pool["output"], "--images", "6")
    printed = capsys.readouterr().out
    assert "Warning: the student has no trained weights" in printed
    assert f"student -> {name}" in printed
    content = yaml.safe_load((tmp_path / "suggested" / "stages.yaml").read_text())
    (stage,) = content["KD"]["LADDER"]["STAGES"]
    assert [stage[key] for key in ("image", "start", "iterations")] == ["hr", start, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--teacher", "fused", "x.yaml", "x.pth"], "--teacher fused: give each .* its own name"),
        (["--teacher", "a/b", "x.yaml", "x.pth"], "--teacher a/b: .* letters"),
        (["--teacher", "other", "x.yaml"], "--teacher other: give NAME CONFIG WEIGHTS"),
        (["--teacher", "other", "hr", "x.pth"], "--teacher other: .*'x.pth' .* does not exist"),
        (["--teacher", "other", "hr", "WEIGHTS"], "--teacher other: .*does not fit .*hr.yaml"),
        (["--student", "lr", "x.pth"], "'x.pth' for the student's config .* does not exist"),
        (["--student", "a.yaml", "b.pth", "c"], "--student: give CONFIG and"),
        (["--ap", "other=40"], r"--ap other=40: give NAME=VALUE; the teachers are \['fused'\]"),
        (["--ap", "fused=much"], "--ap fused=much: the AP must be a number"),
        (["--ap", "fused=nan"], "--ap fused=nan: the AP must be a number from 0 to 100"),
        (["--teacher", "a", "hr", "WEIGHTS", "--image", "a=both"], "is 'both'.*reads hr or lr"),
        (["--cells", "1", "--images", "5"], "5 images of 1 cells a level are too few for 16"),
        (["--opts", "DATASETS.TRAIN", "()"], "no data set is named; set DATASETS.TRAIN"),
        (["--opts", "KD.SCALE", "4"], "--teacher fused: KD.SCALE is 2 in .* and 4"),
    ],
)
def test_invalid_arguments(tool, pool, config_files, arguments, message):
    files = {**config_files, "WEIGHTS": pool["fused"][-1]}
    arguments = [str(files.get(word, word)) for word in arguments]
    with pytest.raises(InputError, match=message):
        tool(*pool["student"], *pool["fused"], *pool["output"], *arguments)


@pytest.mark.long
def test_when_the_ap_cannot_be_measured(tool, pool, config):
    wrong = ["MODEL.ROI_HEADS.NUM_CLASSES", "3"]
    torch.save({"model": build_model(config("hr", *wrong)).state_dict()}, pool["plain"][3])
    pair = [
        *pool["student"],
        *pool["plain"],
        *wrong,
        *pool["fused"],
        *pool["output"],
        "--images",
        "6",
    ]
    with pytest.raises(InputError, match="plain predicts 3 classes and the data have 8, .*--ap pl"):
        tool(*pair, "--ap", "fused=40")
    with pytest.raises(InputError, match="DATASETS.TEST is empty, .*--ap plain=..."):
        tool(*pair, "--ap", "fused=40", "--opts", "DATASETS.TEST", "()")
