"""Low-resolution detectors for Detectron2 that learn from high- and multi-resolution teachers."""

from msad_kd.checkpoint.start import init_from_teacher
from msad_kd.config.build import build_config
from msad_kd.config.defaults import add_msad_kd_config
from msad_kd.data.coco_format import register_coco_format
from msad_kd.data.mapper import TwoResolutionMapper
from msad_kd.distill.student import (
    DistilledFCOS,
    DistilledMixin,
    DistilledRCNN,
    DistilledRetinaNet,
    attach_teacher,
)
from msad_kd.engine.trainer import KDTrainer
from msad_kd.losses.dense import DENSE_LOSS_REGISTRY
from msad_kd.losses.feature import DISTILL_LOSS_REGISTRY
from msad_kd.losses.roi import ROI_LOSS_REGISTRY
from msad_kd.modeling.fcos import FCOS
from msad_kd.modeling.fusion import CrossingFeatureFusion
from msad_kd.modeling.multi_resolution import (
    MultiResolutionFCOS,
    MultiResolutionRCNN,
    MultiResolutionRetinaNet,
)
from msad_kd.utils.errors import InputError
