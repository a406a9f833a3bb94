"""The error for what a user gave and cannot be used."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["InputError", "input_error_of", "nearest"]


class InputError(ValueError):
    """A file, config key or level does not do; the message is a sentence saying what to change.

    ``train_net.py`` prints it without a traceback.
    """


def input_error_of(error: Exception) -> str | None:
    """The sentence of an ``InputError``, also of one that another process raised, or None.

    A data loader's worker and a launched process hand on the text of their traceback, which ends
    with the error's qualified name and its sentence.
    """
    text = str(error).rstrip()
    _, mark, sentence = text.rpartition(f"{InputError.__module__}.{InputError.__qualname__}: ")
    if mark:
        return sentence
    return text if isinstance(error, InputError) else None


def nearest(name: str, known: Iterable[str]) -> str:
    """What a message about an unknown name ends with: "; did you mean x?", or "" for none near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
