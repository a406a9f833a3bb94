"""Read KD.LADDER.STAGES, and make the config of the training run that each stage is."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from detectron2.config import CfgNode

from msad_kd.config.values import check_values
from msad_kd.losses.terms import read_losses
from msad_kd.utils.errors import InputError
from msad_kd.utils.schema import Count, read_dataclass

# The checkpoint that a stage leaves: the model alone, without optimizer and adapters.
STUDENT = "student.pth"
_STARTS = ("previous", "teacher", "teacher_heads")
_Text = Annotated[str, len, "a text"]


@dataclass(frozen=True)
class Stage:
    """One entry of KD.LADDER.STAGES; None stands for the value of the ladder's config."""

    name: Annotated[str, re.compile(r"[\w-]+").fullmatch, "letters, digits, - or _"]
    config_file: _Text  # the teacher's
    weights: _Text  # the teacher's
    opts: list = field(default_factory=list)  # KEY, VALUE, ... for the teacher's config
    kind: Literal["fused", "plain"] = "fused"  # multi- or single-resolution teacher
    image: Literal["hr", "lr"] = "hr"  # which image a plain teacher reads
    losses: list | None = None  # KD.LOSSES
    # SOLVER.MAX_ITER, which SOLVER.STEPS follow.
    iterations: Count | None = None
    base_lr: Annotated[float, lambda rate: rate > 0, "a number above 0"] | None = None
    # The student starts from "previous" (in the first stage: MODEL.WEIGHTS), from a checkpoint,
    # from all that fits of the "teacher", or from that without its bottom-up path: "teacher_heads".
    start: Annotated[str, len, f"{', '.join(_STARTS)} or a checkpoint"] = "previous"

    def folder(self, output: str, index: int) -> Path:
        """Return the folder under ``output`` in which stage ``index``, from 0, is trained."""
        return Path(output) / f"stage_{index + 1:02d}_{self.name}"


def read_stages(entries: list[dict]) -> list[Stage]:
    """Check KD.LADDER.STAGES and return its entries.

    Raises:
        InputError: if an entry cannot be used, or two stages have one name.
    """
    if not isinstance(entries, (list, tuple)):
        raise InputError(f"KD.LADDER.STAGES: {entries!r} should be a list of dicts")
    stages: list[Stage] = []
    for number, entry in enumerate(entries, start=1):
        stage = read_dataclass(Stage, entry, "KD.LADDER.STAGES", f"stage {number}")
        try:
            read_losses(stage.losses or [])
        except InputError as error:
            raise InputError(f"KD.LADDER.STAGES: stage {number}: {error}") from error
        if stage.name in [other.name for other in stages]:
            raise InputError(f"KD.LADDER.STAGES: two stages are named '{stage.name}'; rename one")
        stages.append(stage)
    return stages


def stage_config(cfg: CfgNode, stages: list[Stage], index: int) -> CfgNode:
    """Return the frozen config of one stage's training run.

    Args:
        cfg: the ladder's config.
        stages: all of its stages.
        index: the stage's, counting from 0.

    Raises:
        InputError: if the stage has no schedule.
    """
    stage, stage_cfg = stages[index], cfg.clone()
    stage_cfg.defrost()
    stage_cfg.KD.LADDER.STAGES = []
    teacher = stage_cfg.KD.TEACHER
    teacher.CONFIG_FILE, teacher.WEIGHTS = stage.config_file, stage.weights
    teacher.OPTS = list(stage.opts)
    teacher.BRANCH = "fused" if stage.kind == "fused" else stage.image
    if stage.losses is not None:
        stage_cfg.KD.LOSSES = stage.losses
    teacher.INIT_STUDENT = stage.start in ("teacher", "teacher_heads")
    teacher.INIT_BACKBONE = stage.start == "teacher"
    if stage.start not in _STARTS:
        stage_cfg.MODEL.WEIGHTS = stage.start
    elif index > 0:
        previous = stages[index - 1].folder(cfg.OUTPUT_DIR, index - 1)
        stage_cfg.MODEL.WEIGHTS = str(previous / STUDENT)
    if stage.iterations is not None:
        share = stage.iterations / cfg.SOLVER.MAX_ITER
        stage_cfg.SOLVER.STEPS = tuple(round(step * share) for step in cfg.SOLVER.STEPS)
        stage_cfg.SOLVER.MAX_ITER = stage.iterations
    if stage.base_lr is not None:
        stage_cfg.SOLVER.BASE_LR = float(stage.base_lr)
    if stage_cfg.SEED >= 0:
        # Each stage needs an order of the data of its own. A step of 1000 keeps it apart from the
        # stages of ladders with a neighbouring seed.
        stage_cfg.SEED += 1000 * index
    stage_cfg.OUTPUT_DIR = str(stage.folder(cfg.OUTPUT_DIR, index))
    stage_cfg.freeze()
    try:
        check_values(stage_cfg)  # rounded, a short stage's steps may meet
    except InputError as error:
        raise InputError(f"KD.LADDER.STAGES: stage '{stage.name}': {error}") from error
    return stage_cfg
