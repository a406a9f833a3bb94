"""Checkpoints: strict loading, a student's start from its teacher, stripping, complete files."""

from msad_kd.checkpoint.checkpoint import load_strictly, read_model, save_model
from msad_kd.checkpoint.reading import read_checkpoint
from msad_kd.checkpoint.start import init_from_teacher
from msad_kd.checkpoint.strip import strip_checkpoint
from msad_kd.utils.unpickle import trust_files
