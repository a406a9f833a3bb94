"""Low-resolution detectors that learn from high- and multi-resolution teachers, on Detectron2."""

from msad_kd import backbone, swin, torchvision_backbone  # noqa: F401  they register backbones
from msad_kd.checkpoint import init_from_teacher
from msad_kd.config import add_msad_kd_config
from msad_kd.data import TwoResolutionMapper
from msad_kd.datasets import register_coco_format
from msad_kd.distilled import (
    DistilledFCOS,
    DistilledMixin,
    DistilledRCNN,
    DistilledRetinaNet,
    attach_teacher,
)
from msad_kd.errors import InputError
from msad_kd.fcos import FCOS
from msad_kd.fusion import CrossingFeatureFusion
from msad_kd.losses import DISTILL_LOSS_REGISTRY
from msad_kd.multi_resolution import (
    MultiResolutionFCOS,
    MultiResolutionRCNN,
    MultiResolutionRetinaNet,
)
from msad_kd.roi_losses import ROI_LOSS_REGISTRY
from msad_kd.setup import build_config
from msad_kd.trainer import KDTrainer

__all__ = [
    "DISTILL_LOSS_REGISTRY",
    "FCOS",
    "ROI_LOSS_REGISTRY",
    "CrossingFeatureFusion",
    "DistilledFCOS",
    "DistilledMixin",
    "DistilledRCNN",
    "DistilledRetinaNet",
    "InputError",
    "KDTrainer",
    "MultiResolutionFCOS",
    "MultiResolutionRCNN",
    "MultiResolutionRetinaNet",
    "TwoResolutionMapper",
    "add_msad_kd_config",
    "attach_teacher",
    "build_config",
    "init_from_teacher",
    "register_coco_format",
]
