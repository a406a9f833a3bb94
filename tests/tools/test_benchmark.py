"""tools/benchmark.py measures every side, and its report says what was measured."""

import json
import re

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers import ROOT, load_tool

from msad_kd import build_config

CLASSES = ["MODEL.ROI_HEADS.NUM_CLASSES", "1"]


@pytest.fixture
def no_shapes():
    """Catalogs without the data sets that configs of other tests have registered."""
    for catalog in (DatasetCatalog.data, MetadataCatalog.data):
        for name in [x for x in catalog if x.startswith(("shapes_", "nuclei_"))]:
            del catalog[name]


def test_quick_run(tmp_path, no_shapes, capsys):
    tool = load_tool("benchmark")
    options = ["--rounds", "1", "--inference", "1", "--onnx", "--output", str(tmp_path)]
    tool.main(["--quick", *options, "MODEL.ANCHOR_GENERATOR.SIZES", "[16]"])
    text = capsys.readouterr().out
    assert re.findall("inference of (.*), batch 1", text) == ["LR", "HR", "LR, onnxruntime"]
    number = r"\d+\.\d\d"
    line = rf"student step / LR step: {number} \({number}-{number}\)"
    assert re.fullmatch(line, text.splitlines()[-1]) and "student mapper / HR mapper" in text
    assert (tmp_path / "benchmark.md").read_text() == text
    assert (tmp_path / "benchmark.png").stat().st_size > 1000
    result = json.loads((tmp_path / "benchmark.json").read_text())
    assert result["image_sizes"] == [64, 128, 64, 64]
    assert (
        result["fp32_on_cpu"] and result["product_gflops"][0] > 0.1 < result["teacher_gflop"][0] < 5
    )
    held = {name: x["held"] for name, x in result["memory"].items()}
    # The teacher's weights, and those of the copy that runs.
    assert held["LR"] == held["HR"] < held["plain teacher"] < held["student"]
    for name, (parts,) in result["rounds"].items():
        assert result["memory"][name]["step"] > 2**20
        assert {part for part, time in parts.items() if time > 0} == (
            parts.keys()
            if "teacher" in name or name == "student"
            else parts.keys() - {"teacher", "losses"}
        )


def results(**times):
    """A benchmark.json whose sides take these seconds for each part, a number a round."""
    parts = load_tool("benchmark_report").PARTS
    rounds = {name: [dict.fromkeys(parts, x) for x in xs] for name, xs in times.items()}
    result = {"config": "c", "options": ["KEY", 1], "machine": "m", "image_sizes": [4, 4, 4]}
    result |= {"batch": 1, "clock": "wall time", "rounds": rounds, "latency_ms": {}}
    result |= {"vs": None, "left_out": []}
    result |= {
        "fp32_on_cpu": True,
        "product_gflops": [2.0, 4.0, 1.0],
        "teacher_gflop": [4.0, 4.0, 4.0],
    }
    return {**result, "memory": {name: {"held": 2**29, "step": 2**30} for name in times}}


TIMES = {"LR": [1.0, 4.0, 2.0], "student": [3.0, 4.0, 3.0], "plain teacher": [6.0, 8.0, 3.0]}


def test_ratios_are_taken_within_a_round():
    lines = load_tool("benchmark_report").markdown(results(**TIMES)).splitlines()
    assert lines[0] == "c KEY 1"
    # Six parts take 3, 4 and 3 s each; at the product's rate the teacher would take 2, 1 and 4 s.
    assert lines[-3:] == [
        "teacher / plain teacher: 0.50 (0.50-1.00)",
        "teacher: 4 GFLOP at 0.67 (0.25-1.33) of the speed of a plain product of matrices; at its "
        "full speed, the next ratio would be 1.58 (0.88-2.83)",
        "student step / LR step: 1.50 (1.00-3.00)",
    ]


def test_another_precision_is_not_compared_with_an_fp32_product():
    lines = load_tool("benchmark_report").markdown({**results(**TIMES), "fp32_on_cpu": False})
    assert "GFLOP" not in lines and lines.endswith("student step / LR step: 1.50 (1.00-3.00)")


def test_what_was_measured_is_named():
    result = {**results(**TIMES), "vs": "other.yaml", "left_out": ["DATASETS.UNLABELED"]}
    result["latency_ms"] = {"2": {"LR": {"median": 3.0, "low": 2.0, "high": 4.0}}}
    lines = load_tool("benchmark_report").markdown(result).splitlines()
    assert lines[0] == "c KEY 1 vs: other.yaml"
    assert lines[2].endswith("at the most. Left out: DATASETS.UNLABELED.")
    assert "inference of LR, batch 2: 3 ms (2-4), wall time and quartiles" in lines


def test_what_a_step_leaves_out(config_files):
    cfg = build_config(str(config_files["student"]), ["SOLVER.ACCUMULATE", 2])
    assert load_tool("benchmark").left_out(cfg) == ["SOLVER.ACCUMULATE"]


def test_runs_are_compared(tmp_path, capsys):
    for name, result in {"one": results(**TIMES), "old": {"rounds": {}}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    main = load_tool("compare_benchmarks").main
    given = ["--output", str(tmp_path / "out"), f"k = 2=={tmp_path / 'one.json'}"]
    main([*given, f"again={tmp_path / 'one.json'}"])
    lines = (tmp_path / "out" / "growth.md").read_text().splitlines()
    assert lines == capsys.readouterr().out.splitlines()
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == [
        "k = 2=",
        "12.0 s (wall time)",
        "2.00 (1.50-6.00)",
        "1.50 (1.00-3.00)",
        "1.5",
        "-",
        "1.5",
    ]
    assert (tmp_path / "out" / "growth.png").stat().st_size > 1000
    with pytest.raises(SystemExit, match="two runs have the label 'k = 2='"):
        main([*given, given[-1]])
    for words in ("one.json", "x=gone.json", f"x={tmp_path / 'old.json'}"):
        with pytest.raises(SystemExit, match=f"'{words}' is no LABEL=FILE of a benchmark.json"):
            main([words])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config-file", "configs/Shapes/lr.yaml"], "lr.yaml' is a GeneralizedRCNN's config"),
        (["--quick", "--vs", "gone.yaml"], "gone.yaml' does not exist"),
        (["--image-sizes", "160", "64"], "--image-sizes: 160 is not a multiple of 64"),
        (["--rounds", "0"], "'0' is no whole number of 1 or more"),
        (["--quick", "--output", "README.md"], "File exists: 'README.md'"),
        (["--quick", "--image-sizes", "128", "64"], "--quick has a config and sizes of its own"),
        (
            ["--quick", "--vs", "configs/Nuclei/student.yaml"],
            "has 1 classes, but the images have 5",
        ),
        (["--quick", *CLASSES], "NUM_CLASSES is 1, but the data set 'shapes_train' "),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(
    arguments, words, no_shapes, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        load_tool("benchmark").main(["--output", str(tmp_path), *arguments])
    assert words in f"{end.value} {capsys.readouterr().err}"  # the second: argparse's own
