"""The trainer, its hooks and the launcher."""

from msad_kd.engine.hooks import EvaluateTeacher, SeedEachStep
from msad_kd.engine.trainer import KDTrainer
