"""Images without labels: how a student learns from them, with its teacher's detections as labels.

In labels, an object of the class ``IGNORED`` is neither object nor background for the detection
losses. The class targets of Detectron2's RoI heads and dense detectors know this by themselves;
``ignoring`` tells the matchers of anchors, whose labels have no classes.

A: anchors, M: labels of an image.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import CascadeROIHeads
from detectron2.structures import BitMasks, Instances, Keypoints
from detectron2.utils.events import get_event_storage
from torch import nn

from msad_kd.data.unlabeled import IGNORED
from msad_kd.distill.distiller import Distiller, Losses
from msad_kd.distill.teacher import Teacher
from msad_kd.modeling.loss_normalizer import get_normalizer, set_normalizer
from msad_kd.modeling.pyramid import Pyramid
from msad_kd.utils.errors import InputError
from msad_kd.utils.replaced import replaced

SUFFIX = "_unlabeled"  # of the losses of images without labels


@dataclass(frozen=True)
class UnlabeledImages:
    """Says what a student does with images without labels: the keys of KD.UNLABELED."""

    weight: float = 1.0
    pseudo_labels: bool = False
    scores: tuple[float, ...] = (0.5,)  # one for all classes, or one for each
    ignore_score: float = 0.3

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "UnlabeledImages":
        """Read KD.UNLABELED."""
        keys = cfg.KD.UNLABELED
        return cls(keys.WEIGHT, keys.PSEUDO_LABELS, tuple(keys.SCORE), keys.IGNORE_SCORE)

    def connect(self, student: nn.Module, teacher: nn.Module) -> set[str]:
        """Check that a teacher can label images, and return the levels that its heads read.

        Raises:
            InputError: if it has other classes, or lacks masks or keypoints that the student has,
                or if the student's heads cannot ignore boxes.
        """
        if not self.pseudo_labels:
            return set()
        key = "KD.UNLABELED.PSEUDO_LABELS is True"
        heads = [getattr(model, "roi_heads", model) for model in (student, teacher)]
        mine, theirs = (x.num_classes for x in heads)
        if mine != theirs:
            raise InputError(
                f"{key}, but the teacher has {theirs} classes and the student {mine}; use a "
                "teacher with the student's classes"
            )
        for setting, things in (("MASK_ON", "masks"), ("KEYPOINT_ON", "keypoints")):
            mine, theirs = (getattr(x, setting.lower(), False) for x in heads)
            if mine and not theirs:
                raise InputError(
                    f"{key} and MODEL.{setting} too, but the teacher predicts no {things}; use a "
                    f"teacher with MODEL.{setting} True"
                )
        if getattr(heads[0], "keypoint_on", False):
            mine, theirs = (x.keypoint_head.num_keypoints for x in heads)
            if mine != theirs:
                raise InputError(
                    f"{key}, but MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {theirs} in the teacher "
                    f"and {mine} in the student; use a teacher with the student's keypoints"
                )
        if isinstance(heads[0], CascadeROIHeads) and self.ignore_score < max(self.scores):
            raise InputError(
                f"{key}, and a student with CascadeROIHeads can ignore no boxes; set "
                "KD.UNLABELED.IGNORE_SCORE and SCORE to the same number"
            )
        parts = teacher, getattr(teacher, "proposal_generator", None), heads[1]
        names = ("head_in_features", "in_features", "mask_in_features", "keypoint_in_features")
        return {level for part in parts for name in names for level in getattr(part, name, ())}

    def label(
        self, inputs: list[dict], student: nn.Module, teacher: Teacher
    ) -> tuple[list[dict], Pyramid | None]:
        """Give images labels, and return them with the teacher's pyramid, if it is needed.

        With ``pseudo_labels``, images without labels from a file get what the teacher detects.
        Otherwise all get none.
        """
        none = [annotations_to_instances([], x["image"].shape[-2:]) for x in inputs]
        labels = [x.get("instances") for x in inputs] if self.pseudo_labels else none
        bare, pyramid = any(x is None for x in labels), None
        if bare or student.reads_teacher():
            padded = tuple(student.preprocess_image(inputs).tensor.shape[-2:])
            pyramid = teacher.pyramid(inputs, padded)
        if bare:
            heads = getattr(student, "roi_heads", None)
            parts = getattr(heads, "mask_on", False), getattr(heads, "keypoint_on", False)
            above = self.ignore_score - 1e-6  # `select` keeps a score that is equal to it
            found = [self.select(x, *parts) for x in teacher.detect(inputs, pyramid, above)]
            labels = [mine if mine is not None else other for mine, other in zip(labels, found)]
        return [{**x, "instances": y} for x, y in zip(inputs, labels)], pyramid

    @torch.no_grad()
    def select(self, found: Instances, masks: bool, keypoints: bool) -> Instances:
        """Turn an image's detections into labels: ``gt_boxes``, ``gt_classes`` and so on.

        Args:
            found: detections in the student's frame.
            masks: whether the labels have masks; objects without a pixel are left out.
            keypoints: whether they have keypoints, all of which count as visible.
        """
        found = found[found.scores >= self.ignore_score]
        if masks:
            found = found[found.pred_masks.flatten(1).any(dim=1)]
        classes = found.pred_classes
        high = found.scores.new_tensor(self.scores)
        high = high[classes] if len(high) > 1 else high
        labels = Instances(found.image_size, gt_boxes=found.pred_boxes)
        labels.gt_classes = classes.where(found.scores >= high, torch.full_like(classes, IGNORED))
        if masks:
            labels.gt_masks = BitMasks(found.pred_masks)
        if keypoints:
            points = found.pred_keypoints.clone()
            points[:, :, 2] = 2  # where the model gives a score
            labels.gt_keypoints = Keypoints(points)
        return labels

    def weigh(self, detection: Losses, distillation: Losses) -> Losses:
        """Return the losses with their weight under their own names.

        Those of detection are left out if the images have no labels.
        """
        losses = {**(detection if self.pseudo_labels else {}), **distillation}
        return {f"{name}{SUFFIX}": self.weight * loss for name, loss in losses.items()}


@contextmanager
def kept_apart(student: nn.Module, distillers: list[Distiller], share: float) -> Iterator[None]:
    """Let a step on other images leave logs and loss normalizer of the labelled ones alone.

    The loss normalizer counts the positive locations of a labelled batch; ``share`` is the number
    of unlabelled images over that of labelled ones.
    The numbers that it logs have "unlabeled/" before their names. It logs no pictures (VIS_PERIOD):
    they would take the place of the labelled ones, and Detectron2 draws no boxes that are on a GPU.
    """
    normalizer = get_normalizer(student)
    with ExitStack() as stack:
        for distiller in distillers:
            stack.enter_context(distiller.adding(SUFFIX))
        for part in student.modules():
            if getattr(part, "vis_period", 0):
                stack.enter_context(replaced(part, vis_period=0))
        stack.enter_context(get_event_storage().name_scope("unlabeled"))
        stack.callback(set_normalizer, student, normalizer)
        set_normalizer(student, normalizer and normalizer * share)
        yield


class _IgnoringMatcher:
    """Matches anchors with labels, one image after another, some of which are ignored.

    An anchor that would be an ignored label's, by its overlap or as the best that a label has,
    gets -1.
    """

    def __init__(self, matcher: Matcher, flags: list[torch.Tensor]):
        self.matcher, self.flags, self.image = matcher, flags, 0

    def __call__(self, quality: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Match by overlaps (M, A); return the label of each anchor, and 1, 0 or -1 for it."""
        matches, labels = self.matcher(quality)
        ignored = self.flags[self.image % len(self.flags)].to(quality.device)
        if ignored.any():
            others = self.matcher(quality[~ignored])[1]
            labels = torch.where(ignored[matches], labels.masked_fill(labels == 1, -1), others)
        self.image += 1  # at the end: an image is matched again if memory ran out
        return matches, labels


@contextmanager
def ignoring(student: nn.Module, inputs: list[dict]) -> Iterator[None]:
    """Let the RPN or RetinaNet of a student ignore the labels of the class ``IGNORED``."""
    flags = [sample["instances"].gt_classes == IGNORED for sample in inputs]
    part = getattr(student, "proposal_generator", student)
    if matcher := getattr(part, "anchor_matcher", None):
        with replaced(part, anchor_matcher=_IgnoringMatcher(matcher, flags)):
            yield
    else:
        yield
