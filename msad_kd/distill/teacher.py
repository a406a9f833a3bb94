"""The frozen teacher: built from its own config, loaded to the last key, never part of the student.

N: images, H, W: the student's padded height and width, k: high-resolution side / low-resolution.
"""

from __future__ import annotations

import logging

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone, build_model
from torch import nn

from msad_kd.checkpoint.checkpoint import load_strictly
from msad_kd.config.build import check_parts, merge_config
from msad_kd.config.defaults import add_msad_kd_config
from msad_kd.modeling.capture import computing
from msad_kd.modeling.multi_resolution import BRANCHES, MultiResolutionMixin
from msad_kd.modeling.pyramid import (
    Pyramid,
    aligned_levels,
    check_sizes,
    in_high_resolution,
    normalize,
    pad_batch,
)
from msad_kd.utils.errors import InputError
from msad_kd.utils.seed import preserved_rng

__all__ = ["Teacher", "build_teacher", "teacher_config", "teacher_levels"]


class Teacher:
    """A frozen detector that answers with feature pyramids.

    It is no ``nn.Module`` on purpose: a student that holds one has none of the teacher's weights in
    its ``state_dict``, its optimizer or its DDP buckets, and ``student.train()`` leaves it alone.
    """

    def __init__(self, model: nn.Module, *, branch: str, scale: int):
        """
        Args:
            model: a detector; it is frozen and put into eval mode.
            branch: the pyramid to give: "fused", "hr" or "lr". A single-resolution detector has
                "hr", read from ``image_hr``, and "lr", read from ``image``.
            scale: k.

        Raises:
            InputError: if the model has no such branch.
        """
        _check_branch(type(model), branch)
        if isinstance(model, MultiResolutionMixin):
            model.test_branch = branch  # what is evaluated is what is learned from
        self.model = model.eval().requires_grad_(False)
        self.branch = branch
        self.scale = scale
        self.needed: set[str] | None = None  # the levels that a student reads; None: all

    @property
    def image_scale(self) -> int:
        """The side of an image as its heads count it over one of the student's: 1 or k."""
        plain = not isinstance(self.model, MultiResolutionMixin)
        return 1 if plain and self.branch == "lr" else self.scale

    def levels(self) -> dict[str, ShapeSpec]:
        """Level name to channels and stride, in pixels of the high-resolution image."""
        shapes = self.model.backbone.output_shape()
        return _levels(type(self.model), shapes, self.branch, self.scale)

    @torch.no_grad()
    def pyramid(self, batched_inputs: list[dict], padded: tuple[int, int]) -> Pyramid:
        """The pyramid of a student's batch.

        Args:
            batched_inputs: dicts with ``image`` (3, h, w) at low resolution and ``image_hr``
                (3, kh, kw), as ``TwoResolutionMapper(frame="lr")`` makes them.
            padded: (H, W) to which the student pads the batch; the high-resolution images are
                padded to exactly k times that.

        Returns:
            level name to (N, C, cells, cells), without a graph; a plain teacher's that no loss
            reads may be None.

        Raises:
            InputError: if the inputs lack ``image_hr``, or if one isn't exactly k times its image.
        """
        if "image_hr" not in batched_inputs[0] and self.branch != "lr":
            raise InputError(
                "the training data lack 'image_hr', the teacher's image; use "
                "TwoResolutionMapper(cfg, is_train=True, frame='lr') as the mapper"
            )
        sizes = [tuple(self.scale * side for side in x["image"].shape[-2:]) for x in batched_inputs]
        high = low = None
        if self.branch != "lr":
            check_sizes([x["image_hr"] for x in batched_inputs], sizes)
            sides = [side * self.scale for side in padded]
            high = pad_batch(normalize(self.model, [x["image_hr"] for x in batched_inputs]), *sides)
        if self.branch != "hr":
            low = pad_batch(normalize(self.model, [x["image"] for x in batched_inputs]), *padded)
        if not isinstance(self.model, MultiResolutionMixin):
            backbone = self.model.backbone
            needed = backbone.output_shape() if self.needed is None else self.needed
            with computing(backbone, needed):
                return backbone(low if high is None else high)
        return self.model.pyramids(high, low, sizes, (self.branch,))[self.branch]


def _check_branch(meta: type, branch: str) -> None:
    offered = BRANCHES if issubclass(meta, MultiResolutionMixin) else ("hr", "lr")
    if branch not in offered:
        raise InputError(
            f"KD.TEACHER.BRANCH is '{branch}', but a {meta.__name__} teacher has "
            f"{', '.join(offered)}"
        )


def _levels(meta: type, shapes: dict, branch: str, scale: int) -> dict[str, ShapeSpec]:
    if issubclass(meta, MultiResolutionMixin):
        return aligned_levels(shapes, scale)
    return in_high_resolution(shapes, 1 if branch == "hr" else scale)


def teacher_levels(cfg: CfgNode) -> dict[str, ShapeSpec]:
    """What ``Teacher.levels`` will be, told by the teacher's config alone.

    A student's adapters are sized by it: they have to be there before the optimizer, and before any
    teacher is. The random generators are left as they were.
    """
    own = teacher_config(cfg, trained=False)
    meta = META_ARCH_REGISTRY.get(own.MODEL.META_ARCHITECTURE)
    with preserved_rng():
        shapes = build_backbone(own).output_shape()
    return _levels(meta, shapes, cfg.KD.TEACHER.BRANCH, cfg.KD.SCALE)


def teacher_config(cfg: CfgNode, *, trained: bool = True) -> CfgNode:
    """The teacher's config: its own file, with the student's data sets and device.

    Args:
        trained: whether its weights will be needed.

    Raises:
        InputError: if the file or the weights needed are not named, if the file cannot be read, if
            the teacher has no such branch, or if it sees images of another format or scale than the
            student, or of other means and deviations than one that starts from it.
    """
    keys = cfg.KD.TEACHER
    for key in ("CONFIG_FILE", "WEIGHTS") if trained else ("CONFIG_FILE",):
        if not keys[key]:
            raise InputError(
                f"KD.TEACHER.{key} is empty; {cfg.MODEL.META_ARCHITECTURE} needs a teacher's "
                "config file and checkpoint to train (not to be evaluated)"
            )
    teacher = get_cfg()
    add_msad_kd_config(teacher)
    try:
        merge_config(teacher, keys.CONFIG_FILE, list(keys.OPTS or ()))
        check_parts(teacher)
    except InputError as error:
        raise InputError(f"KD.TEACHER: {error}") from error
    meta = META_ARCH_REGISTRY.get(teacher.MODEL.META_ARCHITECTURE)
    _check_branch(meta, keys.BRANCH)
    if getattr(meta, "frame", None) != "hr":
        teacher.KD.SCALE = cfg.KD.SCALE  # a single-resolution detector has none of its own
    teacher.MODEL.WEIGHTS = keys.WEIGHTS
    teacher.MODEL.DEVICE = cfg.MODEL.DEVICE
    teacher.KD.LOSSES = []  # a student that teaches needs nothing of its own training
    teacher.DATASETS = cfg.DATASETS.clone()
    teacher.DATALOADER.NUM_WORKERS = cfg.DATALOADER.NUM_WORKERS
    same = [
        ("INPUT.FORMAT", teacher.INPUT.FORMAT, cfg.INPUT.FORMAT),
        ("KD.SCALE", teacher.KD.SCALE, cfg.KD.SCALE),
    ]
    if keys.INIT_STUDENT and keys.INIT_BACKBONE:
        for key in ("PIXEL_MEAN", "PIXEL_STD"):
            same.append((f"MODEL.{key}", list(teacher.MODEL[key]), list(cfg.MODEL[key])))
    for name, own, students in same:
        if own != students:
            raise InputError(
                f"{name} is {own} in the teacher's config '{keys.CONFIG_FILE}' and {students} in "
                "the student's; both have to see the same images"
            )
    teacher.freeze()
    return teacher


def build_teacher(cfg: CfgNode) -> Teacher:
    """Build, load and freeze the teacher that a student's config names.

    The random generators are left as they were, so a student has the same initial weights and the
    same data with a teacher as without.

    Raises:
        InputError: as ``teacher_config``, and if the checkpoint is absent or a key of it does not
            fit.
    """
    keys = cfg.KD.TEACHER
    own = teacher_config(cfg)
    with preserved_rng():
        model = build_model(own)
    load_strictly(model, keys.WEIGHTS, f"KD.TEACHER.CONFIG_FILE '{keys.CONFIG_FILE}'")
    logging.getLogger(__name__).info(
        "Teacher: %s from %s, branch %s", own.MODEL.META_ARCHITECTURE, keys.WEIGHTS, keys.BRANCH
    )
    return Teacher(model, branch=keys.BRANCH, scale=cfg.KD.SCALE)
