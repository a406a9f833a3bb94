"""Kinds of command-line arguments that several tools take."""

import argparse


def positive(text):
    """A command-line argument that is an integer above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value
