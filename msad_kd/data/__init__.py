"""Images at two resolutions: the mapper, the resumable loader and data sets in COCO format."""

from msad_kd.data.coco_format import register_coco_format
from msad_kd.data.loader import ResumableLoader, build_train_loader
from msad_kd.data.mapper import TwoResolutionMapper, build_mapper
from msad_kd.data.transforms import scale_transform
