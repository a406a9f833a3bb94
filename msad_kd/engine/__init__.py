"""The trainer, its hooks and the launcher."""

from msad_kd.engine.hooks import EvaluateTeacher, SeedEachStep
from msad_kd.engine.trainer import KDTrainer

__all__ = [name for name in globals() if not name.startswith("_")]
