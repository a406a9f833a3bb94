"""Runs a ladder: one teacher after another for the same student (MTPD, arXiv 2308.09105).

Each stage is an ordinary training run in ``OUTPUT_DIR/stage_<NN>_<name>``, with its own teacher,
losses, adapters, optimizer and schedule. The next stage starts from the student that it leaves.
"""

import gc
import hashlib
import json
import logging
import os
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.utils import comm

from msad_kd.checkpoint.checkpoint import check_exists
from msad_kd.checkpoint.files import hash_file, write_json
from msad_kd.checkpoint.strip import strip_checkpoint
from msad_kd.config.stages import STUDENT, Stage, read_stages, stage_config
from msad_kd.distill.student import DistilledMixin, check_losses
from msad_kd.distill.teacher import TeacherSpec
from msad_kd.engine.trainer import KDTrainer
from msad_kd.modeling.classes import is_a
from msad_kd.utils.errors import InputError
from msad_kd.utils.seed import derive_seed, seed_all

STATE, DONE = "ladder_state.json", "DONE"
RESUMABLE = "last_checkpoint"  # Detectron2's file with the name of the checkpoint to resume from
# Keys that change neither weights nor results, with the value that all configs are compared with.
NEUTRAL = ["OUTPUT_DIR", "", "SOLVER.CHECKPOINT_PERIOD", 0, "DATALOADER.NUM_WORKERS", 0]
NEUTRAL += ["KD.TEACHER.EVAL_BEFORE_TRAIN", False, "KD.DIAGNOSTICS_PERIOD", 0]
NEUTRAL += ["KD.GRADIENT_RATIO_PERIOD", 0, "VIS_PERIOD", 0, "TEST.COCO_EVALUATOR", "auto"]


def run_ladder(cfg: CfgNode, *, resume: bool) -> dict:
    """Train a student by one teacher after another.

    Args:
        cfg: a config with KD.LADDER.STAGES. A stage's config is this one with the stage's changes.
        resume: skip the stages that are done, and resume the first that is not. The stages after
            it are trained from their beginning, because their student is another one.

    Returns:
        The last stage's results on DATASETS.TEST, in the main process.

    Raises:
        InputError: before anything is trained, if a stage has a mistake, or if one that is done has
            changed since; later, whatever the run of a stage raises.
    """
    logger = logging.getLogger(__name__)
    stages = read_stages(cfg.KD.LADDER.STAGES)
    configs = [stage_config(cfg, stages, index) for index in range(len(stages))]
    specs = _check_stages(stages, configs)
    state_file = Path(cfg.OUTPUT_DIR) / STATE
    state = json.loads(state_file.read_text()) if resume and state_file.is_file() else {}
    results: dict = {}
    for index, (stage, stage_cfg, spec) in enumerate(zip(stages, configs, specs)):
        folder = Path(stage_cfg.OUTPUT_DIR)
        if resume and (folder / DONE).exists():
            _check_finished(stage_cfg, spec, state.get(stage.name))
            results = state[stage.name]["results"]
            logger.info("Stage %d, '%s', is done: skipped", index + 1, stage.name)
            continue
        logger.info("Stage %d of %d: '%s', in %s", index + 1, len(stages), stage.name, folder)
        if comm.is_main_process():
            # Now, not later: if the ladder is killed, a resume must not take up what the old
            # students led to.
            for stale in configs[index + 1 :] if resume else configs[index:]:
                for mark in (DONE, RESUMABLE):
                    (Path(stale.OUTPUT_DIR) / mark).unlink(missing_ok=True)
        hashes = _hash_sources(stage_cfg, spec)  # now: the files may change during the training
        results = _run_stage(stage_cfg, spec, resume=resume)
        resume = False
        if comm.is_main_process():
            strip_checkpoint(str(folder / "model_final.pth"), str(folder / STUDENT))
            hashes["student_sha256"] = hash_file(folder / STUDENT)
            state[stage.name] = {"folder": folder.name, **hashes, "results": results}
            write_json(state_file, state)
            (folder / DONE).touch()
        comm.synchronize()
    return results


def _check_stages(stages: list[Stage], configs: list[CfgNode]) -> list[TeacherSpec]:
    """Check all stages before the first is trained, and return their teachers."""
    specs, earlier_students = [], []
    for stage, cfg in zip(stages, configs):
        if not is_a(cfg, DistilledMixin):
            raise InputError(
                f"KD.LADDER.STAGES: a {cfg.MODEL.META_ARCHITECTURE} learns from no teacher; set "
                "MODEL.META_ARCHITECTURE to a student, such as DistilledRCNN"
            )
        check_exists(stage.weights, f"the teacher of stage '{stage.name}'")
        start = cfg.MODEL.WEIGHTS
        if not start and stage.start == "previous":
            logging.getLogger(__name__).warning(
                "Stage '%s' starts from random weights, because MODEL.WEIGHTS is empty and 'start' "
                "is 'previous'; 'start: teacher' takes the teacher's",
                stage.name,
            )
        if start and Path(start) not in earlier_students:
            check_exists(start, f"the start of stage '{stage.name}'")
        try:
            specs.append(TeacherSpec.from_config(cfg))
            check_losses(cfg, specs[-1])
        except InputError as error:
            raise InputError(f"stage '{stage.name}': {error}") from error
        earlier_students.append(Path(cfg.OUTPUT_DIR) / STUDENT)
    return specs


def _check_finished(cfg: CfgNode, spec: TeacherSpec, recorded: dict | None) -> None:
    """Check that config, teacher, start and student of a finished stage have not changed."""
    folder = Path(cfg.OUTPUT_DIR)
    advice = (
        f"delete '{folder}' to train the stage and those after it again, or start a ladder in "
        "another OUTPUT_DIR"
    )
    if recorded is None or not (folder / STUDENT).is_file():
        missing = f"entry in {STATE}" if recorded is None else STUDENT
        raise InputError(
            f"the stage in '{folder}' is marked as done, but its {missing} is missing; {advice}"
        )
    hashes = {**_hash_sources(cfg, spec), "student_sha256": hash_file(folder / STUDENT)}
    for key, source in (
        ("config_sha256", "its config or its teacher's"),
        ("teacher_sha256", f"its teacher, '{cfg.KD.TEACHER.WEIGHTS}',"),
        ("start_sha256", f"the checkpoint it starts from, '{cfg.MODEL.WEIGHTS}',"),
        ("student_sha256", f"its {STUDENT}"),
    ):
        if recorded.get(key) != hashes[key]:
            raise InputError(
                f"the stage in '{folder}' is marked as done, but {source} has changed since; "
                f"{advice}"
            )


def _hash_sources(cfg: CfgNode, spec: TeacherSpec) -> dict[str, str | None]:
    """Hash what a stage's result depends on; a file that has to be downloaded has no hash."""
    weights = {"teacher_sha256": cfg.KD.TEACHER.WEIGHTS, "start_sha256": cfg.MODEL.WEIGHTS}
    return {
        "config_sha256": _hash_configs(cfg, spec),
        **{key: hash_file(x) if os.path.isfile(x) else None for key, x in weights.items()},
    }


def _hash_configs(cfg: CfgNode, spec: TeacherSpec) -> str:
    return hashlib.sha256((_neutral(cfg) + _neutral(spec.cfg)).encode()).hexdigest()


def _neutral(cfg: CfgNode) -> str:
    """Dump a config without the keys that change no result."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list(NEUTRAL)
    if not cfg.TEST.PRECISE_BN.ENABLED:  # it takes other images after each evaluation
        cfg.TEST.EVAL_PERIOD = 0
    if os.path.basename(os.path.dirname(cfg.MODEL.WEIGHTS)).startswith("stage_"):
        # The student of an earlier stage: the folder of the ladder may be moved.
        cfg.MODEL.WEIGHTS = os.path.join(*Path(cfg.MODEL.WEIGHTS).parts[-2:])
    return cfg.dump()


def _run_stage(cfg: CfgNode, spec: TeacherSpec, *, resume: bool) -> dict:
    if comm.is_main_process():
        folder = Path(cfg.OUTPUT_DIR)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(cfg.dump())
    comm.synchronize()
    if cfg.SEED >= 0:  # new adapters must not depend on what has been drawn before the stage
        seed_all(derive_seed(cfg.SEED, comm.get_rank()))
    try:
        trainer = KDTrainer(cfg, spec)
        trainer.resume_or_load(resume=resume)
        return trainer.train()
    finally:
        # Free this teacher before the next one is built; trainer and hooks refer to each other.
        trainer = None
        gc.collect()
