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
        levels = [x]
        for _ in range(self.num_levels):
            levels.append(F.max_pool2d(levels[-1], kernel_size=1, stride=2))
        return levels[1:]


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
        for level in range(6, 6 + num_levels):
            options = {"bias": not norm, "norm": get_norm(norm, out_channels)}
            convolution = Conv2d(in_channels, out_channels, 3, stride=2, padding=1, **options)
            in_channels = out_channels
            weight_init.c2_xavier_fill(convolution)
            self.add_module(f"p{level}", convolution)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor | None]:
        """Return the levels above p5, (N, C, H, W); None for those that ``computing`` skips."""
        levels: list[torch.Tensor | None] = []
        for convolution in self.children():
            x = convolution(F.relu(x) if levels and x is not None else x)
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
        # 32 k instead of 32: 1/k of the padded size is then a multiple of 32 as well.
        return self.scale * super().size_divisibility


def _build_fpn(kind: type[FPN], cfg: CfgNode, bottom_up: Backbone, levels: int, **kwargs) -> FPN:
    keys = cfg.MODEL.FPN
    channels, top, top_levels = keys.OUT_CHANNELS, keys.TOP_BLOCK, levels - len(keys.IN_FEATURES)
    if top == "maxpool":
        top_block = LastLevelsMaxPool(top_levels)
    elif top in ("conv_p5", "conv_res5"):
        source = top.removeprefix("conv_")
        in_channels = channels if source == "p5" else bottom_up.output_shape()[source].channels
        top_block = LastLevelsConv(in_channels, channels, top_levels, source, keys.NORM)
    else:
        raise InputError(f"MODEL.FPN.TOP_BLOCK is '{top}'; use maxpool, conv_p5 or conv_res5")
    return kind(
        bottom_up=bottom_up,
        in_features=keys.IN_FEATURES,
        out_channels=channels,
        norm=keys.NORM,
        top_block=top_block,
        fuse_type=keys.FUSE_TYPE,
        **kwargs,
    )


def build_five_level_fpn(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    """Build the FPN of ``MODEL.FPN`` on any backbone: p2..p6, or p3..p7 without res2."""
    return _build_fpn(FPN, cfg, bottom_up, _DETECTOR_LEVELS)


def build_aligned_fpn(cfg: CfgNode, bottom_up: Backbone) -> AlignedFPN:
    """Build a multi-resolution teacher's FPN: five levels at low resolution, m more at high."""
    levels = _DETECTOR_LEVELS + level_shift(cfg.KD.SCALE)
    return _build_fpn(AlignedFPN, cfg, bottom_up, levels, scale=cfg.KD.SCALE)


@BACKBONE_REGISTRY.register()
def build_five_level_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build a ResNet FPN whose coarsest levels are made as ``MODEL.FPN.TOP_BLOCK`` says."""
    return build_five_level_fpn(cfg, build_resnet_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_aligned_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> AlignedFPN:
    """Build a ResNet FPN with levels p2..p6 at low resolution and m more at high."""
    return build_aligned_fpn(cfg, build_resnet_backbone(cfg, input_shape))


def _build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    # Here, as importing timm takes more time than all of msad_kd.
    from msad_kd.modeling.timm_backbone import TimmBackbone

    return TimmBackbone(cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build an FPN on ``MODEL.TIMM``: p2..p6, or p3..p7 when FPN.IN_FEATURES lacks res2."""
    return build_five_level_fpn(cfg, _build_timm_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_aligned_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> AlignedFPN:
    """Build the FPN of a multi-resolution teacher: m = log2 k levels more."""
    return build_aligned_fpn(cfg, _build_timm_backbone(cfg, input_shape))
