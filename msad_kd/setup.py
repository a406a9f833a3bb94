"""From a config file and command-line overrides to the config a run uses."""

from __future__ import annotations

import difflib
import logging

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultTrainer
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from msad_kd.config import add_msad_kd_config
from msad_kd.datasets import register_coco_format
from msad_kd.distiller import read_losses
from msad_kd.errors import InputError
from msad_kd.pyramid import level_shift

__all__ = ["build_config", "merge_config"]


def merge_config(cfg: CfgNode, config_file: str, opts: list) -> None:
    """Merge a YAML file and KEY VALUE pairs into a config, in place.

    Raises:
        InputError: if there is no such file, or if a key is unknown; the message proposes the
            nearest one.
    """
    if config_file and not PathManager.isfile(config_file):
        raise InputError(f"the config file '{config_file}' does not exist")
    try:
        if config_file:
            # YAML tags that construct Python objects would let a config run code.
            cfg.merge_from_file(config_file, allow_unsafe=False)
        cfg.merge_from_list(list(opts))
    except (KeyError, AssertionError) as error:
        key = (
            str(error)
            .strip("\"'")
            .removeprefix("Non-existent key: ")
            .removeprefix("Non-existent config key: ")
        )
        known = _keys(cfg)
        close = difflib.get_close_matches(key, known, n=1) or difflib.get_close_matches(
            key.rsplit(".", 1)[-1], [name.rsplit(".", 1)[-1] for name in known], n=1
        )
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InputError(f"unknown config key or value: {key}{hint}") from error


def _keys(node: CfgNode, prefix: str = "") -> list[str]:
    names = []
    for name, value in node.items():
        names.append(prefix + name)
        if isinstance(value, CfgNode):
            names.extend(_keys(value, f"{prefix}{name}."))
    return names


def build_config(config_file: str, opts: list) -> CfgNode:
    """The checked config of a run, whose data sets are registered.

    A missing GPU turns MODEL.DEVICE to "cpu", with one warning. A world size other than
    SOLVER.REFERENCE_WORLD_SIZE scales batch, schedule and the distillation's warm-up, once.

    Raises:
        InputError: as ``merge_config``, ``register_coco_format``,
            ``level_shift`` and ``read_losses``.
    """
    cfg = get_cfg()
    add_msad_kd_config(cfg)
    merge_config(cfg, config_file, opts)
    level_shift(cfg.KD.SCALE)
    read_losses(cfg.KD.LOSSES)
    register_coco_format(cfg)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logging.getLogger(__name__).warning("No GPU is at hand: MODEL.DEVICE is cpu")
        cfg.MODEL.DEVICE = "cpu"
    return _scale_to_world(cfg)


def _scale_to_world(cfg: CfgNode) -> CfgNode:
    reference, world_size = cfg.SOLVER.REFERENCE_WORLD_SIZE, comm.get_world_size()
    scaled = DefaultTrainer.auto_scale_workers(cfg, world_size)
    if scaled is not cfg:
        scaled.defrost()
        for entry in scaled.KD.LOSSES:
            entry["warmup_iters"] = round(entry.get("warmup_iters", 0) * reference / world_size)
    return scaled
