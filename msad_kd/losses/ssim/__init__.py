"""Structural similarity (SSIM) between feature maps, with a hand-written gradient."""

from msad_kd.losses.ssim.functional import blind_share, rescale, ssim, ssim_loss
