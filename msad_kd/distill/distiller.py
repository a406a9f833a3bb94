"""The base of the feature, RoI and dense distillers: it weights, sums and logs their losses.

The warm-up of a weight is in ``losses/terms.py``.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from detectron2.utils.events import get_event_storage
from torch import nn

from msad_kd.losses.terms import LossTerm, read_losses
from msad_kd.utils.errors import InputError

Losses = dict[str, torch.Tensor]  # log name to value


class Distiller(nn.Module):
    """A sum of distillation losses that keeps the values of its last step.

    Args:
        terms: the losses, each as in KD.LOSSES or a ``LossTerm``.
        diagnostics_period: log each loss, without its weight, every so many iterations; 0: never.
    """

    def __init__(self, terms: Sequence[dict | LossTerm] = (), diagnostics_period: int = 0):
        super().__init__()
        self.terms = read_losses(terms)
        self.diagnostics_period = diagnostics_period
        self._values: Losses = {}

    def logs_at(self, iteration: int) -> bool:
        """Return whether the diagnostics are logged at an iteration, counted from 0."""
        return self.diagnostics_period > 0 and (iteration + 1) % self.diagnostics_period == 0

    @staticmethod
    def evaluate(term: LossTerm, *inputs, where: str = "", **more) -> torch.Tensor:
        """Return a loss without its weight; ``where`` names the place in an error message."""
        try:
            value = term.function(*inputs, **more, **term.arguments)
        except ValueError as error:  # of an argument's value, or of maps too small for the loss
            raise InputError(f"KD.LOSSES: '{term.name}'{where}: {error}") from error
        if not (torch.is_tensor(value) and value.numel() == 1):
            found = f"a tensor {tuple(value.shape)}" if torch.is_tensor(value) else repr(value)
            raise InputError(f"KD.LOSSES: '{term.name}'{where} returns {found}, no scalar")
        return value

    def weigh(self, values: list[tuple[LossTerm, Losses]], iteration: int) -> Losses:
        """Sum and weight the values of a step, keep them, and log them if due.

        Args:
            values: each loss with its values by log name. Values of one name are added up.
            iteration: the trainer's, counted from 0. The warm-up depends on nothing else.

        Returns:
            ``loss_kd_<name>`` for each loss.
        """
        losses, self._values = {}, {}
        for term, parts in values:
            key = f"loss_kd_{term.name}"
            losses[key] = losses.get(key, 0.0) + term.warmup_weight(iteration) * sum(parts.values())
            for name, value in parts.items():
                self._values[name] = self._values.get(name, 0.0) + value.detach()
        if self.logs_at(iteration):
            for name, value in self._values.items():
                get_event_storage().put_scalar(f"kd/{name}", value)
        return losses

    @contextmanager
    def adding(self, suffix: str) -> Iterator[None]:
        """Add the values of a second batch to those of this step; their names get the suffix."""
        before, self._values = self._values, {}
        try:
            yield
        finally:  # if the second batch fails, the first one's values still say what was not finite
            others = {f"{name}{suffix}": value for name, value in self._values.items()}
            self._values = {**before, **others}

    def not_finite(self) -> list[str]:
        """Return the log names of the last step's values that are NaN or infinite.

        This waits for the GPU: call it only when the total loss is not finite.
        """
        return [name for name, value in self._values.items() if not value.isfinite().all()]
