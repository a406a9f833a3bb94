"""Crossing feature-level fusion (C-FF) of two aligned pyramids: MSAD, arXiv 2109.06875, sec. 3.2.

N: images, C: channels of a level, H, W: its height and width.
"""

import torch
from fvcore.nn import weight_init
from torch import nn

from msad_kd.modeling.pyramid import Pyramid
from msad_kd.utils.errors import InputError


def masked_mean(x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return the mean (N, C) of (N, C, H, W) over the cells where ``mask`` (N, 1, H, W) is 1.

    Without a mask it is the mean over all cells; a mask of zeros gives 0.
    """
    if mask is None:
        return x.mean(dim=(2, 3))
    # In fp16 the sum of a large map overflows.
    over = {"dim": (2, 3), "dtype": torch.promote_types(x.dtype, torch.float32)}
    return ((x * mask).sum(**over) / mask.sum(**over).clamp(min=1)).to(x.dtype)


class CrossingFeatureFusion(nn.Module):
    """Fuse a high- and a low-resolution pyramid level by level, with weights for each image.

    Both maps of a level are averaged to one vector of 2C. A linear map to 2C/reduction units, ReLU,
    a linear map to 2 (both without bias) and a softmax give h_0 and h_1; the fused map is
    h_0 HR + h_1 LR. The same two linear maps serve all levels.
    """

    def __init__(self, in_channels: int, reduction: int = 16):
        """Build the linear maps.

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
        """Return h_0 and h_1 of each image, (N, 2) with rows summing to 1, for (N, C, H, W)."""
        pooled = torch.cat([masked_mean(hr, mask), masked_mean(lr, mask)], dim=1)
        return self.excite(self.squeeze(pooled).relu()).softmax(dim=1)

    def forward(self, hr: Pyramid, lr: Pyramid, masks: Pyramid | None = None) -> Pyramid:
        """Return the fused pyramid, level name to (N, C, H, W).

        Args:
            hr: level name to (N, C, H, W).
            lr: the same names and shapes.
            masks: level name to (N, 1, H, W), 1 inside an image and 0 in its padding; None averages
                over whole maps.

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
