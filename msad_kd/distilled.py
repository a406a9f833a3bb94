"""Students: stock detectors at low resolution that are trained with feature losses, too."""

from __future__ import annotations

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.utils.events import get_event_storage
from torch import nn

from msad_kd.distiller import Distiller
from msad_kd.hooking import recording
from msad_kd.teacher import Teacher, build_teacher

__all__ = ["DistilledMixin", "DistilledRCNN", "attach_teacher"]


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
    def __init__(self, *, distiller: Distiller, scale: int, **kwargs):
        """
        Args:
            distiller: the losses.
            scale: k, high-resolution side / low-resolution side.
            kwargs: arguments of the stock detector.
        """
        super().__init__(**kwargs)
        self.distiller = distiller
        self.scale = scale

    @classmethod
    def from_config(cls, cfg):
        return {**super().from_config(cfg), "distiller": Distiller(cfg), "scale": cfg.KD.SCALE}

    def set_teacher(self, teacher: Teacher) -> None:
        """Learn from this teacher, whose levels are checked against the student's.

        Raises:
            InputError: if the levels cannot be paired.
        """
        shapes = self.backbone.output_shape()
        strides = {name: shape.stride * self.scale for name, shape in shapes.items()}
        self.distiller.connect(strides, teacher.strides())
        self._teacher = (teacher,)

    @property
    def teacher(self) -> Teacher | None:
        return self._teacher[0] if self._teacher else None

    def forward(self, batched_inputs: list[dict]):
        if not self.training:
            return super().forward(batched_inputs)
        if self.teacher is None:
            raise RuntimeError(
                "the student has no teacher; call msad_kd.attach_teacher(model, cfg) before "
                "training (KDTrainer does)"
            )
        with recording(self.backbone) as call:
            losses = super().forward(batched_inputs)
        pyramid = self.teacher.pyramid(batched_inputs, tuple(call.input.shape[-2:]))
        losses.update(self.distiller(call.output, pyramid, get_event_storage().iter))
        return losses


@META_ARCH_REGISTRY.register()
class DistilledRCNN(DistilledMixin, GeneralizedRCNN):
    """Mask R-CNN or Faster R-CNN as a student."""


def attach_teacher(model: nn.Module, cfg: CfgNode) -> Teacher:
    """Build the teacher of ``KD.TEACHER`` and give it to a student, wrapped in DDP or not."""
    student = getattr(model, "module", model)
    teacher = build_teacher(cfg)
    student.set_teacher(teacher)
    return teacher
