"""Progressive distillation: a sequence of teachers, one stage after the other (arXiv 2308.09105).

Each stage is an ordinary run in ``OUTPUT_DIR/stage_<NN>_<name>``, with its own teacher, losses,
adapters, optimizer and schedule; the student it leaves is where the next one starts.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.utils import comm

from msad_kd.checkpoint.checkpoint import check_exists
from msad_kd.checkpoint.files import write_json
from msad_kd.checkpoint.strip import strip_checkpoint
from msad_kd.config.stages import STUDENT, Stage, read_stages, stage_config
from msad_kd.distill.student import DistilledMixin, check_losses
from msad_kd.distill.teacher import teacher_config
from msad_kd.engine.trainer import KDTrainer
from msad_kd.modeling.classes import is_a
from msad_kd.utils.errors import InputError
from msad_kd.utils.seed import derive_seed, seed_all

__all__ = ["run_ladder"]

STATE, DONE = "ladder_state.json", "DONE"
RESUMABLE = "last_checkpoint"  # Detectron2's: the name of the checkpoint that a run resumes from
# Keys that change neither weights nor results, and a value to compare configs with.
UNHEEDED = ["OUTPUT_DIR", "", "SOLVER.CHECKPOINT_PERIOD", 0, "DATALOADER.NUM_WORKERS", 0]
UNHEEDED += ["KD.TEACHER.EVAL_BEFORE_TRAIN", False, "KD.DIAGNOSTICS_PERIOD", 0]
UNHEEDED += ["KD.GRADIENT_RATIO_PERIOD", 0, "VIS_PERIOD", 0, "TEST.COCO_EVALUATOR", "auto"]


def _hash_file(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _hash_weights(path: str) -> str | None:
    return _hash_file(path) if os.path.isfile(path) else None  # what is fetched has its name alone


def _hash_config(cfg: CfgNode) -> str:
    """Of all that a run's result depends on in its config and its teacher's."""
    text = _heeded(cfg) + _heeded(teacher_config(cfg))
    return hashlib.sha256(text.encode()).hexdigest()


def _heeded(cfg: CfgNode) -> str:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list(UNHEEDED)
    if not cfg.TEST.PRECISE_BN.ENABLED:  # which takes other images after each evaluation
        cfg.TEST.EVAL_PERIOD = 0
    if os.path.basename(os.path.dirname(cfg.MODEL.WEIGHTS)).startswith("stage_"):
        # A student of the ladder, whose folder may be moved.
        cfg.MODEL.WEIGHTS = os.path.join(*Path(cfg.MODEL.WEIGHTS).parts[-2:])
    return cfg.dump()


def _hash_sources(own: CfgNode) -> dict[str, str | None]:
    return {
        "config_sha256": _hash_config(own),
        "teacher_sha256": _hash_weights(own.KD.TEACHER.WEIGHTS),
        "start_sha256": _hash_weights(own.MODEL.WEIGHTS),
    }


def _check_sources(stages: list[Stage], configs: list[CfgNode]) -> None:
    """See that there is what the stages are made from, but for students that are to come.

    Raises:
        InputError: if the model is no student, if a config of a teacher cannot be read, if a
            checkpoint is absent, or if a loss has no levels to compare.
    """
    students: list[Path] = []
    for stage, own in zip(stages, configs):
        if not is_a(own, DistilledMixin):
            raise InputError(
                f"KD.LADDER.STAGES: a {own.MODEL.META_ARCHITECTURE} learns from no teacher; set "
                "MODEL.META_ARCHITECTURE to a student, such as DistilledRCNN"
            )
        check_exists(stage.weights, f"the teacher of stage '{stage.name}'")
        start = own.MODEL.WEIGHTS
        if not start and stage.start == "previous":
            logging.getLogger(__name__).warning(
                "Stage '%s' starts from random weights, for MODEL.WEIGHTS is empty and its 'start' "
                "is 'previous'; 'start: teacher' takes the teacher's",
                stage.name,
            )
        if start and Path(start) not in students:
            check_exists(start, f"the start of stage '{stage.name}'")
        try:
            check_losses(own)
        except InputError as error:
            raise InputError(f"stage '{stage.name}': {error}") from error
        students.append(Path(own.OUTPUT_DIR) / STUDENT)


def _check_finished(folder: Path, own: CfgNode, recorded: dict | None) -> None:
    """See that a stage that is done is still what it was.

    Raises:
        InputError: if its config, teacher, start or student has changed, or if nothing is recorded.
    """
    student = folder / STUDENT
    advice = (
        f"delete '{folder}' to train the stage and those after it again, or start a ladder in "
        "another OUTPUT_DIR"
    )
    if recorded is None or not student.is_file():
        raise InputError(
            f"the stage in '{folder}' is marked as done, but its "
            f"{'entry in ' + STATE if recorded is None else STUDENT} is missing; {advice}"
        )
    now = _hash_sources(own)
    for key, what in (
        ("config_sha256", f"the config of the stage in '{folder}' or of its teacher"),
        ("teacher_sha256", f"'{own.KD.TEACHER.WEIGHTS}', the teacher of the stage in '{folder}',"),
        ("start_sha256", f"'{own.MODEL.WEIGHTS}', from which the stage in '{folder}' starts,"),
    ):
        if recorded.get(key) != now[key]:
            raise InputError(f"{what} has changed since; {advice}")
    if recorded["student_sha256"] != _hash_file(student):
        raise InputError(f"'{student}' has changed since its stage was done; {advice}")


def run_ladder(cfg: CfgNode, *, resume: bool) -> dict:
    """Train a student by one teacher after another.

    Args:
        cfg: with KD.LADDER.STAGES; each stage's config is this one with the stage's changes.
        resume: skip the stages that are done and go on with the first that is not, where it was;
            those after it start from a new student, so they are trained from their beginning.

    Returns:
        the last stage's results on DATASETS.TEST, in the main process.

    Raises:
        InputError: before anything is trained, if the config of a stage's teacher cannot be read,
            or if its checkpoint or that of a stage's start is absent; if a stage that is done has
            changed, and whatever a stage's own run raises.
    """
    logger = logging.getLogger(__name__)
    stages = read_stages(cfg.KD.LADDER.STAGES)
    configs = [stage_config(cfg, stages, index) for index in range(len(stages))]
    _check_sources(stages, configs)  # rather than after hours
    state_file = Path(cfg.OUTPUT_DIR) / STATE
    state = json.loads(state_file.read_text()) if resume and state_file.is_file() else {}
    results: dict = {}
    for index, (stage, own) in enumerate(zip(stages, configs)):
        folder = Path(own.OUTPUT_DIR)
        if resume and (folder / DONE).exists():
            _check_finished(folder, own, state.get(stage.name))
            results = state[stage.name]["results"]
            logger.info("Stage %d, '%s', is done: skipped", index + 1, stage.name)
            continue
        logger.info("Stage %d of %d: '%s', in %s", index + 1, len(stages), stage.name, folder)
        if comm.is_main_process():
            # At once: should the ladder be killed, what its old students led to is not taken up.
            for stale in configs[index + 1 :] if resume else configs[index:]:
                for mark in (DONE, RESUMABLE):
                    (Path(stale.OUTPUT_DIR) / mark).unlink(missing_ok=True)
        sources = _hash_sources(own)  # before: they may change during hours of training
        results = _run_stage(own, resume=resume)
        resume = False
        if comm.is_main_process():
            strip_checkpoint(str(folder / "model_final.pth"), str(folder / STUDENT))
            state[stage.name] = {
                "folder": folder.name,
                **sources,
                "student_sha256": _hash_file(folder / STUDENT),
                "results": results,
            }
            write_json(state_file, state)
            (folder / DONE).touch()
        comm.synchronize()
    return results


def _run_stage(cfg: CfgNode, *, resume: bool) -> dict:
    folder = Path(cfg.OUTPUT_DIR)
    if comm.is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(cfg.dump())
    comm.synchronize()
    # New adapters are drawn when the stage starts, whatever has been drawn before.
    if cfg.SEED >= 0:
        seed_all(derive_seed(cfg.SEED, comm.get_rank()))
    try:
        trainer = KDTrainer(cfg)
        trainer.resume_or_load(resume=resume)
        return trainer.train()
    finally:
        # Before the next teacher is built, this one has to be gone; trainer and hooks hold each
        # other.
        trainer = None
        gc.collect()
