"""The backbone of a multi-resolution teacher: an FPN with levels enough for both resolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, build_resnet_backbone
from torch import nn

from msad_kd.pyramid import level_shift

__all__ = ["AlignedFPN", "LastLevelsMaxPool", "build_aligned_resnet_fpn_backbone"]


class LastLevelsMaxPool(nn.Module):
    """Detectron2's ``LastLevelMaxPool``, several times: p6, p7, ... by subsampling p5."""

    in_feature = "p5"

    def __init__(self, num_levels: int):
        super().__init__()
        self.num_levels = num_levels

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        levels = []
        for _ in range(self.num_levels):
            x = F.max_pool2d(x, kernel_size=1, stride=2)
            levels.append(x)
        return levels


class AlignedFPN(FPN):
    """An FPN whose images are padded so that k times smaller ones are padded rightly, too.

    Its parameters have the names of the stock FPN's.
    """

    def __init__(self, *, scale: int, **kwargs):
        """
        Args:
            scale: k, high-resolution side / low-resolution side.
            kwargs: arguments of ``FPN``.
        """
        super().__init__(**kwargs)
        self.scale = scale

    @property
    def size_divisibility(self) -> int:
        # 32 k and not 32: the low-resolution image, padded to 1/k of this, is then a multiple of 32
        # itself, and both pyramids have the same cells.
        return self.scale * super().size_divisibility


@BACKBONE_REGISTRY.register()
def build_aligned_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> AlignedFPN:
    """A ResNet FPN with levels p2..p6 at low resolution and m more at high: p2..p7 for k = 2."""
    return AlignedFPN(
        scale=cfg.KD.SCALE,
        bottom_up=build_resnet_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelsMaxPool(1 + level_shift(cfg.KD.SCALE)),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
