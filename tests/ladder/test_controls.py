"""The ladder controls: their teachers, iterations and starts."""

import copy

import pytest

from msad_kd.config.stages import read_stages
from msad_kd.ladder.controls import control_stages
from msad_kd.utils.errors import InputError

LADDER = [
    {"name": "a", "config_file": "a.yaml", "weights": "a.pth", "kind": "fused", "start": "teacher"},
    {"name": "b", "config_file": "b.yaml", "weights": "b.pth", "kind": "plain", "image": "hr"},
]
LADDER[0] |= {"iterations": 30, "base_lr": 0.1}
LADDER[1] |= {"losses": [{"name": "ssim", "weight": 4.0}]}


def test_they_have_the_ladders_total_and_start():
    controls = control_stages(LADDER, max_iter=50, start="start.pth")
    teachers = {
        name: [stage["weights"][0] for stage in stages] for name, stages in controls.items()
    }
    assert teachers == {
        "no_kd_same_start": ["a"],
        "strongest": ["b"],
        "strongest_restarted": ["b", "b"],
        "first_restarted": ["a", "a"],
        "reversed": ["b", "a"],
    }
    for stages in controls.values():
        assert sum(stage.get("iterations", 50) for stage in stages) == 80
        assert stages[0]["start"] == "start.pth" and stages[0]["base_lr"] == 0.1
        assert all("start" not in stage for stage in stages[1:])
        assert len({stage["name"] for stage in stages}) == len(stages)
    assert controls["reversed"][0]["losses"] == LADDER[1]["losses"]
    assert "losses" not in controls["reversed"][1]
    assert [loss["weight"] for loss in controls["no_kd_same_start"][0]["losses"]] == [0]
    heads = [{**LADDER[0], "start": "teacher_heads"}, LADDER[1]]
    assert control_stages(heads, 50, "")["strongest"][0]["start"] == "teacher_heads"
    default = [{**LADDER[0], "iterations": None}, LADDER[1]]
    assert control_stages(default, 50, "")["strongest"][0]["iterations"] == 100


def test_they_are_valid_ladders_and_share_no_list_with_the_original():
    before = copy.deepcopy(LADDER)
    for stages in control_stages(LADDER, 50, "x").values():
        read_stages(stages)
        for stage in stages:
            stage.get("losses", []).clear()
    assert before == LADDER


@pytest.mark.parametrize(
    ("stages", "message"),
    [([], "KD.LADDER.STAGES is empty"), ([{"name": "a"}], "stage 1 needs 'config_file'")],
)
def test_an_invalid_ladder(stages, message):
    with pytest.raises(InputError, match=message):
        control_stages(stages, 50, "")
