"""The teacher: read from a student's config, loaded to the last key, frozen.

N: images, C: channels, H, W: the student's padded height and width,
k: high-resolution side / low-resolution side.
"""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.structures import ImageList, Instances
from torch import nn

from msad_kd.checkpoint.checkpoint import load_strictly, read_model
from msad_kd.config.build import check_parts, merge_config
from msad_kd.config.defaults import add_msad_kd_config
from msad_kd.data.classes import model_classes
from msad_kd.losses.terms import read_losses
from msad_kd.modeling.capture import answering, computing, scoring_above
from msad_kd.modeling.classes import is_a, number_of_classes
from msad_kd.modeling.fcos import FCOS
from msad_kd.modeling.inference import for_inference
from msad_kd.modeling.multi_resolution import BRANCHES, MultiResolutionMixin
from msad_kd.modeling.pyramid import (
    Pyramid,
    aligned_levels,
    check_images,
    in_high_resolution,
    normalized_batch,
)
from msad_kd.utils.errors import InputError
from msad_kd.utils.replaced import replaced
from msad_kd.utils.seed import preserved_rng

_DTYPES = {"": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Teacher:
    """A frozen detector that gives feature pyramids.

    It is no ``nn.Module``, so none of its weights are in a student's ``state_dict``, optimizer or
    DDP buckets, and ``student.train()`` does not reach it.

    Args:
        model: a detector. It is frozen and put into eval mode.
        branch: the pyramid to give: "fused", "hr" or "lr". A single-resolution detector has "hr",
            read from ``image_hr``, and "lr", read from ``image``.
        scale: k.
        amp: "bf16" or "fp16" to compute pyramids in it; "" does not.

    Raises:
        InputError: if the model has no such branch.
    """

    def __init__(self, model: nn.Module, *, branch: str, scale: int, amp: str = ""):
        _check_branch(type(model), branch)
        self.multi_resolution = isinstance(model, MultiResolutionMixin)
        if self.multi_resolution:
            model.test_branch = branch  # evaluate the branch that the student learns from
        self.model = model.eval().requires_grad_(False)
        self.branch = branch
        self.scale = scale
        self.amp = amp
        self._prepared: nn.Module | None = None
        self.needed: set[str] | None = None  # the levels that the student reads; None: all

    @property
    def image_scale(self) -> int:
        """The side of an image in the frame of its heads over the student's image: 1 or k."""
        return self.scale if self.multi_resolution or self.branch == "hr" else 1

    def levels(self) -> dict[str, ShapeSpec]:
        """Return level name to channels and stride, in pixels of the high-resolution image."""
        shapes = self.model.backbone.output_shape()
        if self.multi_resolution:
            return aligned_levels(shapes, self.scale)
        return in_high_resolution(shapes, 1 if self.branch == "hr" else self.scale)

    def prepared(self) -> nn.Module:
        """Return the backbone that computes pyramids: see ``for_inference``.

        It is a copy that is made at the first call, when the weights have to be in place. The model
        itself stays as it was loaded.
        """
        if self._prepared is None:
            self._prepared = for_inference(self.model.backbone)
        return self._prepared

    @torch.no_grad()
    def pyramid(self, batched_inputs: list[dict], padded: tuple[int, int]) -> Pyramid:
        """Compute the pyramid of a student's batch, level name to (N, C, cells, cells).

        It is in fp32, with ``amp`` too. Levels of a single-resolution teacher that no loss reads
        may be None.

        Args:
            batched_inputs: dicts with ``image`` (3, h, w) and ``image_hr`` (3, kh, kw), as
                ``TwoResolutionMapper(frame="lr")`` makes them.
            padded: (H, W) of the student's batch; high-resolution images are padded to k times it.

        Raises:
            InputError: if ``image_hr`` is missing or is not exactly k times its ``image``.
        """
        sizes = [tuple(self.scale * side for side in x["image"].shape[-2:]) for x in batched_inputs]
        high = low = None
        if self.branch != "lr":
            check_images(batched_inputs, "lr", self.scale)
            sides = [side * self.scale for side in padded]
            high = normalized_batch(self.model, [x["image_hr"] for x in batched_inputs], *sides)
        if self.branch != "hr":
            low = normalized_batch(self.model, [x["image"] for x in batched_inputs], *padded)
        backbone, dtype = self.prepared(), _DTYPES[self.amp]
        with torch.autocast(self.model.device.type, dtype) if dtype else nullcontext():
            pyramid = self._pyramid(backbone, high, low, sizes)
        return {n: x.float() if dtype and x is not None else x for n, x in pyramid.items()}

    def _pyramid(self, backbone: nn.Module, high, low, sizes) -> Pyramid:
        if self.multi_resolution:
            with replaced(self.model, backbone=backbone):
                return self.model.pyramids(high, low, sizes, (self.branch,))[self.branch]
        with computing(backbone, backbone.output_shape() if self.needed is None else self.needed):
            return backbone(low if high is None else high)

    @torch.no_grad()
    def detect(self, inputs: list[dict], pyramid: Pyramid, above: float = 0.0) -> list[Instances]:
        """Return the detections in a student's batch, in the frame of its ``image``.

        Args:
            inputs: as for ``pyramid``.
            pyramid: what ``pyramid`` returned for them; the backbone is not run again.
            above: what a score has to exceed, if the model's own threshold is lower.
        """
        model, sizes = self.model, [tuple(x["image"].shape[-2:]) for x in inputs]
        mine = [tuple(self.image_scale * side for side in size) for size in sizes]
        images = ImageList(next(x for x in pyramid.values() if x is not None), mine)
        frames = [{"height": height, "width": width} for height, width in sizes]
        # A multi-resolution detector would compute the pyramid itself; the stock one does the rest.
        stock = super(MultiResolutionMixin, model) if self.multi_resolution else model
        with (
            replaced(model, preprocess_image=lambda *_: images),
            answering(model.backbone, pyramid),
            scoring_above(model, above),
        ):
            return [x["instances"] for x in stock.forward(frames)]


def _check_branch(meta_architecture: type, branch: str) -> None:
    plain = not issubclass(meta_architecture, MultiResolutionMixin)
    branches = ("hr", "lr") if plain else BRANCHES
    if branch not in branches:
        raise InputError(
            f"KD.TEACHER.BRANCH is '{branch}', but a {meta_architecture.__name__} teacher has "
            f"{', '.join(branches)}"
        )


@dataclass(frozen=True)
class TeacherSpec:
    """The teacher that a student's config names: read once, then handed on."""

    # The teacher's own config, frozen, with KD.TEACHER.WEIGHTS as its MODEL.WEIGHTS and with the
    # student's data sets, device and number of workers.
    cfg: CfgNode
    config_file: str
    branch: str
    # The keys, if any, for which the teacher's classes have to be the student's.
    needs_classes_for: tuple[str, ...] = ()
    amp: str = ""

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "TeacherSpec":
        """Read KD.TEACHER of a student's config.

        Raises:
            InputError: if the config file or the weights are not named, if the file cannot be read,
                if the teacher has no such branch, or if the two see other images.
        """
        keys = cfg.KD.TEACHER
        for key in ("CONFIG_FILE", "WEIGHTS"):
            if not keys[key]:
                raise InputError(
                    f"KD.TEACHER.{key} is empty; to train a {cfg.MODEL.META_ARCHITECTURE}, name "
                    "its teacher's config file and checkpoint (to evaluate one, neither is needed)"
                )
        if keys.AMP not in _DTYPES:
            raise InputError(f"KD.TEACHER.AMP is '{keys.AMP}'; use one of {[*_DTYPES]}")
        teacher_cfg = get_cfg()
        add_msad_kd_config(teacher_cfg)
        try:
            merge_config(teacher_cfg, keys.CONFIG_FILE, list(keys.OPTS or ()))
            check_parts(teacher_cfg)
        except InputError as error:
            raise InputError(f"KD.TEACHER: {error}") from error
        meta_architecture = META_ARCH_REGISTRY.get(teacher_cfg.MODEL.META_ARCHITECTURE)
        _check_branch(meta_architecture, keys.BRANCH)
        if not issubclass(meta_architecture, MultiResolutionMixin):
            teacher_cfg.KD.SCALE = cfg.KD.SCALE  # a single-resolution detector has none
        teacher_cfg.MODEL.WEIGHTS = keys.WEIGHTS
        teacher_cfg.MODEL.DEVICE = cfg.MODEL.DEVICE
        teacher_cfg.DATASETS = cfg.DATASETS.clone()
        teacher_cfg.DATALOADER.NUM_WORKERS = cfg.DATALOADER.NUM_WORKERS
        _check_images(cfg, teacher_cfg)
        _warn_of_other_sizes(cfg, teacher_cfg)
        teacher_cfg.freeze()
        losses = [x.name for x in read_losses(cfg.KD.LOSSES) if x.by_class]
        needs = [f"the loss {name} of KD.LOSSES" for name in losses]
        # Predictors of another size are not copied.
        if keys.INIT_STUDENT and number_of_classes(cfg) == number_of_classes(teacher_cfg):
            needs.append("KD.TEACHER.INIT_STUDENT True")
        if cfg.DATASETS.UNLABELED and cfg.KD.UNLABELED.PSEUDO_LABELS:
            needs.append("KD.UNLABELED.PSEUDO_LABELS True")
        return cls(teacher_cfg, keys.CONFIG_FILE, keys.BRANCH, tuple(needs), keys.AMP)

    def build(self) -> Teacher:
        """Build, load and freeze the teacher, without drawing random numbers.

        A student therefore has the same initial weights and data with a teacher as without.

        Raises:
            InputError: if the checkpoint is missing or a key of it does not fit, or if a loss or
                INIT_STUDENT needs the student's classes and the checkpoint names others.
        """
        weights = self.cfg.MODEL.WEIGHTS
        with preserved_rng():
            model = build_model(self.cfg)
        load_strictly(model, weights, f"KD.TEACHER.CONFIG_FILE '{self.config_file}'")
        self._check_classes(model.classes)
        logging.getLogger(__name__).info(
            "Teacher: %s from %s, branch %s", type(model).__name__, weights, self.branch
        )
        return Teacher(model, branch=self.branch, scale=self.cfg.KD.SCALE, amp=self.amp)

    def check_classes(self) -> None:
        """Check the classes as ``build`` does, for which it reads the checkpoint alone."""
        if self.needs_classes_for:
            source = f"KD.TEACHER.CONFIG_FILE '{self.config_file}'"
            self._check_classes(read_model(self.cfg.MODEL.WEIGHTS, source).get("classes") or ())

    def _check_classes(self, theirs: Sequence[str]) -> None:
        ours, source = model_classes(self.cfg)
        if self.needs_classes_for and any(a != b for a, b in zip(theirs, ours)):
            raise InputError(
                f"the teacher '{self.cfg.MODEL.WEIGHTS}' was trained on other classes "
                f"({', '.join(theirs)}) than those of {source} ({', '.join(ours)}), and "
                f"{self.needs_classes_for[0]} needs the same in the same order; set "
                "DATASETS.CLASSES to the teacher's, or do without"
            )

    def build_on_meta(self) -> Teacher:
        """Build the teacher on torch's meta device: it has shapes, but no weights and no cost."""
        with preserved_rng(), torch.device("meta"):
            model = META_ARCH_REGISTRY.get(self.cfg.MODEL.META_ARCHITECTURE)(self.cfg)
        return Teacher(model, branch=self.branch, scale=self.cfg.KD.SCALE)


def _check_images(cfg: CfgNode, teacher_cfg: CfgNode) -> None:
    keys = ["INPUT.FORMAT", "KD.SCALE"]
    if cfg.KD.TEACHER.INIT_STUDENT and cfg.KD.TEACHER.INIT_BACKBONE:
        keys += ["MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"]
    for key in keys:
        section, name = key.split(".")
        student, teacher = cfg[section][name], teacher_cfg[section][name]
        if student != teacher:
            raise InputError(
                f"{key} is {teacher} in the teacher's config '{cfg.KD.TEACHER.CONFIG_FILE}' and "
                f"{student} in the student's; both have to see the same images"
            )


def _warn_of_other_sizes(cfg: CfgNode, teacher_cfg: CfgNode) -> None:
    """Warn of images or anchors that do not have k times the student's size."""
    aligned = is_a(teacher_cfg, MultiResolutionMixin)
    factor = cfg.KD.SCALE if aligned or cfg.KD.TEACHER.BRANCH == "hr" else 1
    logger, file = logging.getLogger(__name__), cfg.KD.TEACHER.CONFIG_FILE
    trained = teacher_cfg.INPUT.MIN_SIZE_TRAIN
    sides = {"MIN_SIZE_TEST": cfg.INPUT.MIN_SIZE_TEST}
    if not cfg.INPUT.JITTER.SIZE:  # of several sizes, smaller ones are augmentation
        sides["MIN_SIZE_TRAIN"] = max(cfg.INPUT.MIN_SIZE_TRAIN)
    other = [x for x in sides if not min(trained) <= factor * sides[x] <= max(trained)]
    if other and not teacher_cfg.INPUT.JITTER.SIZE:
        key, size = other[0], factor * sides[other[0]]
        logger.warning(
            f"INPUT.{key} is {cfg.INPUT[key]}, so the teacher gets images of {size} px, but its "
            f"config '{file}' has INPUT.MIN_SIZE_TRAIN {tuple(trained)}; it is weaker at sizes "
            "that it was not trained on"
        )
    anchors, theirs = (x.MODEL.ANCHOR_GENERATOR.SIZES for x in (cfg, teacher_cfg))
    sides, their_sides = (np.concatenate(sizes) for sizes in (anchors, theirs))
    same = sides.shape == their_sides.shape and np.allclose(factor * sides, their_sides)
    if aligned and not is_a(cfg, FCOS) and not same:
        logger.warning(
            f"MODEL.ANCHOR_GENERATOR.SIZES is {theirs} in the teacher's config '{file}', not "
            f"{factor} times the student's {anchors}; the two then find an object on other levels"
        )
