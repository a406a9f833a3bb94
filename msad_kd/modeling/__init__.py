"""Multi-resolution teachers and the parts of detectors: backbones, pyramids, fusion, FCOS."""

from msad_kd.modeling.fcos import FCOS
from msad_kd.modeling.fpn import build_aligned_fpn, build_five_level_fpn
from msad_kd.modeling.fusion import CrossingFeatureFusion
from msad_kd.modeling.multi_resolution import (
    MultiResolutionFCOS,
    MultiResolutionRCNN,
    MultiResolutionRetinaNet,
)
