"""The controls of a ladder are what they say."""

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
    found = control_stages(LADDER, max_iter=50)
    teachers = {name: [stage["weights"][0] for stage in own] for name, own in found.items()}
    assert teachers == {
        "no_kd_same_start": ["a"],
        "strongest": ["b"],
        "strongest_restarted": ["b", "b"],
        "first_restarted": ["a", "a"],
        "reversed": ["b", "a"],
    }
    for own in found.values():
        assert sum(stage.get("iterations", 50) for stage in own) == 80
        assert own[0]["start"] == "a.pth" and own[0]["base_lr"] == 0.1
        assert all("start" not in stage for stage in own[1:])
        assert len({stage["name"] for stage in own}) == len(own)
    assert found["reversed"][0]["losses"] == LADDER[1]["losses"]
    assert "losses" not in found["reversed"][1]
    assert [loss["weight"] for loss in found["no_kd_same_start"][0]["losses"]] == [0]
    heads = [{**LADDER[0], "start": "teacher_heads"}, LADDER[1]]
    assert control_stages(heads, 50)["strongest"][0]["start"] == "teacher_heads"


def test_they_are_ladders_and_leave_the_ladder_alone():
    before = copy.deepcopy(LADDER)
    for own in control_stages(LADDER, 50).values():
        read_stages(own)
        for stage in own:
            stage.get("losses", []).clear()
    assert before == LADDER
    unsaid = [{**LADDER[0], "iterations": None}, LADDER[1]]
    assert control_stages(unsaid, 50)["strongest"][0]["iterations"] == 100


@pytest.mark.parametrize(
    ("stages", "words"),
    [([], "KD.LADDER.STAGES is empty"), ([{"name": "a"}], "stage 1 needs 'config_file'")],
)
def test_what_has_no_controls(stages, words):
    with pytest.raises(InputError, match=words):
        control_stages(stages, 50)
