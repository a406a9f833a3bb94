"""Compare the config of a run with the config that it is resumed with."""

import reprlib
from functools import lru_cache, reduce
from operator import getitem
from typing import Any

import yaml
from detectron2.config import CfgNode

from msad_kd.utils.flat_config import flatten_config

# Keys that change neither weights nor results, with the value that all configs are compared with.
NEUTRAL = {
    "OUTPUT_DIR": "",
    "SOLVER.CHECKPOINT_PERIOD": 0,
    "DATALOADER.NUM_WORKERS": 0,
    "KD.TEACHER.EVAL_BEFORE_TRAIN": False,
    "KD.DIAGNOSTICS_PERIOD": 0,
    "KD.GRADIENT_RATIO_PERIOD": 0,
    "VIS_PERIOD": 0,
    "TEST.COCO_EVALUATOR": "auto",
    "TEST.LOSS": False,
}
# Keys that say what a run starts from: a resumed run has started already.
START = ("MODEL.WEIGHTS", "KD.TEACHER.INIT_STUDENT", "KD.TEACHER.INIT_BACKBONE")
START += ("MODEL.TIMM.PRETRAINED", "MODEL.TIMM.CHECKPOINT")
# Scaling to the number of processes sets it, beside the keys that it scales.
_SCALED = "SOLVER.REFERENCE_WORLD_SIZE"

Changes = dict[str, tuple[Any, Any]]  # key -> value in the run's config, value now


def _unused(cfg: CfgNode) -> dict[str, Any]:
    """Return the keys under TEST that change no weights, with the value that NEUTRAL would have."""
    unused = {} if cfg.TEST.PATIENCE else {"TEST.BEST_METRIC": ""}
    # PRECISE_BN takes other images after each evaluation.
    if not cfg.TEST.PATIENCE and not cfg.TEST.PRECISE_BN.ENABLED:
        unused["TEST.EVAL_PERIOD"] = 0
    return unused


def neutral_config(cfg: CfgNode) -> CfgNode:
    """Return a copy of a config in which the keys that change no result have one value."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list([x for pair in NEUTRAL.items() for x in pair])
    cfg.merge_from_list([x for pair in _unused(cfg).items() for x in pair])
    return cfg


def find_changes(dumped: str, cfg: CfgNode) -> Changes:
    """Return the keys whose values differ, but for those that change no result.

    Keys that only one of the configs has are left out: another version added or dropped them.

    Args:
        dumped: what ``cfg.dump()`` was when the checkpoint was written.
        cfg: the present config.
    """
    before, now = _flatten(dumped), _flatten(cfg.dump())
    ignored = {*NEUTRAL, _SCALED, *_unused(cfg)}
    shared = [key for key in now if key in before and key not in ignored]
    return {key: (before[key], now[key]) for key in shared if before[key] != now[key]}


@lru_cache(maxsize=4)  # YAML is slow to read
def _flatten(dumped: str) -> dict[str, Any]:
    return flatten_config(yaml.safe_load(dumped))


def describe_changes(changes: Changes) -> str:
    """Return the changed keys as text: "KEY: old -> new, ..."."""
    return ", ".join(
        f"{key}: {reprlib.repr(old)} -> {reprlib.repr(new)}" for key, (old, new) in changes.items()
    )


def with_former_values(cfg: CfgNode, changes: Changes) -> CfgNode:
    """Return a copy of a config with the values before the changes."""
    cfg = cfg.clone()
    cfg.defrost()
    for key, (old, _) in changes.items():
        *sections, name = key.split(".")
        reduce(getitem, sections, cfg)[name] = old
    return cfg
