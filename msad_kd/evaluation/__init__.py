"""Evaluators for COCO and Cityscapes, and what a model costs."""

from msad_kd.evaluation.build import build_evaluator
from msad_kd.evaluation.cost import count_gmacs, fix_detections, time_models
