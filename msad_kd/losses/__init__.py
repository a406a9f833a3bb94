"""Distillation losses between feature maps or RoI predictions, and their settings."""
