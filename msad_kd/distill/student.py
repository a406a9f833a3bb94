"""Students: stock detectors at low resolution that are trained with a teacher's losses, too."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, RetinaNet, build_backbone
from detectron2.utils.events import get_event_storage
from torch import nn

from msad_kd.distill.feature_distiller import Distiller
from msad_kd.distill.roi_distiller import RoIDistiller
from msad_kd.distill.roi_regions import (
    RoIHeadsSpec,
    check_roi_heads,
    predict_regions,
    recording_regions,
)
from msad_kd.distill.teacher import Teacher, build_teacher, teacher_config, teacher_levels
from msad_kd.losses.terms import read_losses
from msad_kd.modeling.capture import recording
from msad_kd.modeling.fcos import FCOS
from msad_kd.modeling.pyramid import in_high_resolution
from msad_kd.utils.errors import InputError
from msad_kd.utils.seed import preserved_rng

__all__ = [
    "DistilledFCOS",
    "DistilledMixin",
    "DistilledRCNN",
    "DistilledRetinaNet",
    "attach_teacher",
    "check_losses",
    "gradient_ratio",
    "last_layer",
]


def last_layer(backbone: nn.Module) -> nn.Parameter:
    """The last trained weight of a backbone that all levels depend on: of an FPN's bottom-up path
    or, where that is frozen, of its coarsest lateral convolution.

    Raises:
        InputError: if all weights are frozen.
    """
    laterals = getattr(backbone, "lateral_convs", [])  # from coarse to fine
    for part in (getattr(backbone, "bottom_up", backbone), *laterals[:1], backbone):
        trained = [p for p in part.parameters() if p.requires_grad and p.dim() > 1]
        if trained:
            return trained[-1]
    raise InputError(
        "KD.GRADIENT_RATIO_PERIOD compares gradients at the backbone's last trained weight, and "
        "all of them are frozen; set it to 0"
    )


def gradient_ratio(
    distillation: Iterable[torch.Tensor], detection: Iterable[torch.Tensor], layer: nn.Parameter
) -> torch.Tensor:
    """Norm of the gradient of one sum of losses over that of another, at one layer's weight.

    One that does not depend on the layer has the norm 0. The graph stays, and no ``.grad`` is
    touched, so the step is not changed by it.
    """

    def norm(losses):
        # The factor, a power of 2, changes nothing in fp32; in fp16 it keeps what is small from 0.
        total = sum(losses) * 2.0**12
        (found,) = torch.autograd.grad(total, layer, retain_graph=True, allow_unused=True)
        return layer.new_zeros(()) if found is None else found.float().norm()

    return norm(distillation) / norm(detection)


def _build_distiller(cfg: CfgNode, backbone: nn.Module) -> Distiller:
    terms = [term for term in read_losses(cfg.KD.LOSSES) if not term.of_regions]
    told = terms and cfg.KD.TEACHER.CONFIG_FILE
    return Distiller(
        terms=terms,
        student=in_high_resolution(backbone.output_shape(), cfg.KD.SCALE),
        teacher=teacher_levels(cfg) if told else None,
        diagnostics_period=cfg.KD.DIAGNOSTICS_PERIOD,
    )


def _build_roi_distiller(cfg: CfgNode) -> RoIDistiller | None:
    terms = [term for term in read_losses(cfg.KD.LOSSES) if term.of_regions]
    if not terms:
        return None
    own, teacher = RoIHeadsSpec.of_config(cfg), None
    if cfg.KD.TEACHER.CONFIG_FILE:
        teacher = RoIHeadsSpec.of_config(teacher_config(cfg, trained=False))
    check_roi_heads(own, teacher, [term.name for term in terms])
    return RoIDistiller(terms, cfg.KD.DIAGNOSTICS_PERIOD)


class DistilledMixin:
    """Makes any stock detector with a ``backbone`` a student::

        @META_ARCH_REGISTRY.register()
        class DistilledMine(DistilledMixin, Mine):
            pass

    In training its losses are the stock ones and ``loss_kd_*``; its inputs need ``image_hr``, as
    ``TwoResolutionMapper(frame="lr")`` makes it. In evaluation it is the stock detector.
    """

    frame = "lr"
    # A tuple, so that nn.Module does not register what it holds; see Teacher.
    _teacher: tuple[Teacher, ...] = ()

    @configurable
    def __init__(
        self,
        *,
        distiller: Distiller,
        roi_distiller: RoIDistiller | None = None,
        gradient_ratio_period: int = 0,
        **kwargs,
    ):
        """
        Args:
            distiller: the losses between feature maps.
            roi_distiller: those between what RoI heads predict; None for none.
            gradient_ratio_period: the iterations from one logging of the ratio of the distillation
                gradient's norm to the detection gradient's to the next; 0 for none.
            kwargs: arguments of the stock detector.
        """
        super().__init__(**kwargs)
        self.distiller = distiller
        self.roi_distiller = roi_distiller
        self.gradient_ratio_period = gradient_ratio_period

    @classmethod
    def from_config(cls, cfg):
        stock = super().from_config(cfg)
        return {
            **stock,
            "distiller": _build_distiller(cfg, stock["backbone"]),
            "roi_distiller": _build_roi_distiller(cfg),
            "gradient_ratio_period": cfg.KD.GRADIENT_RATIO_PERIOD,
        }

    def set_teacher(self, teacher: Teacher) -> None:
        """Learn from this teacher, whose levels and RoI heads are checked against the student's.

        Raises:
            InputError: as ``Distiller.connect`` and ``RoIDistiller.connect``.
        """
        self.distiller.connect(teacher.levels())
        teacher.needed = self.distiller.levels_read()
        if self.roi_distiller:
            self.roi_distiller.connect(self, teacher.model)
            heads = teacher.model.roi_heads
            teacher.needed |= {*heads.box_in_features}
            if heads.mask_on and self.roi_distiller.reads_masks:
                teacher.needed |= {*heads.mask_in_features}
        self._teacher = (teacher,)

    @property
    def teacher(self) -> Teacher | None:
        """What ``attach_teacher`` has given it; None before."""
        return self._teacher[0] if self._teacher else None

    def forward(self, batched_inputs: list[dict]):
        if not self.training:
            return super().forward(batched_inputs)
        if self.teacher is None:
            raise RuntimeError(
                "the student has no teacher; call msad_kd.attach_teacher(model, cfg) before "
                "training (KDTrainer does)"
            )
        rois = self.roi_distiller
        with (
            recording(self.backbone) as call,
            recording_regions(self.roi_heads, rois.reads_masks) if rois else nullcontext() as seen,
        ):
            losses = super().forward(batched_inputs)
        pyramid = self.teacher.pyramid(batched_inputs, tuple(call.inputs[0].shape[-2:]))
        storage = get_event_storage()
        distillation = self.distiller(call.output, pyramid, storage.iter)
        if rois:
            heads, scale = self.teacher.model.roi_heads, self.teacher.image_scale
            predicted = predict_regions(heads, pyramid, seen, scale)
            distillation |= rois(seen, predicted, storage.iter)
        period = self.gradient_ratio_period
        if period and distillation and (storage.iter + 1) % period == 0:
            layer = last_layer(self.backbone)
            ratio = gradient_ratio(distillation.values(), losses.values(), layer)
            storage.put_scalar("kd/gradient_ratio", ratio)
        return {**losses, **distillation}

    def not_finite(self) -> list[str]:
        """What ``Distiller.not_finite`` tells, of all losses."""
        own = self.roi_distiller.not_finite() if self.roi_distiller else []
        return self.distiller.not_finite() + own


@META_ARCH_REGISTRY.register()
class DistilledRCNN(DistilledMixin, GeneralizedRCNN):
    """Mask R-CNN or Faster R-CNN as a student."""


@META_ARCH_REGISTRY.register()
class DistilledRetinaNet(DistilledMixin, RetinaNet):
    """RetinaNet as a student."""


@META_ARCH_REGISTRY.register()
class DistilledFCOS(DistilledMixin, FCOS):
    """FCOS as a student."""


def check_losses(cfg: CfgNode) -> None:
    """See that a student's losses find levels and RoI heads in its teacher, without loading it.

    Raises:
        InputError: as ``teacher_config``, ``Distiller`` and ``check_roi_heads``.
    """
    teacher_config(cfg)
    _build_roi_distiller(cfg)
    with preserved_rng():
        _build_distiller(cfg, build_backbone(cfg)).connect(teacher_levels(cfg))


def attach_teacher(model: nn.Module, cfg: CfgNode) -> Teacher:
    """Build the teacher of ``KD.TEACHER`` and give it to a student, wrapped in DDP or not."""
    student = getattr(model, "module", model)
    teacher = build_teacher(cfg)
    student.set_teacher(teacher)
    return teacher
