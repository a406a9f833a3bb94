"""The feature losses of a student: which levels, which losses, their weights, their warm-up."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from detectron2.config import configurable
from torch import nn

from msad_kd.errors import InputError
from msad_kd.losses import DISTILL_LOSS_REGISTRY
from msad_kd.pyramid import Pyramid, pair_levels

__all__ = ["Distiller", "LossTerm", "read_losses"]


@dataclass(frozen=True)
class LossTerm:
    """One entry of KD.LOSSES."""

    name: str  # in DISTILL_LOSS_REGISTRY
    weight: float  # of the sum over levels
    levels: tuple[str, ...] = ()  # the student's; empty: all that have a partner
    warmup_iters: int = 0  # iterations over which the weight rises linearly from 0
    arguments: dict = field(default_factory=dict)  # of the loss

    def weight_at(self, iteration: int) -> float:
        """The weight at an iteration of the trainer, which counts from 0."""
        if iteration >= self.warmup_iters:
            return self.weight
        return self.weight * iteration / self.warmup_iters

    @property
    def function(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        return functools.partial(DISTILL_LOSS_REGISTRY.get(self.name), **self.arguments)


def read_losses(entries: list[dict]) -> list[LossTerm]:
    """Check and read KD.LOSSES.

    Raises:
        InputError: if an entry is not a dict, names no loss or an unknown one, has no weight, or
            passes an argument the loss does not take.
    """
    known = sorted(name for name, _ in DISTILL_LOSS_REGISTRY)
    if not isinstance(entries, (list, tuple)):
        raise InputError(f"KD.LOSSES: {entries} should be a list of dicts")
    terms = []
    for entry in entries:
        weighted = isinstance(entry, dict) and isinstance(entry.get("weight"), (int, float))
        if not weighted or "name" not in entry:
            raise InputError(f"KD.LOSSES: {entry} should be a dict with a name and a weight")
        rest = dict(entry)
        name, weight = rest.pop("name"), float(rest.pop("weight"))
        levels, warmup = rest.pop("levels", ()), rest.pop("warmup_iters", 0)
        if name not in DISTILL_LOSS_REGISTRY:
            raise InputError(f"KD.LOSSES: there is no loss '{name}'; known: {', '.join(known)}")
        if not isinstance(levels, (list, tuple)):
            raise InputError(f"KD.LOSSES: levels of '{name}' should be a list, not {levels!r}")
        if not isinstance(warmup, int) or warmup < 0:
            raise InputError(
                f"KD.LOSSES: warmup_iters of '{name}' should be a whole number from 0, not "
                f"{warmup!r}"
            )
        parameters = list(inspect.signature(DISTILL_LOSS_REGISTRY.get(name)).parameters.values())
        accepted = [p.name for p in parameters[2:] if p.kind is not p.VAR_KEYWORD]
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        for argument in rest:
            if argument not in accepted and not takes_any:
                options = ["name", "weight", "levels", "warmup_iters", *accepted]
                raise InputError(
                    f"KD.LOSSES: '{name}' has no field '{argument}'; known: {', '.join(options)}"
                )
        terms.append(LossTerm(name, weight, tuple(levels), warmup, rest))
    return terms


class Distiller(nn.Module):
    """The feature losses between a student's pyramid and its teacher's."""

    @configurable
    def __init__(self, *, terms: list[LossTerm]):
        """
        Args:
            terms: the losses, which are summed.
        """
        super().__init__()
        self.terms = terms
        self.pairs: dict[str, str] = {}

    @classmethod
    def from_config(cls, cfg):
        return {"terms": read_losses(cfg.KD.LOSSES)}

    def connect(self, student: dict[str, float], teacher: dict[str, float]) -> None:
        """Pair the levels, before the first step.

        Args:
            student, teacher: level name to stride, in pixels of the high-resolution image.

        Raises:
            InputError: if no level has a partner, or if a loss asks for one that has none.
        """
        pairs, unpaired = pair_levels(student, teacher)
        self.pairs = dict(pairs)
        for term in self.terms:
            for level in term.levels:
                if level not in self.pairs:
                    raise InputError(
                        f"KD.LOSSES: level '{level}' of '{term.name}' has no partner in the "
                        f"teacher; the levels that have one are {', '.join(self.pairs)}"
                    )
        if unpaired:
            logging.getLogger(__name__).warning(
                "The student's levels %s have no partner in the teacher and are not distilled",
                ", ".join(unpaired),
            )

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
            InputError: if the maps of a pair differ in shape.
        """
        losses: dict[str, torch.Tensor] = {}
        for term in self.terms:
            total = 0.0
            for level in term.levels or self.pairs:
                s, t = student[level], teacher[self.pairs[level]]
                if s.shape != t.shape:
                    raise InputError(
                        f"level {level} of the student, {tuple(s.shape)}, and level "
                        f"{self.pairs[level]} of the teacher, {tuple(t.shape)}, differ in shape "
                        "(images, channels, height, width) and cannot be compared"
                    )
                total = total + term.function(s, t)
            key = f"loss_kd_{term.name}"
            losses[key] = losses.get(key, 0.0) + term.weight_at(iteration) * total
        return losses
