"""The trainer's hooks, in the order in which they have to run."""

import logging

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer, PeriodicWriter, PreciseBN

from msad_kd.engine.best import KeepBest
from msad_kd.engine.hooks import EvaluateTeacher, KeepNormalizer, SeedEachStep
from msad_kd.engine.not_finite import WatchLosses
from msad_kd.engine.signals import StopOnSignal
from msad_kd.engine.validation import ValidationLoss

_logger = logging.getLogger(__name__)


def find_hook(trainer, kind: type) -> HookBase | None:
    """Return a trainer's first hook of a kind; None if there is none."""
    return next((hook for hook in trainer._hooks if isinstance(hook, kind)), None)


def add_hooks(trainer, hooks: list[HookBase]) -> list[HookBase]:
    """Return Detectron2's hooks of a ``KDTrainer`` and those of this project, in their order."""
    cfg, first, others = trainer.cfg, [], []
    # Only the main process has hooks that save and write.
    saving = _place(hooks, (PeriodicCheckpointer, EvalHook))
    evaluating, writing = _place(hooks, EvalHook), _place(hooks, PeriodicWriter)
    periods = cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD
    before_saving = KeepNormalizer(*periods)
    for hook in hooks:
        # fvcore refuses a layer that normalises twice in a step.
        if isinstance(hook, PreciseBN) and getattr(hook, "_data_loader", None) is not None:
            hook._data_loader.unlabeled = None
            if cfg.SOLVER.ACCUMULATE > 1:  # its batch is of several passes
                hook._data_loader.batch_size //= cfg.SOLVER.ACCUMULATE
    if trainer.teacher_spec is not None and cfg.KD.TEACHER.EVAL_BEFORE_TRAIN:
        first.append(EvaluateTeacher(trainer.teacher_spec))
    if cfg.SEED >= 0:
        first.append(SeedEachStep(cfg.SEED))
    if cfg.DATASETS.TEST and cfg.TEST.LOSS:
        others.append(ValidationLoss(cfg, trainer.checkpointer.model))
    if cfg.DATASETS.TEST and cfg.TEST.EVAL_PERIOD:
        others.append(KeepBest(cfg, trainer.checkpointer))
    elif cfg.TEST.PATIENCE:
        _logger.warning(
            "TEST.PATIENCE is not used: it counts evaluations on DATASETS.TEST by TEST.EVAL_PERIOD"
        )
    if cfg.TEST.AUG.ENABLED:
        others.append(EvalHook(0, lambda: trainer.test_with_TTA(trainer.cfg, trainer.model)))
    return [
        *first,
        *hooks[:saving],
        before_saving,
        WatchLosses(),
        *hooks[saving:evaluating],
        StopOnSignal(*periods, before_saving),
        *hooks[evaluating:writing],
        *others,  # before the writers, so that they write their results too
        *hooks[writing:],
    ]


def resume_precise_bn(hook: PreciseBN | None, cfg: CfgNode, iteration: int) -> None:
    """Let a hook go on after the images that it has taken up to an iteration."""
    loader, period = getattr(hook, "_data_loader", None), cfg.TEST.EVAL_PERIOD
    if loader is not None and period:
        loader.start = iteration // period * cfg.TEST.PRECISE_BN.NUM_ITER


def _place(hooks: list[HookBase], kinds: type | tuple[type, ...]) -> int:
    return next((i for i, hook in enumerate(hooks) if isinstance(hook, kinds)), len(hooks))
