"""Compare what a student's and its teacher's dense heads, or RPNs, predict for the same anchors.

N: images, R: anchors of all levels (FCOS: locations), A: anchors of a cell, K: classes (RPN: 1),
C: channels, H, W: height and width of a level.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector, permute_to_N_HWA_K
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes
from torch import nn

from msad_kd.distill.distiller import Distiller, Losses
from msad_kd.distill.teacher import Teacher
from msad_kd.losses.dense import DensePredictions
from msad_kd.losses.terms import LossTerm
from msad_kd.modeling.capture import recording
from msad_kd.modeling.pyramid import Pyramid
from msad_kd.utils.errors import InputError

Maps = list[torch.Tensor]  # one of each level


@dataclass(frozen=True)
class Head:
    """Holds the head that predicts at every anchor of a detector: its dense head or its RPN's."""

    kind: str  # "dense" or "rpn"
    module: nn.Module
    levels: list[str]  # that it reads
    anchors: nn.Module  # makes the anchors of its levels
    transform: object  # between box deltas and boxes
    num_classes: int  # K

    @classmethod
    def of(cls, model: nn.Module) -> "Head | None":
        """Return the head of a detector; None if it has no such head."""
        if isinstance(model, DenseDetector) and isinstance(model.head, RetinaNetHead):
            parts = "dense", model.head, model.head_in_features, model.anchor_generator
            return cls(*parts, model.box2box_transform, model.num_classes)
        if isinstance(rpn := getattr(model, "proposal_generator", None), RPN):
            parts = "rpn", rpn.rpn_head, rpn.in_features, rpn.anchor_generator
            return cls(*parts, rpn.box2box_transform, 1)
        return None

    def read(self, outputs: tuple[Maps, ...], anchors: list[Boxes]) -> DensePredictions:
        """Turn maps into predictions for the N x R anchors of a batch.

        Args:
            outputs: logits (N, A K, H, W) and box deltas (N, A 4, H, W) of each level, and for FCOS
                centerness (N, A, H, W).
            anchors: those of each level, in the frame that the boxes shall have.
        """
        classes, deltas, *centerness = (
            torch.cat([permute_to_N_HWA_K(level, width) for level in maps], dim=1).flatten(0, 1)
            for maps, width in zip(outputs, (self.num_classes, 4, 1))
        )
        boxes = Boxes.cat(anchors).tensor
        boxes = boxes.repeat(len(deltas) // len(boxes), 1)
        decoded = self.transform.apply_deltas(deltas.float(), boxes)
        return DensePredictions(classes, decoded, centerness[0][:, 0] if centerness else None)


def _position(tower: nn.Sequential, convs: int) -> int:
    """Return how many modules of a tower are its first ``convs`` convolutions and what follows."""
    starts = [i for i, module in enumerate(tower) if isinstance(module, nn.Conv2d)]
    return [*starts, len(tower)][convs]


def _towers(head: RetinaNetHead) -> tuple[nn.Sequential, nn.Sequential]:
    return head.cls_subnet, head.bbox_subnet


@contextmanager
def recording_head(head: RetinaNetHead, depths: set[int]) -> Iterator[SimpleNamespace]:
    """Record a head's predictions, and the features in its towers.

    Args:
        head: the student's, of RetinaNet or FCOS.
        depths: after how many convolutions the features are wanted.

    Yields:
        An object that has, when the block ends, the ``outputs`` of the head, with graph, and
        ``features``: depth to the maps of all levels in the class tower and in the box tower.
    """
    seen = SimpleNamespace(features={})
    with recording(head) as call, ExitStack() as hooks:
        for depth in depths - {0}:
            seen.features[depth] = [], []
            for tower, maps in zip(_towers(head), seen.features[depth]):
                module = tower[_position(tower, depth) - 1]
                keep = lambda _, inputs, output, maps=maps: maps.append(output)  # noqa: E731
                hooks.enter_context(module.register_forward_hook(keep))
        yield seen
    seen.outputs = call.output
    if 0 in depths:
        seen.features[0] = call.inputs[0], call.inputs[0]


def predict_across(
    head: RetinaNetHead, features: tuple[Maps, Maps], depth: int
) -> tuple[Maps, ...]:
    """Predict with the rest of another head: from features after ``depth`` convolutions.

    Args:
        head: the teacher's, frozen and in eval mode; gradients pass through it.
        features: the maps of all levels in the student's class tower and box tower.
        depth: how many convolutions of each tower they have passed.

    Returns:
        What the head itself returns.
    """
    rests = (tower[_position(tower, depth) :] for tower in _towers(head))
    classes, boxes = ([rest(x) for x in maps] for rest, maps in zip(rests, features))
    outputs = [head.cls_score(x) for x in classes], [head.bbox_pred(x) for x in boxes]
    if hasattr(head, "ctrness"):
        outputs += ([head.ctrness(x) for x in boxes],)
    return outputs


class DenseDistiller(Distiller):
    """Compares predictions for every anchor: of dense heads, across heads, or of RPNs.

    The levels of both heads have equal strides in pixels of the high-resolution image, as those of
    an aligned teacher have. Nothing is trained here.

    Args:
        terms: the losses.
        diagnostics_period: see ``Distiller``.
    """

    def __init__(self, terms: Sequence[dict | LossTerm] = (), diagnostics_period: int = 0):
        super().__init__(terms, diagnostics_period)
        self.depths = {_depth(term) for term in self.terms} - {None}
        self.heads: tuple[Head, ...] = ()  # the student's and the teacher's; not registered

    def connect(self, student: nn.Module, teacher: Teacher) -> set[str]:
        """Check that both heads can be compared, and return the teacher's levels that are read.

        Raises:
            InputError: if one has no such head, or if the heads' levels, anchors or classes differ.
        """
        if not self.terms:
            return set()
        self.heads = Head.of(student), Head.of(teacher.model)
        for term in self.terms:
            _check_heads(term, *self.heads)
        strides = [student.backbone.output_shape()[x].stride for x in self.heads[0].levels]
        levels = teacher.levels()
        theirs = [levels[x].stride for x in self.heads[1].levels]
        if [teacher.scale * x for x in strides] != theirs:
            raise InputError(
                f"KD.LOSSES: '{self.terms[0].name}' needs a teacher whose head reads levels of "
                f"{teacher.scale} times the student's strides {strides}, and its strides are "
                f"{theirs} in pixels of the high-resolution image; use an aligned teacher"
            )
        mine, theirs = (torch.cat(list(head.anchors.cell_anchors)) for head in self.heads)
        scale = teacher.image_scale
        # On torch's meta device anchors have no values.
        if not mine.is_meta and not torch.allclose(scale * mine, theirs.to(mine), rtol=1e-3):
            raise InputError(
                f"KD.LOSSES: '{self.terms[0].name}' needs a teacher whose anchors are {scale} "
                "times the student's, in the same order; change MODEL.ANCHOR_GENERATOR.SIZES or "
                "ASPECT_RATIOS of one of them"
            )
        return set(self.heads[1].levels)

    def recording(self):
        """Record the student's head during a training step; see ``recording_head``."""
        return recording_head(self.heads[0].module, self.depths)

    def forward(self, seen: SimpleNamespace, pyramid: Pyramid, iteration: int) -> Losses:
        """Compare the predictions for one batch at an iteration of the trainer.

        Args:
            seen: from ``recording``.
            pyramid: the teacher's levels, level name to (N, C, H, W).
            iteration: counted from 0.

        Returns:
            ``loss_kd_<name>``, weighted, for each loss.
        """
        mine, theirs = self.heads
        # Boxes of both heads in one frame: anchors and deltas scale with the image.
        anchors = mine.anchors(seen.outputs[0])
        with torch.no_grad():
            teacher = theirs.read(theirs.module([pyramid[x] for x in theirs.levels]), anchors)
        students = {None: mine.read(seen.outputs, anchors)}
        for depth in self.depths:
            across = predict_across(theirs.module, seen.features[depth], depth)
            students[depth] = theirs.read(across, anchors)
        values = [
            (term, {term.name: self.evaluate(term, students[_depth(term)], teacher)})
            for term in self.terms
        ]
        return self.weigh(values, iteration)


def _depth(term: LossTerm) -> int | None:
    """Return after how many convolutions a loss crosses to the teacher's head; None: it doesn't."""
    if term.part != "cross":
        return None
    default = inspect.signature(term.function).parameters["convs"].default
    return term.arguments.get("convs", default)


def _check_heads(term: LossTerm, student: Head | None, teacher: Head | None) -> None:
    kind = "rpn" if term.part == "rpn" else "dense"
    words = {"rpn": "an RPN", "dense": "the head of RetinaNet or FCOS"}[kind]
    for role, head in (("student", student), ("teacher", teacher)):
        if head is None or head.kind != kind:
            raise InputError(f"KD.LOSSES: '{term.name}' needs {words}, which the {role} lacks")
    heads = student, teacher
    cells = [head.anchors.num_anchors for head in heads]
    settings = {
        "kind of head": [type(head.module).__name__ for head in heads],
        "number of classes": [head.num_classes for head in heads],
        "anchors per cell and level": cells,
        "MODEL.ANCHOR_GENERATOR.OFFSET": [getattr(x.anchors, "offset", None) for x in heads],
        "units of boxes": [tuple(getattr(x.transform, "weights", ())) for x in heads],
    }
    depth = _depth(term)
    if depth is not None:
        shortest = min(sum(isinstance(x, nn.Conv2d) for x in _towers(h.module)[0]) for h in heads)
        if depth > shortest:
            raise InputError(
                f"KD.LOSSES: 'convs' of '{term.name}' is {depth}, but a tower has {shortest}"
            )
        settings["channels in the tower"] = [_channels(head.module, depth) for head in heads]
    for name, (mine, theirs) in settings.items():
        if mine != theirs:
            raise InputError(
                f"KD.LOSSES: '{term.name}' needs the same {name} in both heads; it is {mine} in "
                f"the student and {theirs} in the teacher"
            )


def _channels(head: RetinaNetHead, depth: int) -> int:
    """Return the channels of the features after ``depth`` convolutions of the class tower."""
    layers = [x for x in head.cls_subnet if isinstance(x, nn.Conv2d)] + [head.cls_score]
    return layers[depth].in_channels
