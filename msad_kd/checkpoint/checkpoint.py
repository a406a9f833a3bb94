"""Checkpoints: loading to the last key, starting a student from its teacher, exporting a model."""

from __future__ import annotations

import logging
import os
import pickle
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from torch import nn

from msad_kd.checkpoint.files import replacing
from msad_kd.modeling.batch_statistics import LOW_SUFFIX
from msad_kd.utils.errors import InputError

__all__ = [
    "TRAINING_PREFIX",
    "check_exists",
    "export_weights",
    "init_from_teacher",
    "load_strictly",
    "read_file",
    "read_model",
    "save_model",
]

# What distillation adds to a student's parameters, and no exported model has.
TRAINING_PREFIX = "distiller."

# Buffers that Detectron2 stored until 2020, and takes from the config since.
FORMERLY_STORED = ("pixel_mean", "pixel_std")

# What torch.load raises, depending on how a file is broken or what it is instead of a checkpoint.
UNREADABLE = (EOFError, KeyError, RuntimeError, pickle.UnpicklingError)


class _StrictCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, for which a key that does not fit is an error."""

    def __init__(self, model: nn.Module, config: str):
        super().__init__(model)
        self.config = config
        self.file = ""

    def load(self, path, *args, **kwargs):
        self.file = path
        return super().load(path, *args, **kwargs)

    def _load_file(self, filename):
        try:
            return super()._load_file(filename)
        except UNREADABLE as error:
            raise InputError(
                f"the checkpoint '{self.file}' for {self.config} cannot be read ({error})"
            ) from error

    def _log_incompatible_keys(self, incompatible) -> None:
        extra = [
            key
            for key in incompatible.unexpected_keys
            if not key.startswith(TRAINING_PREFIX) and key not in FORMERLY_STORED
        ]
        misshapen = [key for key, _, _ in incompatible.incorrect_shapes]  # "missing", too
        missing = [key for key in incompatible.missing_keys if key not in misshapen]
        faults = [
            (missing, "keys of the model are absent from it"),
            (extra, "of its keys are not in the model"),
            (
                [f"{key} {a} -> {b}" for key, a, b in incompatible.incorrect_shapes],
                "of its keys have another shape than the model's",
            ),
        ]
        problems = [f"{len(keys)} {what}, e.g. {keys[0]}" for keys, what in faults if keys]
        if problems:
            raise InputError(
                f"'{self.file}' does not fit {self.config}: {'; '.join(problems)}; was it trained "
                "with another config?"
            )


def check_exists(path: str, purpose: str) -> None:
    """See that there is such a checkpoint.

    Raises:
        InputError: if the path is empty or there is no such file.
    """
    if not path:
        raise InputError(
            f"no checkpoint is named for {purpose}; give its path (in a config, MODEL.WEIGHTS)"
        )
    # Addresses of other kinds (https://, detectron2://) are fetched when they are read.
    if "://" not in path and not PathManager.isfile(path):
        raise InputError(
            f"the checkpoint '{path}' for {purpose} does not exist; train it first, or correct "
            "the path"
        )


def load_strictly(model: nn.Module, path: str, config: str) -> None:
    """Load a checkpoint, every key of which has to fit, into a model.

    Args:
        model: the model.
        path: anything Detectron2's checkpointer reads.
        config: what the model was built from, for the message.

    Raises:
        InputError: if there is no such file, or if keys are missing, unexpected or of another
            shape; those of a student's ``distiller`` may stand in the file, and, as they once did,
            the pixels' mean and deviation.
    """
    check_exists(path, config)
    _StrictCheckpointer(model, config).load(path)


def init_from_teacher(
    student: nn.Module, teacher: nn.Module, *, backbone: bool = True
) -> list[str]:
    """Copy to a student all weights and buffers whose name and shape the teacher has, too.

    Args:
        backbone: whether those of the backbone's bottom-up path are copied, too.

    Returns:
        the student's keys that kept their values, those of its ``distiller`` and of what was not to
        be copied aside; they are also named in one warning.

    Raises:
        InputError: if the bottom-up paths, which were to be copied, are not of the same net.
    """
    source, target = teacher.state_dict(), student.state_dict()
    # The student is a low-resolution net, so it takes that resolution's statistics.
    for key in [key for key in source if key.endswith(LOW_SUFFIX)]:
        source[key.removesuffix(LOW_SUFFIX)] = source.pop(key)
    fitting = {k: v for k, v in source.items() if k in target and target[k].shape == v.shape}
    path = "backbone.bottom_up."
    # A frozen normalisation counts no batches.
    nets = [{k for k in x if k.startswith(path) and "batches" not in k} for x in (source, target)]
    if not backbone:
        fitting = {k: v for k, v in fitting.items() if not k.startswith(path)}
    elif differing := sorted(nets[0].symmetric_difference(nets[1]) | (nets[1] - fitting.keys())):
        raise InputError(
            f"the student is to start from its teacher, but their backbones differ (in "
            f"{len(differing)} weights, e.g. {differing[0]}); set KD.TEACHER.INIT_BACKBONE False "
            "to take neck and heads alone, and MODEL.WEIGHTS to where the backbone starts"
        )
    student.load_state_dict(fitting, strict=False)
    left = (TRAINING_PREFIX,) if backbone else (TRAINING_PREFIX, path)
    kept = [k for k in target if k not in fitting and not k.startswith(left)]
    logger = logging.getLogger(__name__)
    logger.info("The student starts from %d of the teacher's weights and buffers", len(fitting))
    if kept:
        logger.warning("Not in the teacher, so left as they were: %s", ", ".join(kept))
    return kept


def read_file(path: str) -> Any:
    """What a file of ``torch.save``'s holds, on the CPU.

    Raises:
        InputError: if there is no such file, or it holds more than tensors, or nothing readable.
    """
    if not os.path.isfile(path):
        raise InputError(f"the file '{path}' does not exist")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise InputError(f"the file '{path}' cannot be read as a checkpoint ({error})") from error


def read_model(path: str) -> dict[str, torch.Tensor]:
    """The state dict in a checkpoint of Detectron2's, on the CPU.

    Raises:
        InputError: as ``read_file``, and if the file holds no model.
    """
    contents = read_file(path)
    if not isinstance(contents, dict) or "model" not in contents:
        raise InputError(f"'{path}' is no checkpoint of Detectron2's: it has no 'model'")
    return contents["model"]


def save_model(state: dict[str, torch.Tensor], path: str) -> None:
    """Write a state dict as Detectron2 reads it; the file is complete or it isn't there."""
    with replacing(path) as part:
        torch.save({"model": state}, part)


def export_weights(source: str, target: str, *, half: bool = False) -> None:
    """Write a model alone, without optimizer, iteration and ``distiller``, for stock Detectron2.

    Args:
        source: a training checkpoint.
        target: the file to write.
        half: store floating-point weights in fp16 (loading converts them back), but for those
            beyond its range.

    Raises:
        InputError: as ``read_model``.
    """
    state = read_model(source)
    state = {k: v for k, v in state.items() if not k.startswith(TRAINING_PREFIX)}
    if half:
        state = {k: _halved(v) for k, v in state.items()}
    save_model(state, target)


def _halved(value: torch.Tensor) -> torch.Tensor:
    if not value.is_floating_point():
        return value
    half = value.half()
    return half if torch.isfinite(half).all() else value
