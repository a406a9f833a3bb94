"""Runs a ladder: one teacher after another for the same student (MTPD, arXiv 2308.09105).

Each stage is an ordinary training run in ``OUTPUT_DIR/stage_<NN>_<name>``, with its own teacher,
losses, adapters, optimizer and schedule. The next stage starts from the student that it leaves.
"""

import gc
import hashlib
import json
import logging
import os
from functools import partial
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.utils import comm

from msad_kd.checkpoint.checkpoint import check_exists
from msad_kd.checkpoint.files import hash_file, write_json
from msad_kd.checkpoint.strip import strip_checkpoint
from msad_kd.config.changes import neutral_config
from msad_kd.config.stages import STUDENT, Stage, read_stages, stage_config
from msad_kd.distill.student import DistilledMixin, check_losses
from msad_kd.distill.teacher_spec import TeacherSpec
from msad_kd.engine.run_folder import folder_locked, move_aside
from msad_kd.engine.trainer import KDTrainer
from msad_kd.modeling.classes import is_a
from msad_kd.utils.errors import InputError
from msad_kd.utils.hashes import split_hash
from msad_kd.utils.processes import in_main_process
from msad_kd.utils.seed import derive_seed, seed_all

STATE, DONE = "ladder_state.json", "DONE"


def run_ladder(cfg: CfgNode, *, resume: bool) -> dict:
    """Train a student by one teacher after another.

    Args:
        cfg: a config with KD.LADDER.STAGES. A stage's config is this one with the stage's changes.
        resume: skip the stages that are done, resume the first that is not, and train those after
            it from their beginning, because their student is another one.

    Returns:
        The last stage's results on DATASETS.TEST, in the main process.

    Raises:
        InputError: if a stage has a mistake, before anything is trained, or has changed since done,
            or if another run is at work in OUTPUT_DIR.
    """
    stages = read_stages(cfg.KD.LADDER.STAGES)
    configs = [stage_config(cfg, stages, index) for index in range(len(stages))]
    specs = _check_stages(stages, configs)
    logger, state_file = logging.getLogger(__name__), Path(cfg.OUTPUT_DIR) / STATE
    results: dict = {}
    with folder_locked(cfg.OUTPUT_DIR):
        state = _read_state(state_file) if resume else {}
        for index, (stage, stage_cfg, spec) in enumerate(zip(stages, configs, specs)):
            folder = Path(stage_cfg.OUTPUT_DIR)
            if resume and (folder / DONE).exists():
                _check_finished(stage_cfg, spec, state.get(stage.name))
                results = state[stage.name]["results"]
                logger.info("Stage %d, '%s', is done: skipped", index + 1, stage.name)
                continue
            logger.info("Stage %d of %d: '%s', in %s", index + 1, len(stages), stage.name, folder)
            # Before the training: a resume after a kill must not go on from later stages' old runs.
            stale = configs[index + 1 :] if resume else configs[index:]
            in_main_process(partial(_begin_stage, stage_cfg, stale))
            hashes = _hash_sources(stage_cfg, spec)  # the files may change during the training
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


def _read_state(file: Path) -> dict:
    """Return what is recorded of the stages; nothing if the file is missing or damaged."""
    try:
        state = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        state = None
    entries = state.items() if isinstance(state, dict) else ()
    return {name: entry for name, entry in entries if isinstance(entry, dict)}


def _begin_stage(cfg: CfgNode, stale: list[CfgNode]) -> None:
    """Move the runs of these configs aside, and write the stage's config into its folder."""
    for old_cfg in stale:
        move_aside(old_cfg)
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    Path(cfg.OUTPUT_DIR, "config.yaml").write_text(cfg.dump())


def _check_stages(stages: list[Stage], configs: list[CfgNode]) -> list[TeacherSpec]:
    """Check all stages before the first is trained, and return their teachers."""
    specs, earlier_students = [], []
    for stage, cfg in zip(stages, configs):
        name, start = f"stage '{stage.name}'", cfg.MODEL.WEIGHTS
        if not is_a(cfg, DistilledMixin):
            raise InputError(
                f"KD.LADDER.STAGES: a {cfg.MODEL.META_ARCHITECTURE} learns from no teacher; set "
                "MODEL.META_ARCHITECTURE to a student, such as DistilledRCNN"
            )
        check_exists(stage.weights, f"the teacher of {name}")
        if not start and stage.start == "previous":
            logging.getLogger(__name__).warning(
                f"In {name} the student starts from random weights, because MODEL.WEIGHTS is empty "
                "and 'start' is 'previous'; 'start: teacher' takes the teacher's"
            )
        if start and Path(start) not in earlier_students:
            check_exists(start, f"the start of {name}")
        try:
            specs.append(TeacherSpec.from_config(cfg))
            check_losses(cfg, specs[-1])
            specs[-1].check_classes()
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        earlier_students.append(Path(cfg.OUTPUT_DIR) / STUDENT)
    return specs


def _check_finished(cfg: CfgNode, spec: TeacherSpec, recorded: dict | None) -> None:
    """Check that config, teacher, start and student of a finished stage have not changed."""
    student = Path(cfg.OUTPUT_DIR) / STUDENT
    if recorded is None or not student.is_file():
        problems = [f"its {STUDENT if recorded else f'entry in {STATE}'} is missing"]
    else:
        hashes = {**_hash_sources(cfg, spec), "student_sha256": hash_file(student)}
        sources = {
            "config": "its config or its teacher's",
            "teacher": f"its teacher, '{cfg.KD.TEACHER.WEIGHTS}',",
            "start": f"the checkpoint it starts from, '{cfg.MODEL.WEIGHTS}',",
            "student": f"its {STUDENT}",
        }
        changed = [x for x in sources if recorded.get(f"{x}_sha256") != hashes[f"{x}_sha256"]]
        problems = [f"{sources[x]} has changed since" for x in changed]
    if problems:
        raise InputError(
            f"the stage in '{cfg.OUTPUT_DIR}' is marked as done, but {problems[0]}; delete the "
            "folder to train it and later stages again, or start a ladder in another OUTPUT_DIR"
        )


def _hash_sources(cfg: CfgNode, spec: TeacherSpec) -> dict[str, str | None]:
    """Hash what a stage's result depends on; a file that has to be downloaded has no hash."""
    weights = {"teacher_sha256": cfg.KD.TEACHER.WEIGHTS, "start_sha256": cfg.MODEL.WEIGHTS}
    files = {key: split_hash(path)[0] for key, path in weights.items()}
    configs = _neutral(cfg) + _neutral(spec.cfg)
    return {
        "config_sha256": hashlib.sha256(configs.encode()).hexdigest(),
        **{key: hash_file(x) if os.path.isfile(x) else None for key, x in files.items()},
    }


def _neutral(cfg: CfgNode) -> str:
    """Dump a config without the keys that change no result."""
    cfg = neutral_config(cfg)
    start = Path(cfg.MODEL.WEIGHTS)
    if start.parent.name.startswith("stage_"):  # an earlier stage's; the ladder may be moved
        cfg.MODEL.WEIGHTS = os.path.join(*start.parts[-2:])
    return cfg.dump()


def _run_stage(cfg: CfgNode, spec: TeacherSpec, *, resume: bool) -> dict:
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
