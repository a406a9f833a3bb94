"""Low-resolution detectors as good as high-resolution ones, by distillation, on Detectron2."""

from msad_kd import backbone  # noqa: F401  registers the teachers' backbones
from msad_kd.config import add_msad_kd_config
from msad_kd.data import TwoResolutionMapper
from msad_kd.datasets import register_coco_format
from msad_kd.distilled import DistilledMixin, DistilledRCNN, attach_teacher
from msad_kd.fusion import CrossingFeatureFusion
from msad_kd.multi_resolution import MultiResolutionRCNN
from msad_kd.trainer import KDTrainer

__all__ = [
    "CrossingFeatureFusion",
    "DistilledMixin",
    "DistilledRCNN",
    "KDTrainer",
    "MultiResolutionRCNN",
    "TwoResolutionMapper",
    "add_msad_kd_config",
    "attach_teacher",
    "register_coco_format",
]
