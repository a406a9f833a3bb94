"""Compare what a student's and its teacher's RoI heads predict for the same regions.

The regions are those that the student samples from its proposals, or the teacher's proposals.
"""

from collections.abc import Sequence

import torch
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from torch import nn

from msad_kd.distill.distiller import Distiller, Losses
from msad_kd.distill.regions import Regions, evaluating, predict_regions, propose_regions
from msad_kd.distill.teacher import Teacher
from msad_kd.losses.roi import RoIPredictions, parts_read
from msad_kd.losses.terms import LossTerm
from msad_kd.modeling.pyramid import Pyramid
from msad_kd.utils.errors import InputError

# The values of ``proposals`` and whose proposals they are.
_SOURCES = {"student": ["student"], "teacher": ["teacher"], "both": ["student", "teacher"]}
# Regions, the student's predictions for them, with graph, and the teacher's.
Predicted = tuple[Regions, RoIPredictions, RoIPredictions]


class RoIDistiller(Distiller):
    """Compares predictions for the same regions.

    The teacher needs the same classes and ``StandardROIHeads``; the strides of its levels do not
    matter. Nothing is trained here.

    Args:
        terms: the losses.
        diagnostics_period: see ``Distiller``.
    """

    def __init__(self, terms: Sequence[dict | LossTerm] = (), diagnostics_period: int = 0):
        super().__init__(terms, diagnostics_period)
        # Whose proposals are needed, and which of masks and keypoints of them a loss reads.
        self.parts_of: dict[str, frozenset[str]] = {}
        for term in self.terms:
            for source in _SOURCES[term.proposals]:
                read = self.parts_of.get(source, frozenset())
                self.parts_of[source] = read | parts_read(term.function)
        # The student's heads and the teacher; a tuple, so that they are not registered.
        self.models: tuple[nn.Module, Teacher] | tuple[()] = ()

    @property
    def reads(self) -> frozenset[str]:
        """Tell which of "masks" and "keypoints" of the student's regions a loss reads."""
        return self.parts_of.get("student", frozenset())

    def connect(self, student: nn.Module, teacher: Teacher) -> set[str]:
        """Check that both detectors' heads can be compared, and return the levels that are read.

        Raises:
            InputError: if one has no ``StandardROIHeads`` or lacks the masks or keypoints that a
                loss compares, if their classes, keypoints or, for ``roi_box``, the units of their
                boxes differ, if ``class_weights`` has not one number for each class and the
                background, or if the teacher has to propose regions and has no RPN.
        """
        if not self.terms:
            return set()
        _check_roi_heads(student, teacher.model, self.terms)
        heads, levels = teacher.model.roi_heads, set()
        if "teacher" in self.parts_of:
            if not isinstance(rpn := teacher.model.proposal_generator, RPN):
                raise InputError(
                    "KD.LOSSES: 'proposals: teacher' and 'both' need a teacher with an RPN "
                    "(MODEL.PROPOSAL_GENERATOR.NAME); use 'proposals: student'"
                )
            levels.update(rpn.in_features)
        self.models = student.roi_heads, teacher
        parts = frozenset().union(*self.parts_of.values())
        with_masks = heads.mask_on and "masks" in parts
        with_keypoints = heads.keypoint_on and "keypoints" in parts
        levels.update(heads.box_in_features, heads.mask_in_features if with_masks else ())
        levels.update(heads.keypoint_in_features if with_keypoints else ())
        return levels

    def predict(
        self,
        seen: Regions,
        features: Pyramid,
        pyramid: Pyramid,
        sizes: list[tuple[int, int]],
    ) -> dict[str, Predicted]:
        """Predict once for all regions that a loss needs.

        Args:
            seen: the student's regions and predictions, from ``recording_regions``.
            features: the student's levels, level name to (N, C, H, W).
            pyramid: the teacher's.
            sizes: the (height, width) of each image of the student, without padding.

        Returns:
            "student" or "teacher", whose proposals they are, to what is predicted.
        """
        heads, teacher = self.models
        found = {}
        if "student" in self.parts_of:
            with torch.no_grad():
                theirs = teacher.model.roi_heads, pyramid, seen, teacher.image_scale
                found["student"] = seen, seen.predictions, predict_regions(*theirs)
        if "teacher" in self.parts_of:
            proposed, theirs = propose_regions(
                teacher, pyramid, sizes, heads, self.parts_of["teacher"]
            )
            with evaluating(heads):
                found["teacher"] = proposed, predict_regions(heads, features, proposed, 1), theirs
        return found

    def forward(
        self,
        seen: Regions,
        features: Pyramid,
        pyramid: Pyramid,
        sizes: list[tuple[int, int]],
        iteration: int,
    ) -> Losses:
        """Compare the predictions for one batch, from the arguments of ``predict``.

        Returns:
            ``loss_kd_<name>``, weighted for this iteration, counted from 0, for each loss.
        """
        found = self.predict(seen, features, pyramid, sizes)
        values = []
        for term in self.terms:
            _, student, teacher = self.predicted_for(term, found)
            values.append((term, {term.name: self.evaluate(term, student, teacher)}))
        return self.weigh(values, iteration)

    @staticmethod
    def predicted_for(
        term: LossTerm, found: dict[str, Predicted]
    ) -> tuple[list[Regions], RoIPredictions, RoIPredictions]:
        """Return what ``predict`` found for a loss: sets of regions, and both's predictions."""
        seen, *pair = zip(*(found[source] for source in _SOURCES[term.proposals]))
        return list(seen), *map(RoIPredictions.cat, pair)


def _check_roi_heads(student: nn.Module, teacher: nn.Module, terms: list[LossTerm]) -> None:
    names = [term.name for term in terms]
    for role, model in (("student", student), ("teacher", teacher)):
        heads = getattr(model, "roi_heads", None)
        if not isinstance(heads, StandardROIHeads) or isinstance(heads, CascadeROIHeads):
            kind = "none" if heads is None else type(heads).__name__
            raise InputError(
                f"KD.LOSSES: '{names[0]}' compares predictions of StandardROIHeads, and the {role},"
                f" a {type(model).__name__}, has {kind} (MODEL.ROI_HEADS.NAME)"
            )
        read = [name for name in names if name in ("roi_class", "roi_box")]
        if read and getattr(heads.box_predictor, "use_sigmoid_ce", False):  # of git main
            raise InputError(
                f"KD.LOSSES: '{read[0]}' reads the scores of a softmax with a background, and the "
                f"{role} has none; train it with MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE False"
            )
        for name, part in (("roi_mask", "mask"), ("roi_keypoint", "keypoint")):
            if name in names and not getattr(heads, f"{part}_on"):
                raise InputError(
                    f"KD.LOSSES: '{name}' compares {part}s, and the {role}'s "
                    f"MODEL.{part.upper()}_ON is False"
                )
    heads = student.roi_heads, teacher.roi_heads
    settings = {"MODEL.ROI_HEADS.NUM_CLASSES": [x.num_classes for x in heads]}
    if "roi_box" in names:
        weights = [tuple(x.box_predictor.box2box_transform.weights) for x in heads]
        settings["MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS"] = weights
    for part in ("mask", "keypoint"):
        if f"roi_{part}" in names:
            sides = [getattr(getattr(x, f"{part}_pooler"), "output_size", None) for x in heads]
            settings[f"MODEL.ROI_{part.upper()}_HEAD.POOLER_RESOLUTION"] = sides
    if "roi_keypoint" in names:
        counts = [x.keypoint_head.num_keypoints for x in heads]
        settings["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"] = counts
    for key, (mine, theirs) in settings.items():
        if mine != theirs:
            raise InputError(
                f"KD.LOSSES: losses of RoI heads need the same {key} in both models; it is {mine} "
                f"in the student and {theirs} in the teacher"
            )
    for weights in (x.arguments.get("class_weights") for x in terms if x.name == "roi_class"):
        if weights is not None and len(weights) != heads[0].num_classes + 1:
            raise InputError(
                f"KD.LOSSES: class_weights of 'roi_class' has {len(weights)} numbers; it needs one "
                f"for each of the K = {heads[0].num_classes} classes (MODEL.ROI_HEADS.NUM_CLASSES) "
                "and one for the background, last"
            )
