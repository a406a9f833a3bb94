"""Two context managers that let a stock detector's ``forward`` be used whole, from outside."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from torch import nn

__all__ = ["answering", "recording"]


@contextmanager
def recording(module: nn.Module):
    """Yields an object whose ``input`` and ``output`` are those of the module's last call."""
    call = SimpleNamespace(input=None, output=None)

    def keep(_, inputs, output):
        call.input, call.output = inputs[0], output

    handle = module.register_forward_hook(keep)
    try:
        yield call
    finally:
        handle.remove()


@contextmanager
def answering(module: nn.Module, output: Any):
    """Calling the module returns ``output``, which was computed before, instead of computing."""
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del module.forward  # the class's own is visible again
