"""Stripping a training checkpoint down to the model that stock Detectron2 loads."""

import torch

from msad_kd.checkpoint.checkpoint import TRAINING_PREFIX, read_model, save_model


def strip_checkpoint(source: str, target: str, *, half: bool = False) -> None:
    """Write the model of a training checkpoint without optimizer, iteration and ``distiller``.

    Args:
        source: the training checkpoint.
        target: the file to write.
        half: whether to store floating-point weights in fp16; values beyond its range stay in
            fp32. Loading converts all of them back.

    Raises:
        InputError: as ``read_model``.
    """
    state = read_model(source)
    state = {key: value for key, value in state.items() if not key.startswith(TRAINING_PREFIX)}
    save_model({key: _halve(value) for key, value in state.items()} if half else state, target)


def _halve(value: torch.Tensor) -> torch.Tensor:
    if not value.is_floating_point():
        return value
    half = value.half()
    return half if torch.isfinite(half).all() else value
