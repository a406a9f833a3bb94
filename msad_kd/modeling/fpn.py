"""FPNs: five levels for a detector, more for a multi-resolution teacher.

A detector reads five levels: p2..p6 when its FPN starts at res2, p3..p7 when it starts at res3. A
multi-resolution teacher's backbone serves two resolutions and has m = log2 k levels more.
"""

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone, build_resnet_backbone
from torch import nn

from msad_kd.modeling.pyramid import level_shift
from msad_kd.utils.errors import InputError

_DETECTOR_LEVELS = 5


class LastLevelsMaxPool(nn.Module):
    """Make p6, p7, ... by subsampling p5, as Detectron2's ``LastLevelMaxPool`` makes p6."""

    in_feature = "p5"

    def __init__(self, num_levels: int):
        """Make ``num_levels`` levels."""
        super().__init__()
        self.num_levels = num_levels

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the levels above p5, (N, C, H, W)."""
        levels = []
        for _ in range(self.num_levels):
            x = F.max_pool2d(x, kernel_size=1, stride=2)
            levels.append(x)
        return levels


class LastLevelsConv(nn.Module):
    """Make p6, p7, ... by strided convolutions, as Detectron2's ``LastLevelP6P7`` makes two.

    Without normalisation its parameters are those of the stock block, but its levels can be so
    large that a feature loss sees little beside them; with it they are on the others' scale.
    """

    def __init__(
        self, in_channels: int, out_channels: int, num_levels: int, in_feature: str, norm: str = ""
    ):
        """Build the convolutions that start from ``in_feature``, which has ``in_channels``."""
        super().__init__()
        self.num_levels = num_levels
        self.in_feature = in_feature
        for i in range(num_levels):
            convolution = Conv2d(
                out_channels if i else in_channels,
                out_channels,
                kernel_size=3,
                stride=2,
                padding=1,
                bias=not norm,
                norm=get_norm(norm, out_channels),
            )
            weight_init.c2_xavier_fill(convolution)
            self.add_module(f"p{6 + i}", convolution)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor | None]:
        """Return the levels above p5, (N, C, H, W); None for those that ``computing`` skips."""
        levels: list[torch.Tensor | None] = []
        for convolution in self.children():
            if levels and x is not None:
                x = F.relu(x)
            x = convolution(x)
            levels.append(x)
        return levels


class AlignedFPN(FPN):
    """An FPN that pads images so that those of 1/k the size are padded to the same cells.

    Its parameters have the stock FPN's names.
    """

    def __init__(self, *, scale: int, **kwargs):
        """Build the stock FPN of ``kwargs``; ``scale`` is k."""
        super().__init__(**kwargs)
        self.scale = scale

    @property
    def size_divisibility(self) -> int:
        """Return the number of pixels that the padded images' sides are multiples of."""
        # 32 k instead of 32: the low-resolution image, padded to 1/k of the size, is then a
        # multiple of 32 as well.
        return self.scale * super().size_divisibility


def _fpn_arguments(cfg: CfgNode, bottom_up: Backbone, levels: int) -> dict:
    keys = cfg.MODEL.FPN
    kind, top_levels = keys.TOP_BLOCK, levels - len(keys.IN_FEATURES)
    if kind == "maxpool":
        top_block = LastLevelsMaxPool(top_levels)
    elif kind in ("conv_p5", "conv_res5"):
        channels, source = keys.OUT_CHANNELS, kind.removeprefix("conv_")
        in_channels = channels if source == "p5" else bottom_up.output_shape()[source].channels
        top_block = LastLevelsConv(in_channels, channels, top_levels, source, keys.NORM)
    else:
        raise InputError(f"MODEL.FPN.TOP_BLOCK is '{kind}'; use maxpool, conv_p5 or conv_res5")
    return {
        "bottom_up": bottom_up,
        "in_features": keys.IN_FEATURES,
        "out_channels": keys.OUT_CHANNELS,
        "norm": keys.NORM,
        "top_block": top_block,
        "fuse_type": keys.FUSE_TYPE,
    }


def build_five_level_fpn(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    """Build the FPN of ``MODEL.FPN`` on any backbone: p2..p6, or p3..p7 without res2.

    Raises:
        InputError: if ``MODEL.FPN.TOP_BLOCK`` is unknown.
    """
    return FPN(**_fpn_arguments(cfg, bottom_up, _DETECTOR_LEVELS))


def build_aligned_fpn(cfg: CfgNode, bottom_up: Backbone) -> AlignedFPN:
    """Build the FPN of a multi-resolution teacher: five levels at low resolution, m more at high.

    Raises:
        InputError: if ``MODEL.FPN.TOP_BLOCK`` is unknown.
    """
    arguments = _fpn_arguments(cfg, bottom_up, _DETECTOR_LEVELS + level_shift(cfg.KD.SCALE))
    return AlignedFPN(scale=cfg.KD.SCALE, **arguments)


@BACKBONE_REGISTRY.register()
def build_five_level_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build a ResNet FPN whose coarsest levels are made as ``MODEL.FPN.TOP_BLOCK`` says."""
    return build_five_level_fpn(cfg, build_resnet_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_aligned_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> AlignedFPN:
    """Build a ResNet FPN with levels p2..p6 at low resolution and m more at high."""
    return build_aligned_fpn(cfg, build_resnet_backbone(cfg, input_shape))
