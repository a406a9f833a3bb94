"""tools/analysis/tune_losses.py: the candidates, their schedule, and the ranking."""

import json
import sys

import pytest
import torch
import yaml
from helpers import ROOT, load_tool

from msad_kd.config.build import build_config, scale_to_processes
from msad_kd.utils.errors import InputError
from projects.study.cells import make_cells
from projects.study.grid import read_grid

tool = load_tool("tune_losses")


def parse(config, output, *words):
    args = tool.parse_arguments(["--config-file", str(config), "--output", str(output), *words])
    args.iterations = args.iterations or 10
    return args


def test_the_default_candidates(config_files, teacher_weights, tmp_path):
    words = ["--batches", "1", "--ratio", "0.5", "KD.TEACHER.WEIGHTS", str(teacher_weights)]
    args = parse(config_files["student"], tmp_path, *words)
    cfg = build_config(args.config_file, args.opts)
    candidates = tool.read_candidates(args, cfg)
    assert list(candidates) == ["l1", "ssim", "heads", "both"]
    (ssim,) = candidates["ssim"]
    assert candidates["both"] == [ssim, *candidates["heads"]]
    # The weight is in proportion to the ratio, and the level that detection pulls at most.
    args.ratio = 0.25
    level, weight = tool.balance(args)
    assert [level] == ssim["levels"] and weight == pytest.approx(ssim["weight"] / 2, rel=0.1)
    assert tool.read_candidates(args, cfg) == candidates  # typed again, they stay


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (["MODEL.META_ARCHITECTURE", "DistilledRetinaNet"], ["cross_head"]),
        (["MODEL.MASK_ON", False], ["roi_class", "roi_box"]),
        (["MODEL.KEYPOINT_ON", True], ["roi_class", "roi_box", "roi_mask", "roi_keypoint"]),
        (["MODEL.ROI_HEADS.NAME", "CascadeROIHeads"], None),
    ],
)
def test_the_losses_of_heads(config_files, tmp_path, monkeypatch, keys, names):
    monkeypatch.setattr(tool, "balance", lambda args: ("p2", 1.0))
    cfg = build_config(str(config_files["student"]), [])
    cfg.defrost()
    cfg.merge_from_list(keys)
    heads = tool.default_candidates(parse(config_files["student"], tmp_path), cfg).get("heads")
    assert (heads and [x["name"] for x in heads]) == names


def test_ssim_without_a_gradient(config_files, tmp_path, monkeypatch):
    squares = {tool.DETECTION: torch.ones(1, 2), f"{tool.PREFIX}ssim": torch.zeros(1, 2)}
    monkeypatch.setattr(tool, "load_student", lambda words: (None, None, [None]))
    monkeypatch.setattr(tool, "measure_batch", lambda model, batch: {"p2": squares})
    with pytest.raises(InputError, match="no gradient on p2"):
        tool.balance(parse(config_files["student"], tmp_path))


def test_the_grid(config_files, teacher_weights, tmp_path):
    words = ["--iterations", "6", "SOLVER.BASE_LR", "0.5", "SOLVER.MAX_ITER", "60"]
    args = parse(config_files["student"], tmp_path, *words)
    opts = ["SOLVER.MAX_ITER", 60, "SOLVER.STEPS", (40, 50), "SOLVER.WARMUP_ITERS", 20]
    cfg = build_config(args.config_file, [*opts, "KD.TEACHER.WEIGHTS", str(teacher_weights)])
    losses = [{"name": "l1", "weight": 2.0, "warmup_iters": 30}]
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(tool.make_grid(args, cfg, {"a": losses})))
    cells = make_cells(read_grid(tmp_path / "grid.yaml"), tmp_path)
    assert set(cells) == {"control/1", "a/1"} and cells["a/1"].iterations == 6
    options = dict(zip(cells["a/1"].options[::2], cells["a/1"].options[1::2]))
    assert options["SOLVER.STEPS"] == "[4, 5]" and options["SOLVER.WARMUP_ITERS"] == "2"
    assert options["SOLVER.BASE_LR"] == "0.5" and "'warmup_iters': 3" in options["KD.LOSSES"]


def test_a_schedule_of_eight_processes_is_scaled_once(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(
        tool, "default_candidates", lambda *_: {"a": [{"name": "l1", "weight": 1.0}]}
    )
    monkeypatch.setattr(tool.study, "main", lambda words: sys.exit("made"))
    words = ["--config-file", "configs/COCO/mask_rcnn_R_50_FPN_student_1x.yaml"]
    with pytest.raises(SystemExit, match="made"):
        tool.main([*words, "--output", str(tmp_path)])
    options = yaml.safe_load((tmp_path / "grid.yaml").read_text())["rows"]["a"]["options"]
    for processes, iterations in ((8, 90_000 // 4), (1, 8 * 90_000 // 4)):
        cfg = build_config(words[1], [x for pair in options.items() for x in pair])
        assert scale_to_processes(cfg, processes).SOLVER.MAX_ITER == iterations


def test_the_ranking():
    aps = {"control": (50, 40), "a": (52, 37), "b": (51, 40.5)}
    cells = {f"{n}/1": {k: {"AP": x} for k, x in zip(("bbox", "segm"), v)} for n, v in aps.items()}
    order, table = tool.rank(cells, [*aps])
    assert order == ["b", "control", "a"]
    assert [x.strip() for x in table.splitlines()[2].split("|")][1:-1] == [
        *("b", "51.0", "40.5", "+1.0", "+0.5")
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1", "expected"),
        ("[l1]", "should have NAME"),
        ("control: []", "should have NAME"),
        ("a: [{name: nonsense, weight: 1}]", "nonsense"),
    ],
)
def test_a_wrong_file_of_losses(config_files, tmp_path, content, words):
    (tmp_path / "losses.yaml").write_text(content)
    args = parse(config_files["student"], tmp_path, "--losses", str(tmp_path / "losses.yaml"))
    with pytest.raises(InputError, match=words):
        tool.read_candidates(args, None)


def test_a_config_that_is_no_students(config_files, tmp_path):
    words = ["--config-file", str(config_files["lr"]), "--output", str(tmp_path)]
    (tmp_path / "losses.yaml").write_text("mine: [{name: l1, weight: 0.6}]")
    for more in ([], ["--losses", str(tmp_path / "losses.yaml")]):
        with pytest.raises(SystemExit, match=r"tune_losses.py: .* not the config of a student"):
            tool.main([*words, *more])


@pytest.mark.long
def test_from_a_config_to_a_ranking(config_files, teacher_weights, tmp_path, capfd):
    (tmp_path / "losses.yaml").write_text("mine: [{name: l1, weight: 0.6}]")
    words = ["--config-file", str(config_files["student"]), "--output", str(tmp_path / "out")]
    words += ["--losses", str(tmp_path / "losses.yaml"), "--iterations", "2"]
    for _ in range(2):  # the second time there is nothing left to do
        tool.main([*words, "KD.TEACHER.WEIGHTS", str(teacher_weights)])
    assert "2 cells, 2 of them done" in (said := capfd.readouterr().out)
    assert "| mine" in said and "trust no difference" in said
    cells = json.loads((tmp_path / "out" / "results.json").read_text())["cells"]
    assert {cell["iterations"] for cell in cells.values()} == {2}
