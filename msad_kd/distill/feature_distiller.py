"""The feature losses of a student: levels brought together, adapted where need be, compared.

N: images, C: channels, H, W: height and width of a level.
"""

from __future__ import annotations

import logging

import torch
from detectron2.layers import ShapeSpec
from detectron2.utils.events import get_event_storage
from torch import nn

from msad_kd.losses.terms import LossTerm
from msad_kd.modeling.pyramid import Pyramid, pair_levels
from msad_kd.utils.errors import InputError

__all__ = ["Distiller", "build_adapter"]

Levels = dict[str, ShapeSpec]


def build_adapter(student_channels: int, teacher_channels: int) -> nn.Conv2d:
    """A 1x1 convolution on the student's map; where nothing has to change, it starts as none."""
    adapter = nn.Conv2d(student_channels, teacher_channels, 1)
    if student_channels == teacher_channels:
        nn.init.dirac_(adapter.weight)
        nn.init.zeros_(adapter.bias)
    return adapter


class Distiller(nn.Module):
    """The feature losses between a student's pyramid and its teacher's.

    What it trains lives here and in no exported model: ``adapters``, one a level and shared by the
    losses that use it, and ``parts``, the modules of losses that have their own.
    """

    def __init__(
        self,
        *,
        terms: list[LossTerm],
        student: Levels,
        teacher: Levels | None = None,
        diagnostics_period: int = 0,
    ):
        """
        Args:
            terms: the losses, which are summed.
            student, teacher: level name to channels and stride, in pixels of the high-resolution
                image. Without the teacher's there are no adapters and no parts.
            diagnostics_period: the iterations from one logging of the diagnostics to the next; 0
                for none.

        Raises:
            InputError: as ``connect``.
        """
        super().__init__()
        self.terms = terms
        self.student = student
        self.diagnostics_period = diagnostics_period
        self.pairs: dict[str, str] = {}
        self.adapters, self.parts = nn.ModuleDict(), nn.ModuleDict()
        self._values: dict[str, torch.Tensor] = {}
        if teacher is not None:
            self._pair(teacher)
            for term in terms:
                self._build_modules(term, teacher)

    def _pair(self, teacher: Levels) -> list[str]:
        pairs, unpaired = pair_levels(
            *({name: x.stride for name, x in levels.items()} for levels in (self.student, teacher))
        )
        self.pairs = dict(pairs)
        for term in self.terms:
            for level in term.levels:
                if level not in self.pairs:
                    raise InputError(
                        f"KD.LOSSES: level '{level}' of '{term.name}' has no partner in the "
                        f"teacher; the levels that have one are {', '.join(self.pairs)}"
                    )
        return unpaired

    def _build_modules(self, term: LossTerm, teacher: Levels) -> None:
        for level in term.levels or self.pairs:
            own, other = self.student[level].channels, teacher[self.pairs[level]].channels
            if term.adapts(own, other) and level not in self.adapters:
                self.adapters[level] = build_adapter(own, other)
            if build := getattr(term.function, "parts", None):
                if term.name not in self.parts:
                    self.parts[term.name] = nn.ModuleDict()
                if level not in self.parts[term.name]:
                    self.parts[term.name][level] = build(other)

    def connect(self, teacher: Levels) -> None:
        """Pair the levels with those of the teacher that is there, before the first step.

        Raises:
            InputError: if no level has a partner, if a loss asks for one that has none, if it
                lacks its module, or if the channels of a pair differ and there is no adapter.
        """
        unpaired = self._pair(teacher) if self.terms else []
        for term in self.terms:
            for level in term.levels or self.pairs:
                partner = self.pairs[level]
                own, other = self.student[level].channels, teacher[partner].channels
                adapter = self.adapters[level] if self._adapts(term, level) else None
                if hasattr(term.function, "parts") and term.name not in self.parts:
                    raise InputError(
                        f"KD.LOSSES: '{term.name}' trains a module of its own; it needs "
                        "KD.TEACHER.CONFIG_FILE to build it by"
                    )
                if (adapter.out_channels if adapter else own) != other:
                    raise InputError(
                        f"KD.LOSSES: '{term.name}' compares level {level} of the student, with "
                        f"{own} channels, and level {partner} of the teacher, with {other}; it "
                        "needs 'adapter: auto' and KD.TEACHER.CONFIG_FILE to build it by"
                    )
        if unpaired:
            logging.getLogger(__name__).warning(
                "The student's levels %s have no partner in the teacher and are not distilled",
                ", ".join(unpaired),
            )

    def levels_read(self) -> set[str]:
        """The teacher's levels that the losses compare with."""
        return {self.pairs[level] for term in self.terms for level in term.levels or self.pairs}

    def _adapts(self, term: LossTerm, level: str) -> bool:
        if level not in self.adapters:
            return False
        return term.adapts(self.adapters[level].in_channels, self.adapters[level].out_channels)

    def forward(
        self, student: Pyramid, teacher: Pyramid, iteration: int
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            student, teacher: their pyramids, level name to (N, C, H, W).
            iteration: the trainer's, counting from 0.

        Returns:
            ``loss_kd_<name>``, weighted, for each loss.

        Raises:
            InputError: if the maps of a pair differ in shape, or a loss refuses its fields or maps.
        """
        losses: dict[str, torch.Tensor] = {}
        adapted = {level: adapter(student[level]) for level, adapter in self.adapters.items()}
        due = self.diagnostics_period and (iteration + 1) % self.diagnostics_period == 0
        self._values = {}
        for term in self.terms:
            total = 0.0
            for level in term.levels or self.pairs:
                s = adapted[level] if self._adapts(term, level) else student[level]
                t = teacher[self.pairs[level]]
                if s.shape != t.shape:
                    raise InputError(
                        f"level {level} of the student, {tuple(s.shape)}, and level "
                        f"{self.pairs[level]} of the teacher, {tuple(t.shape)}, differ in shape "
                        "(images, channels, height, width) and cannot be compared"
                    )
                parts = [self.parts[term.name][level]] if term.name in self.parts else []
                value = self._evaluate(term, level, (s, t, *parts))
                # Two entries of one name are told as their sum.
                key = f"{term.name}_{level}"
                self._values[key] = self._values.get(key, 0.0) + value.detach()
                total = total + value
                if due:
                    self._log(term, level, (s.detach(), t, *parts))
            key = f"loss_kd_{term.name}"
            losses[key] = losses.get(key, 0.0) + term.warmup_weight(iteration) * total
        return losses

    @staticmethod
    def _evaluate(term: LossTerm, level: str, maps: tuple) -> torch.Tensor:
        try:
            return term.function(*maps, **term.arguments)
        except ValueError as error:  # of a field's value, or of maps too small for it
            raise InputError(f"KD.LOSSES: '{term.name}' on level {level}: {error}") from error

    @torch.no_grad()
    def _log(self, term: LossTerm, level: str, maps: tuple) -> None:
        storage = get_event_storage()
        storage.put_scalar(f"kd/{term.name}_{level}", self._values[f"{term.name}_{level}"])
        for name, measure in getattr(term.function, "measures", {}).items():
            value = measure(*maps, **term.arguments)
            storage.put_scalar(f"kd/{term.name}_{name}_{level}", value)

    def not_finite(self) -> list[str]:
        """<loss>_<level> of the last step's values, without weight, that are NaN or infinite.

        Looking waits for the GPU, so it is for when the total was found not to be finite.
        """
        return [name for name, value in self._values.items() if not value.isfinite().all()]
