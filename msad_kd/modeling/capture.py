"""Context managers that let a stock detector's ``forward`` be used whole, from outside."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

from torch import nn

__all__ = ["answering", "computing", "recording"]


@contextmanager
def recording(module: nn.Module):
    """Yields an object whose ``inputs``, a tuple, and ``output`` are those of the module's last
    call."""
    call = SimpleNamespace(inputs=(), output=None)

    def keep(_, inputs, output):
        call.inputs, call.output = inputs, output

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


@contextmanager
def computing(backbone: nn.Module, levels: Iterable[str]):
    """Within the context, an FPN computes these levels and what they are made of; others are None.

    p2's output convolution alone is a quarter of the multiply-adds of an R-50 FPN.
    """
    top_block = getattr(backbone, "top_block", None)
    source = getattr(top_block, "in_feature", None)  # of all levels above p5
    with ExitStack() as skipped:
        for name in backbone.output_shape().keys() - {source, *levels}:
            output = getattr(backbone, f"fpn_output{name[1:]}", None)
            if output is None:
                output = getattr(top_block, name, None)
            if output is not None:  # else it costs nothing, as a maximum does
                skipped.enter_context(answering(output, None))
        yield
