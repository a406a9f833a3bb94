"""The ladder controls: runs as long as a ladder, each without one thing it may gain by."""

import copy

from msad_kd.config.stages import read_stages
from msad_kd.utils.errors import InputError

# A stage's fields that belong to its teacher. The others (iterations, base_lr, start) belong to its
# place in the ladder.
_TEACHER_FIELDS = ("name", "config_file", "weights", "opts", "kind", "image", "losses")


def control_stages(stages: list[dict], max_iter: int) -> dict[str, list[dict]]:
    """Return KD.LADDER.STAGES of each ladder control that has a teacher, by the control's name.

    All train for the ladder's total of iterations. A ladder that starts from its first teacher
    gives the controls that checkpoint to start from; with ``start: teacher_heads``, each control
    takes neck and heads of its own first teacher. ``strongest`` is the last stage's teacher, since
    a ladder rises; nothing is measured.

    Args:
        stages: the ladder's KD.LADDER.STAGES.
        max_iter: SOLVER.MAX_ITER, the iterations of a stage that names none.

    Raises:
        InputError: if there are no stages, or if ``read_stages`` refuses them.
    """
    if not stages:
        raise InputError("KD.LADDER.STAGES is empty; only a ladder has ladder controls")
    read_stages(stages)
    total = sum(stage.get("iterations") or max_iter for stage in stages)
    places = [{k: v for k, v in stage.items() if k not in _TEACHER_FIELDS} for stage in stages]
    if places[0].get("start") == "teacher":
        places[0]["start"] = stages[0]["weights"]
    one_stage = [{**places[0], "iterations": total}]
    no_loss = {**stages[0], "losses": [{"name": "mse", "weight": 0.0}]}
    return {
        "no_kd_same_start": _combine(one_stage, [no_loss]),  # no distillation
        "strongest": _combine(one_stage, stages[-1:]),  # the last teacher from beginning to end
        "strongest_restarted": _combine(places, [stages[-1]] * len(stages)),
        "first_restarted": _combine(places, [stages[0]] * len(stages)),
        "reversed": _combine(places, stages[::-1]),
    }


def _combine(places: list[dict], teachers: list[dict]) -> list[dict]:
    stages = []
    for number, (place, teacher) in enumerate(zip(places, teachers), start=1):
        stage = {key: copy.deepcopy(teacher[key]) for key in _TEACHER_FIELDS if key in teacher}
        stage["name"] = f"{number}_{stage['name']}"  # stage names must differ, teachers may repeat
        stages.append({**stage, **place})
    return stages
