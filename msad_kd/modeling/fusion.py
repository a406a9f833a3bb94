"""Crossing feature-level fusion (C-FF) of two aligned pyramids: MSAD, arXiv 2109.06875, sec. 3.2.

N: images, C: channels of a level, H, W: its height and width.
"""

from __future__ import annotations

import torch
from fvcore.nn import weight_init
from torch import nn

from msad_kd.modeling.pyramid import Pyramid
from msad_kd.utils.errors import InputError

__all__ = ["CrossingFeatureFusion", "masked_mean"]


def masked_mean(x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over the cells of (N, C, H, W) where ``mask`` (N, 1, H, W) is 1, or all: (N, C)."""
    if mask is None:
        return x.mean(dim=(2, 3))
    return (x * mask).sum(dim=(2, 3)) / mask.sum(dim=(2, 3)).clamp(min=1)


class CrossingFeatureFusion(nn.Module):
    """Fuse the levels of a high- and a low-resolution pyramid by weights each image chooses.

    Per image and level, both maps are averaged to one vector of 2C; a linear map to 2C/reduction
    units, ReLU and a linear map to 2, both without bias, and a softmax give h_0 and h_1; the fused
    map is h_0 HR + h_1 LR. One module serves all levels.
    """

    def __init__(self, in_channels: int, reduction: int = 16):
        """
        Args:
            in_channels: C, equal at all levels.
            reduction: 2C over the number of hidden units.
        """
        super().__init__()
        hidden = max(2 * in_channels // reduction, 1)
        self.squeeze = nn.Linear(2 * in_channels, hidden, bias=False)
        self.excite = nn.Linear(hidden, 2, bias=False)
        for layer in (self.squeeze, self.excite):
            weight_init.c2_xavier_fill(layer)  # Kaiming-uniform with a = 1, as published

    def weights(
        self, hr: torch.Tensor, lr: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """h_0 and h_1 of each image: (N, 2), rows summing to 1, for two maps (N, C, H, W)."""
        pooled = torch.cat([masked_mean(hr, mask), masked_mean(lr, mask)], dim=1)
        return self.excite(self.squeeze(pooled).relu()).softmax(dim=1)

    def forward(self, hr: Pyramid, lr: Pyramid, masks: Pyramid | None = None) -> Pyramid:
        """
        Args:
            hr, lr: level name to (N, C, H, W), the same names and shapes in both.
            masks: level name to (N, 1, H, W), 1 where there is image and 0 where there is padding;
                None pools whole maps.

        Returns:
            level name to the fused map (N, C, H, W).

        Raises:
            InputError: if names or shapes differ.
        """
        if hr.keys() != lr.keys():
            raise InputError(f"cannot fuse levels {sorted(hr)} with levels {sorted(lr)}")
        fused = {}
        for name in hr:
            if hr[name].shape != lr[name].shape:
                raise InputError(
                    f"cannot fuse level {name}: {tuple(hr[name].shape)} at high and "
                    f"{tuple(lr[name].shape)} at low resolution"
                )
            mask = None if masks is None else masks[name]
            h0, h1 = self.weights(hr[name], lr[name], mask)[:, :, None, None, None].unbind(dim=1)
            fused[name] = h0 * hr[name] + h1 * lr[name]
        return fused
