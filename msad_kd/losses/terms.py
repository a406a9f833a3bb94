"""Read KD.LOSSES: which loss, on which levels, with which weight and warm-up."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_type_hints

from omegaconf import ListConfig, OmegaConf

from msad_kd.losses.dense import DENSE_LOSS_REGISTRY
from msad_kd.losses.feature import DISTILL_LOSS_REGISTRY
from msad_kd.losses.roi import ROI_LOSS_REGISTRY
from msad_kd.utils.errors import InputError, nearest
from msad_kd.utils.schema import NotNegative, WholeNumber, read_fields

_Levels = Annotated[
    tuple[str, ...], lambda levels: len(set(levels)) == len(levels), "a list of different texts"
]

# What the losses of a registry compare.
_REGISTRIES = {
    "features": DISTILL_LOSS_REGISTRY,
    "regions": ROI_LOSS_REGISTRY,
    "anchors": DENSE_LOSS_REGISTRY,
}


@dataclass(frozen=True)
class LossTerm:
    """One entry of KD.LOSSES."""

    name: str  # in one of the registries
    weight: NotNegative  # of the sum over levels, or of the loss between predictions
    levels: _Levels = ()  # the student's; empty: all that have a partner
    # Iterations over which the weight rises linearly from 0.
    warmup_iters: WholeNumber = 0
    # Whether a 1x1 convolution adapts the student's map; "auto": where the channels differ.
    adapter: Literal["auto", True, False] = "auto"
    # Where a loss looks that takes weights of cells; see distill/focus.py.
    focus: Literal["none", "boxes", "scores"] = "none"
    background: NotNegative = 0.5  # of all cells together against the focus
    # Whose proposals are the regions for which RoI heads predict.
    proposals: Literal["student", "teacher", "both"] = "student"
    arguments: dict = field(default_factory=dict)  # of the loss function

    def warmup_weight(self, iteration: int) -> float:
        """Return the weight at an iteration of the trainer (from 0), lower during the warm-up."""
        if iteration >= self.warmup_iters:
            return self.weight
        return self.weight * iteration / self.warmup_iters

    def adapts(self, student_channels: int, teacher_channels: int) -> bool:
        """Return whether an adapter comes before the loss."""
        return student_channels != teacher_channels if self.adapter == "auto" else self.adapter

    @property
    def compares(self) -> str:
        """Tell what the loss compares: "features", predictions for "regions" or for "anchors"."""
        return next(kind for kind, losses in _REGISTRIES.items() if self.name in losses)

    @property
    def part(self) -> str:
        """Tell which predictions for anchors the loss compares; see ``dense.of_head``."""
        return getattr(self.function, "part", "own")

    @property
    def by_class(self) -> bool:
        """Tell whether the loss compares classes, which both models have to order alike."""
        return self.compares != "features" and self.part != "rpn"

    @property
    def function(self) -> Callable:
        """The loss function of the registry."""
        return _REGISTRIES[self.compares].get(self.name)


def read_losses(entries: Sequence[dict | LossTerm]) -> list[LossTerm]:
    """Check KD.LOSSES and return its entries.

    In a LazyConfig they are a ``ListConfig``; a ``LossTerm`` is returned as it is.

    Raises:
        InputError: if an entry names no known loss, or a field is missing, unknown or ill-typed.
    """
    if isinstance(entries, ListConfig):
        entries = OmegaConf.to_object(entries)
    if not isinstance(entries, (list, tuple)):
        raise InputError(f"KD.LOSSES: {entries!r} should be a list of dicts")
    return [x if isinstance(x, LossTerm) else _read_term(x) for x in entries]


def _check_call(name: str, arguments: dict, focused: bool) -> None:
    """Check that a loss can be called as the distillers call it."""
    function = LossTerm(name, 0).function
    given = ["student", "teacher", *(["parts"] if hasattr(function, "parts") else [])]
    try:
        weights = {"weights": None} if focused else {}
        inspect.signature(function).bind(*given, **weights, **arguments)
    except TypeError as error:
        raise InputError(
            f"KD.LOSSES: '{name}' cannot be called with {', '.join(given)}: {error}; its other "
            "arguments need defaults"
        ) from error


def _read_term(entry: Any) -> LossTerm:
    name = entry.get("name") if isinstance(entry, dict) else None
    if name is None:
        raise InputError(f"KD.LOSSES: {entry!r} should be a dict with a name and a weight")
    names = sorted(name for losses in _REGISTRIES.values() for name, _ in losses)
    if name not in names:
        known = ", ".join(names) + nearest(str(name), names)
        raise InputError(f"KD.LOSSES: there is no loss '{name}'; known: {known}")
    if names.count(name) > 1:
        raise InputError(f"KD.LOSSES: '{name}' is in two registries of losses; rename one of them")
    annotations = get_type_hints(LossTerm, include_extras=True)
    del annotations["arguments"]
    parameters = dict(inspect.signature(LossTerm(name, 0).function).parameters)
    if name not in DISTILL_LOSS_REGISTRY:
        del annotations["levels"], annotations["adapter"]
    if name not in DISTILL_LOSS_REGISTRY or parameters.pop("weights", None) is None:
        del annotations["focus"], annotations["background"]
    if name not in ROI_LOSS_REGISTRY:
        del annotations["proposals"]
    settings = set(annotations)
    for parameter in parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            annotations = dict.fromkeys(entry, Any) | annotations
        elif parameter.default is not parameter.empty:
            annotation = parameter.annotation
            if annotation is parameter.empty or isinstance(annotation, str):
                annotation = float if type(parameter.default) in (int, float) else Any
            annotations[parameter.name] = annotation
    values = read_fields(entry, "KD.LOSSES", f"'{name}'", annotations, ("name", "weight"))
    arguments = {key: values.pop(key) for key in entry if key not in settings}
    _check_call(name, arguments, focused=values.get("focus", "none") != "none")
    values |= {"weight": float(values["weight"]), "levels": tuple(values.get("levels", ()))}
    return LossTerm(**values, arguments=arguments)
