"""A copy of a frozen backbone that computes the same levels in less time."""

import copy
from functools import partial

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from msad_kd.modeling.batch_statistics import has_low_resolution_statistics
from msad_kd.modeling.pyramid import Pyramid

# From so many values in a map on, oneDNN is faster at 1x1 convolutions.
_LARGE = 2**18


def for_inference(backbone: nn.Module) -> nn.Module:
    """Return a copy of a backbone in eval mode whose levels are the same up to rounding.

    Batch normalisation becomes part of Detectron2's convolutions, unless it has statistics for
    each resolution. On a CPU, maps are in channels_last inside, and oneDNN does large 1x1
    convolutions, for which torch, with one thread, would make them contiguous.

    Later changes of the backbone's weights do not reach the copy.
    """
    backbone = copy.deepcopy(backbone).requires_grad_(False)
    on_cpu = next(backbone.parameters()).is_cpu and torch.backends.mkldnn.is_available()
    for module in backbone.modules():
        if type(module) is Conv2d and _can_be_folded(module.norm):
            norm, module.norm = module.norm, None
            statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            fused = fuse_conv_bn_weights(module.weight, module.bias, *statistics)
            module.weight, module.bias = (x.requires_grad_(False) for x in fused)
        if on_cpu and type(module) in (Conv2d, nn.Conv2d) and module.kernel_size == (1, 1):
            module.forward = partial(_convolve, module)
    if on_cpu:
        backbone.to(memory_format=torch.channels_last)
        backbone.register_forward_pre_hook(_to_channels_last)
        backbone.register_forward_hook(_to_contiguous)
    return backbone


def _can_be_folded(norm: nn.Module | None) -> bool:
    if isinstance(norm, _BatchNorm):
        return norm.track_running_stats and norm.affine and not has_low_resolution_statistics(norm)
    return isinstance(norm, FrozenBatchNorm2d)


def _convolve(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    autocast = torch.is_autocast_enabled("cpu")
    if x.dtype != torch.float32 or autocast or x.numel() < _LARGE or layer.padding != (0, 0):
        return type(layer).forward(layer, x)
    shape = layer.padding, layer.stride, layer.dilation, layer.groups
    x = torch.mkldnn_convolution(x, layer.weight, layer.bias, *shape)
    for part in (getattr(layer, "norm", None), getattr(layer, "activation", None)):
        x = x if part is None else part(x)
    return x


def _to_channels_last(_, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (inputs[0].contiguous(memory_format=torch.channels_last),)


def _to_contiguous(_, inputs, levels: Pyramid) -> Pyramid:
    return {name: x if x is None else x.contiguous() for name, x in levels.items()}
