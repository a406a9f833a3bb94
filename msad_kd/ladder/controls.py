"""The ladder controls: runs as long as a ladder, each without one thing it may gain by."""

import copy

from detectron2.config import CfgNode
from detectron2.modeling import build_model

from msad_kd.checkpoint.checkpoint import SafeCheckpointer, check_exists, save_model
from msad_kd.checkpoint.start import init_from_teacher
from msad_kd.config.stages import read_stages, stage_config
from msad_kd.distill.teacher_spec import TeacherSpec
from msad_kd.utils.errors import InputError
from msad_kd.utils.seed import derive_seed, seed_all

# A stage's fields that belong to its teacher. The others (iterations, base_lr, start) belong to its
# place in the ladder.
_TEACHER_FIELDS = ("name", "config_file", "weights", "opts", "kind", "image", "losses")


def control_stages(stages: list[dict], max_iter: int, start: str) -> dict[str, list[dict]]:
    """Return KD.LADDER.STAGES of each ladder control that has a teacher, by the control's name.

    All train for the ladder's total of iterations, and begin as the ladder does; but with ``start:
    teacher_heads``, each control takes neck and heads of its own first teacher. ``strongest`` is
    the last stage's teacher, since a ladder rises; nothing is measured.

    Args:
        stages: the ladder's KD.LADDER.STAGES.
        max_iter: SOLVER.MAX_ITER, the iterations of a stage that names none.
        start: a checkpoint of what the ladder's student starts with, see ``write_start``; used if
            the ladder starts from its first teacher (``start: teacher``).

    Raises:
        InputError: if there are no stages, or if ``read_stages`` refuses them.
    """
    if not stages:
        raise InputError("KD.LADDER.STAGES is empty; only a ladder has ladder controls")
    read_stages(stages)
    total = sum(stage.get("iterations") or max_iter for stage in stages)
    places = [{k: v for k, v in stage.items() if k not in _TEACHER_FIELDS} for stage in stages]
    if places[0].get("start") == "teacher":
        places[0]["start"] = start
    one_stage = [{**places[0], "iterations": total}]
    no_loss = {**stages[0], "losses": [{"name": "mse", "weight": 0.0}]}
    return {
        "no_kd_same_start": _combine(one_stage, [no_loss]),  # no distillation
        "strongest": _combine(one_stage, stages[-1:]),  # the last teacher from beginning to end
        "strongest_restarted": _combine(places, [stages[-1]] * len(stages)),
        "first_restarted": _combine(places, [stages[0]] * len(stages)),
        "reversed": _combine(places, stages[::-1]),
    }


def write_start(cfg: CfgNode, file: str) -> None:
    """Write what a ladder's student starts with if that comes from the first teacher.

    The teacher's own checkpoint is not that: a student takes the batch statistics of its
    resolution, and the first stage of a cascade.

    Raises:
        InputError: if the teacher cannot be used, or does not exist yet.
    """
    cfg = stage_config(cfg, read_stages(cfg.KD.LADDER.STAGES), 0)
    check_exists(cfg.KD.TEACHER.WEIGHTS, "the start of the ladder")
    if cfg.SEED >= 0:  # as the ladder, for what the teacher lacks
        seed_all(derive_seed(cfg.SEED, 0))
    student = build_model(cfg)
    SafeCheckpointer(student).load(cfg.MODEL.WEIGHTS)
    init_from_teacher(student, TeacherSpec.from_config(cfg).build().model)
    save_model(student.state_dict(), file)


def _combine(places: list[dict], teachers: list[dict]) -> list[dict]:
    stages = []
    for number, (place, teacher) in enumerate(zip(places, teachers), start=1):
        stage = {key: copy.deepcopy(teacher[key]) for key in _TEACHER_FIELDS if key in teacher}
        stage["name"] = f"{number}_{stage['name']}"  # stage names must differ, teachers may repeat
        stages.append({**stage, **place})
    return stages
