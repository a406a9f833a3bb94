"""How strongly distillation pulls at the backbone, relative to the detection losses."""

from collections.abc import Iterable

import torch
from torch import nn

from msad_kd.utils.errors import InputError


def last_layer(backbone: nn.Module) -> nn.Parameter:
    """Return the last trained weight that all levels of a backbone depend on.

    It is in an FPN's bottom-up path or, if that is frozen, in its coarsest lateral convolution.

    Raises:
        InputError: if all weights are frozen.
    """
    laterals = getattr(backbone, "lateral_convs", [])  # from coarse to fine
    for part in (getattr(backbone, "bottom_up", backbone), *laterals[:1], backbone):
        trained = [p for p in part.parameters() if p.requires_grad and p.dim() > 1]
        if trained:
            return trained[-1]
    raise InputError(
        "KD.GRADIENT_RATIO_PERIOD compares gradients at the backbone's last trained weight, and "
        "all of them are frozen; set it to 0"
    )


def gradient_ratio(
    distillation: Iterable[torch.Tensor], detection: Iterable[torch.Tensor], layer: nn.Parameter
) -> torch.Tensor:
    """Return the gradient norm of the distillation losses over that of the detection losses.

    Both gradients are taken at one layer's weight; losses that do not depend on it have norm 0. The
    graph is kept and no ``.grad`` changes, so the training step stays the same.
    """

    def norm(losses: Iterable[torch.Tensor]) -> torch.Tensor:
        # A power of 2 is exact in fp32, and in fp16 it keeps small gradients from underflowing.
        total = sum(losses) * 2.0**12
        (gradient,) = torch.autograd.grad(total, layer, retain_graph=True, allow_unused=True)
        return layer.new_zeros(()) if gradient is None else gradient.float().norm()

    return norm(distillation) / norm(detection)
