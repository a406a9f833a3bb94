"""KD.LADDER.STAGES, read and checked, and the ordinary run that each stage is."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from msad_kd.losses.terms import read_losses, yaml_number
from msad_kd.utils.errors import InputError

__all__ = ["STUDENT", "Stage", "read_stages", "stage_config"]

# What a stage leaves: the model alone, without optimizer and adapters.
STUDENT = "student.pth"
STARTS = ("previous", "teacher", "teacher_heads")


@dataclass(frozen=True)
class Stage:
    """One entry of KD.LADDER.STAGES; None is as in the config around it."""

    name: str
    config_file: str  # the teacher's
    weights: str  # the teacher's
    opts: list = field(default_factory=list)  # on top of the teacher's config
    kind: str = "fused"  # "fused": multi-resolution; "plain": single-resolution
    image: str = "hr"  # which image a plain teacher reads, "hr" or "lr"
    losses: list | None = None  # KD.LOSSES
    iterations: int | None = None  # SOLVER.MAX_ITER; SOLVER.STEPS follow
    base_lr: float | None = None  # SOLVER.BASE_LR
    # "previous" (in the first stage: MODEL.WEIGHTS), "teacher" (all that fits), "teacher_heads"
    # (all that fits but the backbone's bottom-up path, which is as "previous"), or a checkpoint
    start: str = "previous"

    def folder(self, output: str, index: int) -> Path:
        """Where stage ``index``, counting from 0, is trained."""
        return Path(output) / f"stage_{index + 1:02d}_{self.name}"


def read_stages(entries: list[dict]) -> list[Stage]:
    """Check and read KD.LADDER.STAGES.

    Raises:
        InputError: if they are no list, or if an entry is not a dict, has an unknown field, lacks
            one, has one of the wrong kind, or has the name of another.
    """
    if not isinstance(entries, (list, tuple)):
        raise InputError(f"KD.LADDER.STAGES: {entries} should be a list of dicts")
    stages: list[Stage] = []
    for number, entry in enumerate(entries, start=1):
        stage = _read(entry, f"KD.LADDER.STAGES, stage {number}")
        if stage.name in [other.name for other in stages]:
            raise InputError(
                f"KD.LADDER.STAGES: two stages have the name '{stage.name}'; their folders are "
                "called by it"
            )
        stages.append(stage)
    return stages


def _read(entry: Any, place: str) -> Stage:
    if not isinstance(entry, dict):
        raise InputError(f"{place}: {entry!r} should be a dict")
    known = [f.name for f in fields(Stage)]
    for key in entry:
        if key not in known:
            raise InputError(f"{place} has no field '{key}'; known: {', '.join(known)}")
    for key in ("name", "config_file", "weights"):
        if not isinstance(entry.get(key), str) or not entry[key]:
            raise InputError(f"{place} needs '{key}', a text")
    stage = Stage(**{**entry, "base_lr": yaml_number(entry.get("base_lr"))})
    whole = isinstance(stage.iterations, int) and stage.iterations > 0
    number = isinstance(stage.base_lr, (int, float)) and stage.base_lr > 0
    for fits, key, kind in (
        (stage.name.replace("-", "").replace("_", "").isalnum(), "name", "letters, digits, - or _"),
        (isinstance(stage.opts, (list, tuple)), "opts", "a list of KEY, VALUE, ..."),
        (stage.kind in ("fused", "plain"), "kind", "fused or plain"),
        (stage.image in ("hr", "lr"), "image", "hr or lr"),
        (stage.iterations is None or whole, "iterations", "a whole number above 0"),
        (stage.base_lr is None or number, "base_lr", "a number above 0"),
        (isinstance(stage.start, str) and bool(stage.start), "start", f"{STARTS} or a checkpoint"),
    ):
        if not fits:
            raise InputError(f"{place}: {key} should be {kind}, not {getattr(stage, key)!r}")
    if stage.losses is not None:
        try:
            read_losses(stage.losses)
        except InputError as error:
            raise InputError(f"{place}: {error}") from error
    return stage


def stage_config(cfg: CfgNode, stages: list[Stage], index: int) -> CfgNode:
    """The config of the ordinary run that a stage is.

    Args:
        cfg: of the ladder.
        stages: all of them.
        index: the stage's, counting from 0.
    """
    stage, own = stages[index], cfg.clone()
    own.defrost()
    own.KD.LADDER.STAGES = []
    teacher = own.KD.TEACHER
    teacher.CONFIG_FILE, teacher.WEIGHTS = stage.config_file, stage.weights
    teacher.OPTS = list(stage.opts)
    teacher.BRANCH = "fused" if stage.kind == "fused" else stage.image
    if stage.losses is not None:
        own.KD.LOSSES = stage.losses
    teacher.INIT_STUDENT = stage.start in ("teacher", "teacher_heads")
    teacher.INIT_BACKBONE = stage.start == "teacher"
    if stage.start not in STARTS:
        own.MODEL.WEIGHTS = stage.start
    elif index > 0:
        own.MODEL.WEIGHTS = str(stages[index - 1].folder(cfg.OUTPUT_DIR, index - 1) / STUDENT)
    if stage.iterations is not None:
        share = stage.iterations / own.SOLVER.MAX_ITER
        own.SOLVER.STEPS = tuple(round(step * share) for step in own.SOLVER.STEPS)
        own.SOLVER.MAX_ITER = stage.iterations
    if stage.base_lr is not None:
        own.SOLVER.BASE_LR = float(stage.base_lr)
    if own.SEED >= 0:
        # The data come in another order in each stage, and in that of no other ladder's.
        own.SEED += 1000 * index
    own.OUTPUT_DIR = str(stage.folder(cfg.OUTPUT_DIR, index))
    own.freeze()
    return own
