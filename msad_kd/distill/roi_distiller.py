"""The losses between a student's predictions for its regions and its teacher's for the same."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from detectron2.utils.events import get_event_storage
from torch import nn

from msad_kd.distill.roi_regions import RoIHeadsSpec, check_roi_heads
from msad_kd.losses.roi import RoIPredictions
from msad_kd.losses.terms import LossTerm
from msad_kd.utils.errors import InputError

__all__ = ["RoIDistiller"]


class RoIDistiller:
    """The losses between what a student and its teacher predict for the student's regions.

    Both see the same regions, the student's sampled proposals, so any teacher will do that has the
    same classes and ``StandardROIHeads``, whatever the strides of its levels. It trains nothing of
    its own.
    """

    def __init__(self, terms: list[LossTerm], diagnostics_period: int = 0):
        """
        Args:
            terms: the losses, which are summed.
            diagnostics_period: as of ``Distiller``.
        """
        self.terms = terms
        self.reads_masks = any(getattr(each.function, "reads_masks", True) for each in terms)
        self.diagnostics_period = diagnostics_period
        self._values: dict[str, torch.Tensor] = {}

    def connect(self, student: nn.Module, teacher: nn.Module) -> None:
        """See that the heads of both can be compared, before the first step.

        Raises:
            InputError: as ``check_roi_heads``.
        """
        both = (RoIHeadsSpec.of_model(each) for each in (student, teacher))
        check_roi_heads(*both, [term.name for term in self.terms])

    def __call__(
        self, seen: SimpleNamespace, teacher: RoIPredictions, iteration: int
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            seen: from ``recording_regions``.
            teacher: from ``predict_regions``.
            iteration: the trainer's, counting from 0.

        Returns:
            ``loss_kd_<name>``, weighted, for each loss.

        Raises:
            InputError: if a loss refuses its fields or the predictions.
        """
        losses: dict[str, torch.Tensor] = {}
        due = self.diagnostics_period and (iteration + 1) % self.diagnostics_period == 0
        self._values = {}
        for term in self.terms:
            try:
                value = term.function(seen.predictions, teacher, **term.arguments)
            except ValueError as error:
                raise InputError(f"KD.LOSSES: '{term.name}': {error}") from error
            self._values[term.name] = self._values.get(term.name, 0.0) + value.detach()
            key = f"loss_kd_{term.name}"
            losses[key] = losses.get(key, 0.0) + term.warmup_weight(iteration) * value
        if due:
            for name, value in self._values.items():
                get_event_storage().put_scalar(f"kd/{name}", value)
        return losses

    def not_finite(self) -> list[str]:
        """As of ``Distiller``."""
        return [name for name, value in self._values.items() if not value.isfinite().all()]
