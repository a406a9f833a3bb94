"""Students: stock detectors that learn from a teacher, too, while they are trained."""

from contextlib import nullcontext

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, RetinaNet
from detectron2.utils.events import get_event_storage
from torch import nn

from msad_kd.distill.dense_distiller import DenseDistiller, Head
from msad_kd.distill.distiller import Distiller
from msad_kd.distill.feature_distiller import FeatureDistiller
from msad_kd.distill.focus import boxes_of, check_scores, score_focus
from msad_kd.distill.gradient_ratio import gradient_ratio
from msad_kd.distill.regions import recording_regions
from msad_kd.distill.roi_distiller import RoIDistiller
from msad_kd.distill.teacher import Teacher
from msad_kd.distill.teacher_spec import TeacherSpec
from msad_kd.distill.unlabeled import UnlabeledImages, ignoring, kept_apart
from msad_kd.losses.terms import read_losses
from msad_kd.modeling.capture import recording
from msad_kd.modeling.fcos import FCOS
from msad_kd.modeling.pyramid import Pyramid, in_high_resolution
from msad_kd.utils.errors import InputError
from msad_kd.utils.seed import preserved_rng


class DistilledMixin:
    """Makes any stock detector with a ``backbone`` a student.

    Example::

        @META_ARCH_REGISTRY.register()
        class DistilledMine(DistilledMixin, Mine):
            pass

    In training it has the stock losses and ``loss_kd_*``; its inputs need ``image_hr``, as
    ``TwoResolutionMapper(frame="lr")`` makes it. In evaluation it is the stock detector. Inputs
    with ``unlabeled``: True have losses of their own; see ``distill/unlabeled.py``.

    Args:
        distiller: the losses between feature maps.
        roi_distiller: the losses between predictions of RoI heads; None: there are none.
        dense_distiller: the same of dense heads or RPNs.
        gradient_ratio_period: log the gradient norm of the distillation losses over that of the
            detection losses every so many iterations; 0: never.
        unlabeled: what to do with images without labels; None: see its defaults.
        kwargs: arguments of the stock detector.
    """

    frame = "lr"
    # A tuple, so that nn.Module does not register the teacher; see Teacher.
    _teacher: tuple[Teacher, ...] = ()

    @configurable
    def __init__(
        self,
        *,
        distiller: FeatureDistiller,
        roi_distiller: RoIDistiller | None = None,
        dense_distiller: DenseDistiller | None = None,
        gradient_ratio_period: int = 0,
        unlabeled: UnlabeledImages | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.distiller = distiller
        self.roi_distiller = roi_distiller or RoIDistiller()
        self.dense_distiller = dense_distiller or DenseDistiller()
        self.gradient_ratio_period = gradient_ratio_period
        self.unlabeled = unlabeled or UnlabeledImages()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        """Return the constructor's arguments. Nothing is read of the teacher."""
        stock = super().from_config(cfg)
        terms = {"features": [], "regions": [], "anchors": []}
        for term in read_losses(cfg.KD.LOSSES):
            terms[term.compares].append(term)
        period = cfg.KD.DIAGNOSTICS_PERIOD
        return {
            **stock,
            "distiller": FeatureDistiller(
                terms=terms["features"],
                student=in_high_resolution(stock["backbone"].output_shape(), cfg.KD.SCALE),
                diagnostics_period=period,
            ),
            "roi_distiller": RoIDistiller(terms["regions"], period),
            "dense_distiller": DenseDistiller(terms["anchors"], period),
            "gradient_ratio_period": cfg.KD.GRADIENT_RATIO_PERIOD,
            "unlabeled": UnlabeledImages.from_config(cfg),
        }

    def set_teacher(self, teacher: Teacher) -> None:
        """Check a teacher against the student, build what the losses train, and learn from it.

        Call it before the optimizer is built: adapters and losses have parameters of their own.

        Raises:
            InputError: if a loss cannot compare the two.
        """
        teacher.needed = self.distiller.connect(teacher.levels())
        self.distiller.to(next(self.parameters()).device)
        if levels := self.distiller.levels_with("scores"):
            teacher.needed |= check_scores(Head.of(teacher.model), levels)
        teacher.needed |= self.roi_distiller.connect(self, teacher)
        teacher.needed |= self.dense_distiller.connect(self, teacher)
        teacher.needed |= self.unlabeled.connect(self, teacher.model)
        self._teacher = (teacher,)

    @property
    def teacher(self) -> Teacher | None:
        """The teacher that ``set_teacher`` was given; None before."""
        return self._teacher[0] if self._teacher else None

    def forward(self, batched_inputs: list[dict]):
        """Return the stock losses and ``loss_kd_*`` in training, the stock predictions else."""
        if not self.training:
            return super().forward(batched_inputs)
        if self.teacher is None:
            raise RuntimeError("there is no teacher; call msad_kd.attach_teacher(model, cfg) first")
        labeled = [x for x in batched_inputs if not x.get("unlabeled")]
        unlabeled = [x for x in batched_inputs if x.get("unlabeled")]
        detection, distillation = self._compare(labeled)
        losses, storage = {**detection, **distillation}, get_event_storage()
        period = self.gradient_ratio_period
        due = period and (storage.iter + 1) % period == 0
        if due and distillation and torch.is_grad_enabled():  # TEST.PRECISE_BN disables it
            ratio = gradient_ratio(distillation.values(), detection.values(), self.backbone)
            storage.put_scalar("kd/gradient_ratio", ratio)
        if unlabeled and self.unlabeled.weight:
            inputs, pyramid = self.unlabeled.label(unlabeled, self, self.teacher)
            share = len(unlabeled) / len(labeled)
            with kept_apart(self, self._distillers(), share), ignoring(self, inputs):
                labels = self.unlabeled.pseudo_labels
                losses |= self.unlabeled.weigh(*self._compare(inputs, pyramid, labels))
        return losses

    def _compare(self, batched_inputs: list[dict], pyramid: Pyramid | None = None, labels=True):
        """Return the stock losses and ``loss_kd_*``.

        Args:
            batched_inputs: images of one kind.
            pyramid: the teacher's; None: it is computed.
            labels: whether the stock losses are wanted; without, heads that no loss reads are idle.
        """
        rois = self.roi_distiller if self.roi_distiller.terms else None
        dense = self.dense_distiller if self.dense_distiller.terms else None
        with (
            recording(self.backbone) as call,
            recording_regions(self.roi_heads, rois.reads) if rois else nullcontext() as seen,
            dense.recording() if dense else nullcontext() as anchors,
        ):
            if labels or rois or dense:
                losses = super().forward(batched_inputs)
            else:
                losses = {}
                self.backbone(self.preprocess_image(batched_inputs).tensor)
        teacher, iteration = self.teacher, get_event_storage().iter
        if not self.reads_teacher():
            return losses, {}
        if pyramid is None:
            pyramid = teacher.pyramid(batched_inputs, tuple(call.inputs[0].shape[-2:]))
        looks = {}
        if self.distiller.levels_with("boxes"):
            device = call.inputs[0].device  # moved once, as a GPU would wait each time
            looks["boxes"] = [teacher.scale * x.to(device) for x in boxes_of(batched_inputs)]
        if self.distiller.levels_with("scores"):
            looks["scores"] = score_focus(Head.of(teacher.model), pyramid)
        distillation = self.distiller(call.output, pyramid, iteration, **looks)
        if rois:
            sizes = [tuple(x["image"].shape[-2:]) for x in batched_inputs]
            distillation |= rois(seen, call.output, pyramid, sizes, iteration)
        if dense:
            distillation |= dense(anchors, pyramid, iteration)
        return losses, distillation

    def reads_teacher(self) -> bool:
        """Return whether any loss compares with the teacher; else it need not run in each step."""
        return any(distiller.terms for distiller in self._distillers())

    def _distillers(self) -> list[Distiller]:
        return [self.distiller, self.roi_distiller, self.dense_distiller]

    def not_finite(self) -> list[str]:
        """Return the distillation losses of the last step that are NaN or infinite."""
        return [name for part in self._distillers() for name in part.not_finite()]


@META_ARCH_REGISTRY.register()
class DistilledRCNN(DistilledMixin, GeneralizedRCNN):
    """Mask R-CNN or Faster R-CNN as a student."""


@META_ARCH_REGISTRY.register()
class DistilledRetinaNet(DistilledMixin, RetinaNet):
    """RetinaNet as a student."""


@META_ARCH_REGISTRY.register()
class DistilledFCOS(DistilledMixin, FCOS):
    """FCOS as a student."""


def attach_teacher(model: nn.Module, cfg: CfgNode) -> Teacher:
    """Build the teacher of ``KD.TEACHER`` and give it to a student.

    Call it before the optimizer is built and before DDP wraps the model: see ``set_teacher``.

    Raises:
        InputError: if the model is no student, or its teacher cannot be built or does not fit it.
    """
    if not isinstance(model, DistilledMixin):
        raise InputError(
            f"a {type(model).__name__} takes no teacher; call attach_teacher with a student, such "
            "as a DistilledRCNN, before DistributedDataParallel wraps it"
        )
    teacher = TeacherSpec.from_config(cfg).build()
    model.set_teacher(teacher)
    return teacher


def check_losses(cfg: CfgNode, spec: TeacherSpec) -> None:
    """Check what ``set_teacher`` checks, with models on torch's meta device, which cost nothing."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list(["MODEL.TIMM.PRETRAINED", False, "MODEL.TIMM.CHECKPOINT", ""])  # no weights
    with preserved_rng(), torch.device("meta"):
        student = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
        student.set_teacher(spec.build_on_meta())
