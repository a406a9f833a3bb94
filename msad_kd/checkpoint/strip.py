"""Stripping a training checkpoint down to the model that stock Detectron2 loads."""

import torch

from msad_kd.checkpoint.checkpoint import TRAINING_PREFIX, read_model, save_model


def strip_checkpoint(source: str, target: str, *, half: bool = False) -> None:
    """Write the model of a training checkpoint without optimizer, iteration and ``distiller``.

    The names of the classes stay, and the file's SHA-256 is written beside it.

    Args:
        source: the training checkpoint.
        target: the file to write; its suffix, .pth or .safetensors, decides the format.
        half: whether to store weights in fp16, except for those beyond its range. Loading converts
            them back.

    Raises:
        InputError: as ``read_model``.
    """
    contents = read_model(source, "stripping")
    state = contents["model"]
    state = {key: value for key, value in state.items() if not key.startswith(TRAINING_PREFIX)}
    for key, value in state.items() if half else ():
        if value.is_floating_point() and torch.isfinite(value.half()).all():
            state[key] = value.half()
    save_model(state, target, contents.get("classes"))
