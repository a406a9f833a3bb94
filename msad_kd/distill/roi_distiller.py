"""The losses between what a student's and its teacher's RoI heads predict for the same regions."""

from types import SimpleNamespace

import torch
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from torch import nn

from msad_kd.distill.distiller import Distiller
from msad_kd.losses.roi import RoIPredictions
from msad_kd.losses.terms import LossTerm
from msad_kd.utils.errors import InputError


class RoIDistiller(Distiller):
    """Compares predictions for the regions that the student samples from its proposals.

    The teacher needs the same classes and ``StandardROIHeads``; the strides of its levels do not
    matter. Nothing is trained here.

    Args:
        terms: the losses.
        diagnostics_period: see ``Distiller``.
    """

    def __init__(self, terms: list[LossTerm], diagnostics_period: int = 0):
        super().__init__(terms, diagnostics_period)
        self.reads_masks = any(getattr(term.function, "reads_masks", True) for term in terms)

    def connect(self, student: nn.Module, teacher: nn.Module) -> set[str]:
        """Check that both detectors' heads can be compared, and return the levels that are read.

        Raises:
            InputError: as ``check_roi_heads``.
        """
        check_roi_heads(student, teacher, [term.name for term in self.terms])
        heads = teacher.roi_heads
        with_masks = heads.mask_on and self.reads_masks
        return {*heads.box_in_features, *(heads.mask_in_features if with_masks else ())}

    def forward(
        self, seen: SimpleNamespace, teacher: RoIPredictions, iteration: int
    ) -> dict[str, torch.Tensor]:
        """Compare the predictions for one batch at an iteration of the trainer.

        Args:
            seen: the student's regions and predictions, from ``recording_regions``.
            teacher: the teacher's predictions, from ``predict_regions``.
            iteration: counted from 0.

        Returns:
            ``loss_kd_<name>``, weighted, for each loss.
        """
        predictions = seen.predictions, teacher
        values = [(term, {term.name: self.evaluate(term, *predictions)}) for term in self.terms]
        return self.weigh(values, iteration)


def check_roi_heads(student: nn.Module, teacher: nn.Module, names: list[str]) -> None:
    """Check that two detectors' RoI heads can be compared by the losses of these names.

    Raises:
        InputError: if one has no ``StandardROIHeads`` or lacks the masks that a loss compares, or
            if their classes differ or, for ``roi_box``, the units of their boxes.
    """
    for role, model in (("student", student), ("teacher", teacher)):
        heads = getattr(model, "roi_heads", None)
        if not isinstance(heads, StandardROIHeads) or isinstance(heads, CascadeROIHeads):
            kind = "none" if heads is None else type(heads).__name__
            raise InputError(
                f"KD.LOSSES: '{names[0]}' compares predictions of StandardROIHeads, and the {role},"
                f" a {type(model).__name__}, has {kind} (MODEL.ROI_HEADS.NAME)"
            )
        if "roi_mask" in names and not heads.mask_on:
            raise InputError(
                f"KD.LOSSES: 'roi_mask' compares masks, and the {role}'s MODEL.MASK_ON is False"
            )
    keys = {"MODEL.ROI_HEADS.NUM_CLASSES": lambda heads: heads.num_classes}
    if "roi_box" in names:
        keys["MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS"] = lambda heads: tuple(
            heads.box_predictor.box2box_transform.weights
        )
    for key, read in keys.items():
        values = [read(model.roi_heads) for model in (student, teacher)]
        if values[0] != values[1]:
            raise InputError(
                f"KD.LOSSES: losses of RoI heads need the same {key} in both models; it is "
                f"{values[0]} in the student and {values[1]} in the teacher"
            )
