"""The controls of a ladder: ladders of its length that lack one of the things it may gain by."""

from __future__ import annotations

import copy

from msad_kd.config.stages import read_stages
from msad_kd.utils.errors import InputError

__all__ = ["control_stages"]

# What belongs to a stage's teacher; iterations, base_lr and start belong to its place.
TEACHERS = ("name", "config_file", "weights", "opts", "kind", "image", "losses")


def control_stages(stages: list[dict], max_iter: int) -> dict[str, list[dict]]:
    """The stages of each control that has a teacher.

    ``strongest`` means the last stage's teacher, as a ladder rises; nothing is measured. All start
    as the ladder does: from its first teacher's checkpoint where it starts from that teacher (but
    for running statistics that the checkpoint has for low resolution). A ladder that starts from
    its first teacher's neck and heads alone (``teacher_heads``) has controls that do so from
    theirs.

    Args:
        stages: KD.LADDER.STAGES of the ladder.
        max_iter: iterations of a stage that names none.

    Returns:
        the control's name to its KD.LADDER.STAGES, of the ladder's iterations in all:

        - ``no_kd_same_start``: no distillation, one stage.
        - ``strongest``: the last teacher, one stage.
        - ``strongest_restarted``: the last teacher in every stage.
        - ``first_restarted``: the first teacher in every stage.
        - ``reversed``: the teachers in reversed order.

    Raises:
        InputError: if there are no stages, and as ``read_stages``.
    """
    if not stages:
        raise InputError("KD.LADDER.STAGES is empty; only a ladder has controls")
    read_stages(stages)
    total = sum(stage.get("iterations") or max_iter for stage in stages)
    places = [{k: v for k, v in stage.items() if k not in TEACHERS} for stage in stages]
    if places[0].get("start") == "teacher":
        places[0]["start"] = stages[0]["weights"]
    whole = [{**places[0], "iterations": total}]
    return {
        "no_kd_same_start": _filled(whole, [_unheeded(stages[0])]),
        "strongest": _filled(whole, stages[-1:]),
        "strongest_restarted": _filled(places, [stages[-1]] * len(stages)),
        "first_restarted": _filled(places, [stages[0]] * len(stages)),
        "reversed": _filled(places, stages[::-1]),
    }


def _filled(places: list[dict], teachers: list[dict]) -> list[dict]:
    filled = []
    for number, (place, teacher) in enumerate(zip(places, teachers), start=1):
        own = {key: copy.deepcopy(teacher[key]) for key in TEACHERS if key in teacher}
        own["name"] = f"{number}_{own['name']}"  # names are told apart, teachers need not be
        filled.append({**own, **place})
    return filled


def _unheeded(stage: dict) -> dict:
    return {**stage, "losses": [{"name": "mse", "weight": 0.0}]}
