"""Types of command-line arguments."""

import argparse

from msad_kd.utils.unpickle import TrustFiles

__all__ = ["TrustFiles", "positive"]


def positive(text):
    """Convert a command-line argument to an integer above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value
