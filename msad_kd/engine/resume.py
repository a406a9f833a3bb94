"""Resuming a run: what of its config may change, and how the change is applied."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.engine.hooks import LRScheduler
from detectron2.solver import LRMultiplier
from detectron2.utils import comm

from msad_kd.config.changes import (
    START,
    Changes,
    describe_changes,
    find_changes,
    with_former_values,
)
from msad_kd.data.loader import ResumableLoader
from msad_kd.engine.hook_order import find_hook
from msad_kd.utils.compat import load_trainer_state
from msad_kd.utils.errors import InputError, first_line

_logger = logging.getLogger(__name__)

OWN_LOADER = "return msad_kd.data.loader.build_train_loader(cfg, mapper) from it"

# What a state of another layout raises while it is restored.
_UNFIT = (AttributeError, LookupError, RuntimeError, TypeError, ValueError, yaml.YAMLError)


@contextmanager
def _explained(trainer: DefaultTrainer) -> Iterator[None]:
    """Turn what a damaged state raises into one sentence."""
    try:
        yield
    except _UNFIT as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"the checkpoint in '{trainer.cfg.OUTPUT_DIR}' cannot be resumed: the state of its "
            f"training is damaged ({first_line(error)})"
        ) from error


def images_per_step(cfg: CfgNode) -> int:
    """Return the number of labelled images of a step of the optimizer, over all processes."""
    return cfg.SOLVER.IMS_PER_BATCH * cfg.SOLVER.ACCUMULATE


def check_state(trainer: DefaultTrainer, state: dict) -> str:
    """Check that a checkpoint's state can be resumed with the present config, and log what differs.

    Args:
        trainer: the trainer, with nothing loaded yet.
        state: its state in the checkpoint.

    Returns:
        The changed keys that might be why the weights do not fit, for an error message.

    Raises:
        InputError: if batch, optimizer, AMP or trained parameters differ, if the run has already
            gone beyond SOLVER.MAX_ITER, or if the state of its learning rate is damaged.
    """
    with _explained(trainer):
        cfg, solver = trainer.cfg, trainer.cfg.SOLVER
        before, now = state.get("images_per_batch"), images_per_step(cfg)
        if before not in (None, now):
            raise InputError(
                f"the run in '{cfg.OUTPUT_DIR}' had {before} images a batch and is resumed "
                f"with {now}, which is another schedule; resume it on as many processes, with the "
                "same SOLVER.IMS_PER_BATCH x SOLVER.ACCUMULATE"
            )
        if reason := _other_batches(trainer, state):
            words = "The resumed run gets other batches than a run without interruption would: %s"
            _logger.warning(words, reason)
        done = state["iteration"] + 1
        if done > solver.MAX_ITER:
            raise InputError(
                f"SOLVER.MAX_ITER is {solver.MAX_ITER}, but the run in '{cfg.OUTPUT_DIR}' has done "
                f"{done} iterations; set it to more to go on, or evaluate the run by --eval-only"
            )
        # Without its state, or with another step's, the schedule would go on from a wrong place.
        if hook := find_hook(trainer, LRScheduler):
            if not isinstance(trainer.scheduler, LRMultiplier):
                raise InputError(
                    "Detectron2 keeps no state of a schedule such as the "
                    f"{type(trainer.scheduler).__name__} of build_lr_scheduler, so the run cannot "
                    "be resumed; return an LRMultiplier from it"
                )
            step = state["hooks"][type(hook).__qualname__]["last_epoch"]
            if type(step) is not int or step != done:
                raise LookupError(f"the learning rate is at step {step} after {done} iterations")
        if "config" not in state:
            _logger.warning(
                "The checkpoint is of an earlier version, which did not keep the config: what has "
                "changed in it is not known, and the run's learning rate and weight decay stay"
            )
        changes = _changes(state, cfg)
        said = (
            f"; the config differs from the run's: {describe_changes(changes)}" if changes else ""
        )
        if "_trainer" in state:
            _check_optimizer(trainer, state["_trainer"], said)
        if done == solver.MAX_ITER:
            _logger.warning(
                f"The run in '{cfg.OUTPUT_DIR}' is complete: nothing is left to train, because "
                f"SOLVER.MAX_ITER is {done}; set it to more to go on"
            )
        _log_changes(changes)
        return said


def _other_batches(trainer: DefaultTrainer, state: dict) -> str:
    """Return why the batches are not those that the run would have had; "" if they are."""
    loader, count = trainer.data_loader, comm.get_world_size()
    if not isinstance(loader, ResumableLoader):
        return f"build_train_loader returns a {type(loader).__name__}; {OWN_LOADER}"
    if trainer.cfg.SEED < 0:
        return "SEED is negative, which draws another seed in every run"
    before = state.get("processes", count)
    return f"it had {before} processes and now has {count}" if before != count else ""


def _changes(state: dict, cfg: CfgNode) -> Changes:
    return find_changes(state["config"], cfg) if isinstance(state.get("config"), str) else {}


def _log_changes(changes: Changes) -> None:
    begun = {key: values for key, values in changes.items() if key in START}
    applied = {key: values for key, values in changes.items() if key not in START}
    for words, some in {
        "The run is resumed with another config, and the new one wins": applied,
        "What a run starts from has no effect on a resumed one": begun,
    }.items():
        if some:
            _logger.warning("%s: %s", words, describe_changes(some))


def _check_optimizer(trainer: DefaultTrainer, state: dict, said: str) -> None:
    """Check that the saved state is that of an optimizer of the same kind and parameters."""
    present = trainer.optimizer.param_groups
    groups = state["optimizer"]["param_groups"]
    kinds = [{"momentum", "betas"} & x[0].keys() for x in (groups, present)]
    counts = [sum(len(group["params"]) for group in x) for x in (groups, present)]
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
    built = [dict(group) for group in trainer.optimizer.param_groups]
    with _explained(trainer):
        if solver and "_trainer" in state:
            optimizer = _in_present_groups(trainer, state["_trainer"]["optimizer"], solver)
            state = {**state, "_trainer": {**state["_trainer"], "optimizer": optimizer}}
        if not load_trainer_state(trainer, state):
            _logger.warning(
                "The checkpoint has no optimizer state: it was written by Detectron2 0.6 itself"
            )
        if solver and isinstance(trainer.scheduler, LRMultiplier):
            groups = trainer.optimizer.param_groups
            trainer.scheduler.base_lrs = [group["initial_lr"] for group in groups]
            for group, rate in zip(groups, trainer.scheduler.get_lr()):
                group["lr"] = rate
        _check_restored(trainer, built)


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


def _check_restored(trainer: DefaultTrainer, built: list[dict]) -> None:
    """Check that the optimizer and the scheduler have what a step needs.

    Args:
        trainer: the trainer, with the state restored.
        built: the optimizer's groups as it was built, for the kinds of their values.

    Raises:
        ValueError: if a value is missing, or of another kind.
    """
    groups, states = trainer.optimizer.param_groups, trainer.optimizer.state
    for group, expected in zip(groups, built):
        for name, value in expected.items():
            # An older version of torch may not have known it.
            if name != "params" and not _alike(group.setdefault(name, value), value):
                raise ValueError(f"{name} is {group[name]!r}")
    example = next((state for state in states.values() if state), {})
    for parameter, state in states.items():
        if state and state.keys() != example.keys():
            raise ValueError(f"a weight has {list(state)}, another {list(example)}")
        for name, value in state.items():
            kinds = (type(value), type(example[name]))
            if kinds[0] is not kinds[1] and type(None) not in kinds:
                raise ValueError(f"{name} is {value!r}")
            # A number, such as that of the steps, has no dimension.
            if getattr(value, "ndim", 0) and value.shape != parameter.shape:
                raise ValueError(f"{name} is {tuple(value.shape)} for {tuple(parameter.shape)}")
    if isinstance(trainer.scheduler, LRMultiplier):
        rates, last = trainer.scheduler.base_lrs, trainer.scheduler.last_epoch
        if not _alike(rates, [0.0] * len(groups)) or not isinstance(last, int):
            raise ValueError(f"the scheduler has base_lrs {rates!r} and last_epoch {last!r}")


def _alike(value: Any, expected: Any) -> bool:
    """Return whether a hyperparameter is of the kind that the optimizer was built with."""
    if isinstance(expected, (list, tuple)):
        same = isinstance(value, (list, tuple)) and len(value) == len(expected)
        return same and all(map(_alike, value, expected))
    kind = (bool, type(None)) if expected is None or isinstance(expected, bool) else (int, float)
    return isinstance(value, kind)
