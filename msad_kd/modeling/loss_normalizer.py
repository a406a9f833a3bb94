"""The loss normalizer of RetinaNet and FCOS, a moving average that belongs to the training's state.

Detectron2 divides the losses of its dense detectors by a moving average of the number of positive
locations, a plain float on the model: each process has its own, and no ``state_dict`` has any. A
resumed run would start it anew.
"""

from __future__ import annotations

from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

__all__ = ["KeepNormalizer", "get_normalizer", "set_normalizer"]

_NAME = "loss_normalizer"


def get_normalizer(model: nn.Module) -> float | None:
    """The moving average, or None before the first step and in a model that has none."""
    return getattr(model, _NAME, None)


def set_normalizer(model: nn.Module, value: float | None) -> None:
    """Set the moving average; None makes the model start it anew."""
    if value is not None:
        setattr(model, _NAME, value)
    elif hasattr(model, _NAME):
        delattr(model, _NAME)


class KeepNormalizer(HookBase):
    """Puts every process's moving average in the training checkpoints, and never in the model's.

    Its place is before the hook that writes checkpoints, in all processes.
    """

    def __init__(self, period: int):
        """
        Args:
            period: iterations between two checkpoints.
        """
        self.period = period
        self._gathered: tuple[int, list[float | None]] = (-1, [])

    @property
    def _model(self) -> nn.Module:
        model = self.trainer.model
        return getattr(model, "module", model)

    def after_step(self):
        done = self.trainer.iter + 1
        if done % self.period == 0 or done >= self.trainer.max_iter:
            # Only one process writes, so it has to be told the others' before.
            self._gathered = done, comm.all_gather(get_normalizer(self._model))

    def state_dict(self) -> dict:
        done, values = self._gathered
        if done != self.trainer.iter + 1:  # a checkpoint that somebody else ordered
            values = [get_normalizer(self._model)]
        return {} if values[0] is None else {"values": values}

    def load_state_dict(self, state: dict) -> None:
        values = state["values"]
        rank = comm.get_rank()
        # With more processes than before, the others' is a good start.
        set_normalizer(self._model, values[rank] if rank < len(values) else values[0])
