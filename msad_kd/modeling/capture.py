"""Context managers that listen to a module or answer in its place, and leave no trace."""

from collections.abc import Iterable
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

from detectron2.modeling import FPN
from torch import nn

from msad_kd.utils.replaced import replaced


@contextmanager
def recording(module: nn.Module):
    """Record a module's last call: ``inputs``, a tuple of its arguments, and ``output``."""
    call = SimpleNamespace(inputs=(), output=None)

    def keep(_, inputs, output):
        call.inputs, call.output = inputs, output

    with module.register_forward_hook(keep):
        yield call


def answering(module: nn.Module, output: Any):
    """Let the module return ``output``, which was computed before, instead of computing."""
    return replaced(module, forward=lambda *args, **kwargs: output)


@contextmanager
def scoring_above(detector: nn.Module, score: float):
    """Let a detector return only detections with more than this score, in [0, 1].

    The masks of others are not computed. Suppression and the limit per image keep the best scores,
    so those that are returned stay the same. A higher threshold of the model's own stays in place.
    """
    with ExitStack() as raised:
        for part in detector.modules():  # a dense detector itself, or each box predictor
            if getattr(part, "test_score_thresh", score) < score:
                raised.enter_context(replaced(part, test_score_thresh=score))
        yield


@contextmanager
def computing(backbone: nn.Module, levels: Iterable[str]):
    """Let an FPN compute only these levels and what they are made of; the others are None.

    It saves time: p2's output convolution alone is a quarter of the multiply-adds of an R-50 FPN.
    """
    if not isinstance(backbone, FPN):  # such as C4, of which there is nothing to leave out
        yield
        return
    names, needed = list(backbone.output_shape()), set(levels)
    top_block = getattr(backbone, "top_block", None)
    top = names[-top_block.num_levels :] if top_block else []
    with ExitStack() as skipped:
        if top and needed.isdisjoint(top):
            skipped.enter_context(answering(top_block, [None] * len(top)))
        elif top:  # each of these levels is made from the one below it
            last = max(top.index(name) for name in needed.intersection(top))
            needed |= {top_block.in_feature, *top[: last + 1]}
        for name in set(names) - needed:
            layer = getattr(backbone, f"fpn_output{name[1:]}", getattr(top_block, name, None))
            if layer is not None:  # a level without a layer, a maximum, costs nothing
                skipped.enter_context(answering(layer, None))
        # Levels below the finest one that is needed add to none.
        stages = [int(name[1:]) for name in names if name not in top]
        finest = min((s for s in stages if f"p{s}" in needed), default=max(stages))
        for stage in stages:
            if stage < finest and (lateral := getattr(backbone, f"fpn_lateral{stage}", None)):
                skipped.enter_context(answering(lateral, 0.0))
        yield
