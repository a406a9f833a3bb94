"""Structural similarity between feature maps, with a gradient written by hand."""
