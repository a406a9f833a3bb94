"""Stripping a training checkpoint down to the model that stock Detectron2 loads."""

import torch

from msad_kd.checkpoint.checkpoint import TRAINING_PREFIX, read_model, save_model


def strip_checkpoint(source: str, target: str, *, half: bool = False) -> None:
    """Write the model of a training checkpoint without optimizer, iteration and ``distiller``.

    Args:
        source: the training checkpoint.
        target: the file to write.
        half: whether to store weights in fp16, except for those beyond its range. Loading converts
            them back.

    Raises:
        InputError: as ``read_model``.
    """
    state = read_model(source)
    state = {key: value for key, value in state.items() if not key.startswith(TRAINING_PREFIX)}
    for key, value in state.items() if half else ():
        if value.is_floating_point() and torch.isfinite(value.half()).all():
            state[key] = value.half()
    save_model(state, target)
