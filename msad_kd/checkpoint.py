"""Checkpoints: loading to the last key, starting a student from its teacher, exporting a model."""

from __future__ import annotations

import logging
import os
import pickle

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from torch import nn

from msad_kd.errors import InputError
from msad_kd.statistics import LOW_SUFFIX

__all__ = [
    "TRAINING_PREFIX",
    "check_exists",
    "export_weights",
    "init_from_teacher",
    "load_strictly",
]

# What distillation adds to a student's parameters, and no exported model has.
TRAINING_PREFIX = "distiller."


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
        except (EOFError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
            raise InputError(
                f"the checkpoint '{self.file}' for {self.config} cannot be read ({error})"
            ) from error

    def _log_incompatible_keys(self, incompatible) -> None:
        extra = [key for key in incompatible.unexpected_keys if not key.startswith(TRAINING_PREFIX)]
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
        raise InputError(f"no checkpoint is named for {purpose}; set MODEL.WEIGHTS")
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
            shape; those of a student's ``distiller`` may stand in the file.
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
        the student's keys that kept their values, those of its ``distiller`` aside; they are also
        named in one warning.
    """
    source, target = teacher.state_dict(), student.state_dict()
    # The student is a low-resolution net, so it takes that resolution's statistics.
    for key in [key for key in source if key.endswith(LOW_SUFFIX)]:
        source[key.removesuffix(LOW_SUFFIX)] = source.pop(key)
    fitting = {k: v for k, v in source.items() if k in target and target[k].shape == v.shape}
    if not backbone:
        fitting = {k: v for k, v in fitting.items() if not k.startswith("backbone.bottom_up.")}
    student.load_state_dict(fitting, strict=False)
    kept = [k for k in target if k not in fitting and not k.startswith(TRAINING_PREFIX)]
    logger = logging.getLogger(__name__)
    logger.info("The student starts from %d of the teacher's weights and buffers", len(fitting))
    if kept:
        logger.warning("Not in the teacher, so left as they were: %s", ", ".join(kept))
    return kept


def export_weights(source: str, target: str, *, half: bool = False) -> None:
    """Write a model alone, without optimizer, iteration and ``distiller``, for stock Detectron2.

    Args:
        source: a training checkpoint.
        target: the file to write; it is complete or it isn't there.
        half: store floating-point weights in fp16 (loading converts them back), but for those
            beyond its range.

    Raises:
        InputError: if the file holds no model.
    """
    contents = torch.load(source, map_location="cpu", weights_only=True)
    if not isinstance(contents, dict) or "model" not in contents:
        raise InputError(f"'{source}' is no checkpoint of Detectron2's: it has no 'model'")
    state = contents["model"]
    state = {k: v for k, v in state.items() if not k.startswith(TRAINING_PREFIX)}
    if half:
        state = {k: _halved(v) for k, v in state.items()}
    part = f"{target}.part"
    torch.save({"model": state}, part)
    os.replace(part, target)


def _halved(value: torch.Tensor) -> torch.Tensor:
    if not value.is_floating_point():
        return value
    half = value.half()
    return half if torch.isfinite(half).all() else value
