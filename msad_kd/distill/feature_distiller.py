"""The losses between the levels of a student's and its teacher's feature pyramids.

N: images, C: channels, H, W: height and width of a level.
"""

import logging
from collections.abc import Mapping, Sequence

import torch
from detectron2.layers import ShapeSpec
from detectron2.utils.events import get_event_storage
from torch import nn

from msad_kd.distill.distiller import Distiller, Losses
from msad_kd.distill.focus import box_focus, cell_weights
from msad_kd.losses.terms import LossTerm
from msad_kd.modeling.pyramid import Pyramid, pair_levels
from msad_kd.utils.errors import InputError


def build_adapter(student_channels: int, teacher_channels: int) -> nn.Conv2d:
    """Build a 1x1 convolution for the student's map; with equal channels, it starts as identity."""
    adapter = nn.Conv2d(student_channels, teacher_channels, 1)
    if student_channels == teacher_channels:
        nn.init.dirac_(adapter.weight)
        nn.init.zeros_(adapter.bias)
    return adapter


class FeatureDistiller(Distiller):
    """Compares the levels of two pyramids that have the same stride.

    It owns what distillation trains and a stripped model lacks: ``adapters``, one per level and
    shared by the losses that use it, and ``parts``, the modules that a loss itself needs.
    ``connect`` builds both, because their sizes depend on the teacher.

    Args:
        terms: the losses.
        student: level name to channels and stride, in pixels of the high-resolution image.
        diagnostics_period: see ``Distiller``.
    """

    def __init__(
        self,
        *,
        terms: Sequence[dict | LossTerm],
        student: Mapping[str, ShapeSpec],
        diagnostics_period: int = 0,
    ):
        super().__init__(terms, diagnostics_period)
        self.student = student
        self.pairs: dict[str, str] = {}  # the student's level to the teacher's
        self.adapters, self.parts = nn.ModuleDict(), nn.ModuleDict()
        self._adapted: list[set[str]] = []  # of each loss: the levels that pass an adapter

    def connect(self, teacher: dict[str, ShapeSpec]) -> set[str]:
        """Pair the levels with a teacher's, and build the adapters and parts of the losses.

        Args:
            teacher: level name to channels and stride, in pixels of the high-resolution image.

        Returns:
            The teacher's levels that the losses read.

        Raises:
            InputError: if no level has a partner, or a loss cannot compare one of its levels.
        """
        if not self.terms:
            return set()
        strides = ({name: x.stride for name, x in y.items()} for y in (self.student, teacher))
        pairs, unpaired = pair_levels(*strides)
        self.pairs = dict(pairs)
        self._adapted = [self._connect_term(term, teacher) for term in self.terms]
        if unpaired:
            logging.getLogger(__name__).warning(
                f"Levels {', '.join(unpaired)} have no partner in the teacher and are not distilled"
            )
        return {self.pairs[level] for term in self.terms for level in term.levels or self.pairs}

    def _connect_term(self, term: LossTerm, teacher: dict[str, ShapeSpec]) -> set[str]:
        adapted = set()
        for level in term.levels or self.pairs:
            if level not in self.pairs:
                raise InputError(
                    f"KD.LOSSES: level '{level}' of '{term.name}' has no partner in the teacher; "
                    f"the levels that have one are {', '.join(self.pairs)}"
                )
            partner = self.pairs[level]
            width, teacher_width = self.student[level].channels, teacher[partner].channels
            if term.adapts(width, teacher_width):
                adapted.add(level)
                if level not in self.adapters:
                    self.adapters[level] = build_adapter(width, teacher_width)
            elif width != teacher_width:
                raise InputError(
                    f"KD.LOSSES: '{term.name}' compares level {level} of the student, with {width} "
                    f"channels, and level {partner} of the teacher, with {teacher_width}; set its "
                    "'adapter' to auto"
                )
            if build := getattr(term.function, "parts", None):
                if term.name not in self.parts:
                    self.parts[term.name] = nn.ModuleDict()
                if level not in self.parts[term.name]:
                    self.parts[term.name][level] = build(teacher_width)
        return adapted

    def levels_with(self, focus: str) -> set[str]:
        """Return the teacher's levels on which a loss looks at "boxes" or "scores"."""
        terms = [term for term in self.terms if term.focus == focus]
        return {self.pairs[level] for term in terms for level in term.levels or self.pairs}

    def _weights(self, term: LossTerm, level: str, like: torch.Tensor, boxes, scores) -> dict:
        if term.focus == "none":
            return {}
        if term.focus == "boxes":
            focus = box_focus(boxes, self.student[level].stride, like)
        else:
            focus = scores[self.pairs[level]]
        return {"weights": cell_weights(focus, term.background)}

    def forward(
        self,
        student: Pyramid,
        teacher: Pyramid,
        iteration: int,
        boxes: list[torch.Tensor] | None = None,
        scores: Pyramid | None = None,
    ) -> Losses:
        """Compare two pyramids, level name to (N, C, H, W), at an iteration of the trainer.

        Args:
            student: the student's pyramid.
            teacher: the teacher's pyramid.
            iteration: the trainer's, counted from 0.
            boxes: of each image, (n, 4) in pixels of the high-resolution image; for losses that
                look at boxes.
            scores: ``focus.score_focus`` of the teacher; for losses that look at scores.

        Returns:
            ``loss_kd_<name>`` for each loss, weighted and summed over its levels.

        Raises:
            InputError: if the maps of a pair differ in shape, or if a loss rejects its input.
        """
        through = {level: adapter(student[level]) for level, adapter in self.adapters.items()}
        values = []
        for term, adapted in zip(self.terms, self._adapted):
            by_name = {}
            for level in term.levels or self.pairs:
                partner = self.pairs[level]
                maps = (through if level in adapted else student)[level], teacher[partner]
                if maps[0].shape != maps[1].shape:
                    raise InputError(
                        f"level {level} of the student, {tuple(maps[0].shape)}, and level "
                        f"{partner} of the teacher, {tuple(maps[1].shape)}, differ in shape"
                    )
                if term.name in self.parts:
                    maps += (self.parts[term.name][level],)
                weights = self._weights(term, level, maps[0], boxes, scores)
                value = self.evaluate(term, *maps, where=f" on level {level}", **weights)
                by_name[f"{term.name}_{level}"] = value
                measures = getattr(term.function, "measures", {}) if self.logs_at(iteration) else {}
                for name, measure in measures.items():
                    with torch.no_grad():
                        scalar = measure(*maps, **term.arguments)
                    get_event_storage().put_scalar(f"kd/{term.name}_{name}_{level}", scalar)
            values.append((term, by_name))
        return self.weigh(values, iteration)
