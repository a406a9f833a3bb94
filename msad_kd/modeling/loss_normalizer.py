"""The loss normalizer of RetinaNet and FCOS.

Detectron2 divides the losses of its dense detectors by a moving average of the number of positive
locations: a plain float on the model, which every process has for itself and no ``state_dict``
holds. ``msad_kd.engine.hooks.KeepNormalizer`` puts it into the training checkpoints.
"""

from torch import nn


def get_normalizer(model: nn.Module) -> float | None:
    """Return the moving average; None before the first step and for models without one."""
    return getattr(model, "loss_normalizer", None)


def set_normalizer(model: nn.Module, value: float | None) -> None:
    """Set the moving average; None makes the model start it anew."""
    if value is not None:
        model.loss_normalizer = value
    elif hasattr(model, "loss_normalizer"):
        del model.loss_normalizer
