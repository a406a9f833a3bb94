"""KD.LOSSES, read and checked: which loss, on which levels, with what weight, from when on."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from msad_kd.losses.feature import DISTILL_LOSS_REGISTRY
from msad_kd.losses.roi import ROI_LOSS_REGISTRY
from msad_kd.utils.errors import InputError

__all__ = ["LossTerm", "read_losses", "yaml_number"]

# The fields of an entry that are not arguments of its loss.
FIELDS = ("name", "weight", "levels", "warmup_iters", "adapter")
LEVEL_FIELDS = ("levels", "adapter")  # of losses between feature maps alone


@dataclass(frozen=True)
class LossTerm:
    """One entry of KD.LOSSES."""

    name: str  # in DISTILL_LOSS_REGISTRY or ROI_LOSS_REGISTRY
    weight: float  # of the sum over levels, or of the loss between regions
    levels: tuple[str, ...] = ()  # the student's; empty: all that have a partner
    warmup_iters: int = 0  # iterations over which the weight rises linearly from 0
    adapter: bool | str = "auto"  # a 1x1 convolution on the student's map; "auto": if C differs
    arguments: dict = field(default_factory=dict)  # of the loss

    def weight_at(self, iteration: int) -> float:
        """The weight at an iteration of the trainer, which counts from 0."""
        if iteration >= self.warmup_iters:
            return self.weight
        return self.weight * iteration / self.warmup_iters

    def adapts(self, student_channels: int, teacher_channels: int) -> bool:
        """Whether the student's map passes an adapter first."""
        if self.adapter == "auto":
            return student_channels != teacher_channels
        return self.adapter

    @property
    def of_regions(self) -> bool:
        """Whether it compares what RoI heads predict, and not feature maps."""
        return self.name in ROI_LOSS_REGISTRY

    @property
    def function(self) -> Callable:
        """The loss itself, from its registry."""
        return (ROI_LOSS_REGISTRY if self.of_regions else DISTILL_LOSS_REGISTRY).get(self.name)


def yaml_number(value: Any) -> Any:
    """A number that YAML 1.1 reads as text, such as 5e-7, as that number; any other value as it is.

    Detectron2's reader takes only 5.0e-7 and 5.0e+7 for numbers.
    """
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?e[-+]?\d+", value, re.IGNORECASE):
        return float(value)
    return value


def read_losses(entries: list[dict]) -> list[LossTerm]:
    """Check and read KD.LOSSES.

    Raises:
        InputError: if an entry is not a dict, names no loss or an unknown one, has no weight, has a
            field of the wrong kind, or passes an argument the loss does not take.
    """
    if not isinstance(entries, (list, tuple)):
        raise InputError(f"KD.LOSSES: {entries} should be a list of dicts")
    return [_read(entry) for entry in entries]


def _read(entry: Any) -> LossTerm:
    if isinstance(entry, dict):
        entry = {key: yaml_number(value) for key, value in entry.items()}
    weighted = isinstance(entry, dict) and isinstance(entry.get("weight"), (int, float))
    if not weighted or "name" not in entry:
        raise InputError(f"KD.LOSSES: {entry} should be a dict with a name and a weight")
    name = entry["name"]
    names = sorted(name for name, _ in (*DISTILL_LOSS_REGISTRY, *ROI_LOSS_REGISTRY))
    if name not in names:
        raise InputError(f"KD.LOSSES: there is no loss '{name}'; known: {', '.join(names)}")
    if names.count(name) > 1:
        raise InputError(
            f"KD.LOSSES: '{name}' is registered as a loss of feature maps and as one of regions; "
            "rename one of the two"
        )
    fields = [each for each in FIELDS if name not in ROI_LOSS_REGISTRY or each not in LEVEL_FIELDS]

    def checked(key: str, default: Any, fits: Callable[[Any], bool], kind: str) -> Any:
        value = entry.get(key, default)
        if not fits(value):
            raise InputError(f"KD.LOSSES: {key} of '{name}' should be {kind}, not {value!r}")
        return value

    levels = checked("levels", (), lambda x: isinstance(x, (list, tuple)), "a list")
    warmup = checked(
        "warmup_iters", 0, lambda x: isinstance(x, int) and x >= 0, "a whole number from 0"
    )
    adapter = checked(
        "adapter", "auto", lambda x: x == "auto" or isinstance(x, bool), "auto, true or false"
    )
    arguments = {key: value for key, value in entry.items() if key not in fields}
    term = LossTerm(name, float(entry["weight"]), tuple(levels), warmup, adapter, arguments)
    parameters = inspect.signature(term.function).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for argument in arguments:
        if argument not in defaults and not takes_any:
            raise InputError(
                f"KD.LOSSES: '{name}' has no field '{argument}'; known: "
                f"{', '.join([*fields, *defaults])}"
            )
        if type(defaults.get(argument)) in (int, float):
            checked(argument, None, lambda x: isinstance(x, (int, float)), "a number")
    return term
