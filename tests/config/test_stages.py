"""KD.LADDER.STAGES: how its entries are read, and the config that each stage runs with."""

import pytest

from msad_kd.config.build import build_config
from msad_kd.config.stages import read_stages, stage_config
from msad_kd.utils.errors import InputError

FEW = {"name": "a", "config_file": "t.yaml", "weights": "t.pth"}
L1 = [{"name": "l1", "weight": 0.1, "adapter": True}]


def test_a_stages_config(config_files):
    entries = [
        {**FEW, "losses": L1, "iterations": 45000, "base_lr": "1e-2", "opts": ["KD.SCALE", 2]},
        {**FEW, "name": "b", "kind": "plain", "image": "lr", "start": "teacher_heads"},
        {**FEW, "name": "c", "kind": "plain", "start": "x.pth"},
    ]
    keys = ["SOLVER.STEPS", [60, 80], "SOLVER.MAX_ITER", 90, "MODEL.WEIGHTS", "r50.pkl"]
    cfg = build_config(str(config_files["student"]), [*keys, "OUTPUT_DIR", "out"])
    one, two, three = (stage_config(cfg, read_stages(entries), i) for i in range(3))
    assert (one.SOLVER.MAX_ITER, one.SOLVER.STEPS) == (45000, (30000, 40000))
    assert (one.SOLVER.BASE_LR, two.SOLVER.BASE_LR) == (0.01, cfg.SOLVER.BASE_LR)
    assert (one.KD.LOSSES, two.KD.LOSSES) == (L1, cfg.KD.LOSSES)
    assert [c.KD.TEACHER.BRANCH for c in (one, two, three)] == ["fused", "lr", "hr"]
    assert (one.KD.TEACHER.CONFIG_FILE, one.KD.TEACHER.OPTS) == ("t.yaml", ["KD.SCALE", 2])
    starts = [(c.KD.TEACHER.INIT_STUDENT, c.KD.TEACHER.INIT_BACKBONE) for c in (one, two, three)]
    assert starts == [(False, False), (True, False), (False, False)]
    weights = [c.MODEL.WEIGHTS for c in (one, two, three)]
    assert weights == ["r50.pkl", "out/stage_01_a/student.pth", "x.pth"]
    assert [c.SEED - cfg.SEED for c in (one, two, three)] == [0, 1000, 2000]
    assert three.OUTPUT_DIR == "out/stage_03_c"


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"a": FEW}, "should be a list of dicts"),
        ([{**FEW, "wieghts": "x"}], "stage 1 has no field 'wieghts'; .*did you mean weights?"),
        ([FEW, {**FEW, "name": "b", "weights": ""}], "weights of stage 2 should be a text, not ''"),
        ([{"name": "a", "weights": "t.pth"}], "stage 1 needs 'config_file', a text"),
        ([FEW, FEW], "two stages are named 'a'"),
        (["a"], "stage 1 should be a dict, not 'a'"),
        ([{**FEW, "name": "a/b"}], "name of stage 1 should be letters, digits"),
        ([{**FEW, "kind": "both"}], "kind of stage 1 should be fused or plain, not 'both'"),
        ([{**FEW, "iterations": True}], "iterations of .* should be a whole number above 0, not T"),
        ([{**FEW, "base_lr": "much"}], "base_lr of .* should be a number above 0, not 'much'"),
        ([{**FEW, "opts": None}], "opts of stage 1 should be a list, not None"),
        ([{**FEW, "start": ""}], "start of stage 1 should be .* or a checkpoint, not ''"),
        ([{**FEW, "losses": [{"name": "l3", "weight": 1}]}], "stage 1: KD.LOSSES: there is no"),
    ],
)
def test_stages_that_cannot_be_read(entries, words):
    with pytest.raises(InputError, match=f"KD.LADDER.STAGES.*{words}"):
        read_stages(entries)


def test_a_name_that_looks_like_a_number_stays_a_text():
    (stage,) = read_stages([{**FEW, "name": "1e5"}])
    assert stage.name == "1e5"
