"""Evaluators for COCO and Cityscapes, and what a model costs."""
