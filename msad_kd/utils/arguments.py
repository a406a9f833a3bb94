"""Check command-line arguments."""

import argparse
import re
from collections.abc import Iterable

from msad_kd.utils.errors import InputError


def positive(text: str) -> int:
    """Convert an argument to a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number of 1 or more")
    return int(text)


def check_pairs(words: Iterable) -> None:
    """Refuse an option or KEY=VALUE among KEY VALUE pairs, where it would be a key or a value.

    Raises:
        InputError: if there is one.
    """
    for word in words:
        if isinstance(word, str) and word.startswith("--"):
            raise InputError(f"'{word}' is an option: write it before the KEY VALUE pairs")
        if isinstance(word, str) and re.match(r"[A-Z]+(\.[A-Z0-9_]+)+=", word):
            key, _, value = word.partition("=")
            raise InputError(f"'{word}': write KEY VALUE with a space: {key} {value}")
