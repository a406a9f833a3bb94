"""The config keys, and how the config of a run or of a ladder's stage is built and checked."""

from msad_kd.config.build import build_config, merge_config
from msad_kd.config.defaults import add_msad_kd_config
from msad_kd.config.stages import Stage, read_stages, stage_config
