"""Resuming a run: what of its config may change, and how the change is applied."""

import logging

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.solver import LRMultiplier

from msad_kd.config.changes import (
    START,
    Changes,
    describe_changes,
    find_changes,
    with_former_values,
)
from msad_kd.utils.compat import load_trainer_state
from msad_kd.utils.errors import InputError

_logger = logging.getLogger(__name__)

# What a state of another layout raises while it is restored.
_UNFIT = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def check_state(trainer: DefaultTrainer, state: dict) -> str:
    """Check that a checkpoint's state can be resumed with the present config, and log what differs.

    Args:
        trainer: the trainer, with nothing loaded yet.
        state: its state in the checkpoint.

    Returns:
        The changed keys that might be why the weights do not fit, for an error message.

    Raises:
        InputError: if batch, optimizer, AMP or trained parameters differ, or if the run has
            already gone beyond SOLVER.MAX_ITER.
    """
    cfg, solver = trainer.cfg, trainer.cfg.SOLVER
    before, now = state.get("images_per_batch"), solver.IMS_PER_BATCH
    if before not in (None, now):
        raise InputError(
            f"the run in '{cfg.OUTPUT_DIR}' had {before} images a batch and is resumed "
            f"with {now}, which is another schedule; resume it on as many processes, with the "
            "same SOLVER.IMS_PER_BATCH"
        )
    done = state["iteration"] + 1
    if done > solver.MAX_ITER:
        raise InputError(
            f"SOLVER.MAX_ITER is {solver.MAX_ITER}, but the run in '{cfg.OUTPUT_DIR}' has done "
            f"{done} iterations; set it to more to go on, or evaluate the run by --eval-only"
        )
    if "config" not in state:
        _logger.warning(
            "The checkpoint is of an earlier version, which did not keep the config: what has "
            "changed in it is not known, and the run's learning rate and weight decay stay"
        )
    changes = _changes(state, cfg)
    said = f"; the config differs from the run's: {describe_changes(changes)}" if changes else ""
    if "_trainer" in state:
        _check_optimizer(trainer, state["_trainer"], said)
    if done == solver.MAX_ITER:
        _logger.warning(
            f"The run in '{cfg.OUTPUT_DIR}' is complete: nothing is left to train, because "
            f"SOLVER.MAX_ITER is {done}; set it to more to go on"
        )
    _log_changes(changes)
    return said


def _changes(state: dict, cfg: CfgNode) -> Changes:
    return find_changes(state["config"], cfg) if isinstance(state.get("config"), str) else {}


def _log_changes(changes: Changes) -> None:
    begun = {key: values for key, values in changes.items() if key in START}
    applied = {key: values for key, values in changes.items() if key not in START}
    if applied:
        _logger.warning(
            "The run is resumed with another config, and the new one wins: %s",
            describe_changes(applied),
        )
    if begun:
        _logger.warning(
            "What a run starts from has no effect on a resumed one: %s", describe_changes(begun)
        )


def _check_optimizer(trainer: DefaultTrainer, state: dict, said: str) -> None:
    """Check that the saved state is that of an optimizer of the same kind and parameters."""
    present = trainer.optimizer.param_groups
    try:
        groups = state["optimizer"]["param_groups"]
        kinds = [{"momentum", "betas"} & x[0].keys() for x in (groups, present)]
        counts = [sum(len(group["params"]) for group in x) for x in (groups, present)]
    except _UNFIT as error:
        raise InputError(
            f"the checkpoint in '{trainer.cfg.OUTPUT_DIR}' cannot be resumed: the state of its "
            f"optimizer is damaged ({error!r})"
        ) from error
    problems = {
        f"its optimizer is not SOLVER.OPTIMIZER {trainer.cfg.SOLVER.OPTIMIZER}": kinds,
        "SOLVER.AMP.ENABLED differs": ["grad_scaler" in state, trainer.cfg.SOLVER.AMP.ENABLED],
        "it trained {} weights, and the present config trains {}".format(*counts): counts,
    }
    for problem, (before, now) in problems.items():
        if before != now:
            raise InputError(
                f"the run in '{trainer.cfg.OUTPUT_DIR}' cannot be resumed: {problem}{said}; use "
                "the run's config, or start without --resume, which sets the old run aside"
            )


def restore_state(trainer: DefaultTrainer, state: dict) -> None:
    """Restore a checkpoint's state; what the config says of the optimizer and schedule wins.

    Raises:
        InputError: if the state is damaged.
    """
    changes = _changes(state, trainer.cfg)
    solver = {key: values for key, values in changes.items() if key.startswith("SOLVER.")}
    try:
        if solver and "_trainer" in state:
            optimizer = _in_present_groups(trainer, state["_trainer"]["optimizer"], solver)
            state = {**state, "_trainer": {**state["_trainer"], "optimizer": optimizer}}
        if not load_trainer_state(trainer, state):
            _logger.warning(
                "The checkpoint has no optimizer state: it was written by Detectron2 0.6 itself"
            )
        _check_shapes(trainer.optimizer)
    except _UNFIT as error:
        raise InputError(
            f"the checkpoint in '{trainer.cfg.OUTPUT_DIR}' cannot be resumed: the state of its "
            f"training is damaged ({error!r})"
        ) from error
    if solver and isinstance(trainer.scheduler, LRMultiplier):
        scheduler, groups = trainer.scheduler, trainer.optimizer.param_groups
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
        for group, rate in zip(groups, scheduler.get_lr()):
            group["lr"] = rate


def _in_present_groups(trainer: DefaultTrainer, saved: dict, changes: Changes) -> dict:
    """Return an optimizer's saved state with the groups and hyperparameters of the present one.

    Other hyperparameters group the parameters in another way: which saved state is whose is known
    to an optimizer built as the run's was.
    """
    former_cfg = with_former_values(trainer.cfg, changes)
    former = trainer.build_optimizer(former_cfg, trainer.checkpointer.model)
    former.load_state_dict(saved)
    trainer.optimizer.state.update(former.state)
    return trainer.optimizer.state_dict()


def _check_shapes(optimizer) -> None:
    """Check that the state of each parameter has its shape; numbers such as a step have none."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if getattr(value, "ndim", 0) and value.shape != parameter.shape:
                raise ValueError(f"{name} is {tuple(value.shape)} for {tuple(parameter.shape)}")
