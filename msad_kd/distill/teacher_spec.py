"""The teacher that a student's config names: read once, checked, loaded to the last key."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY, build_model

from msad_kd.checkpoint.checkpoint import load_strictly, read_model
from msad_kd.config.build import check_parts, merge_config
from msad_kd.config.defaults import add_msad_kd_config
from msad_kd.data.classes import model_classes
from msad_kd.distill.teacher import Teacher, check_branch
from msad_kd.losses.terms import read_losses
from msad_kd.modeling.classes import anchor_sizes, is_a, number_of_classes
from msad_kd.modeling.fcos import FCOS
from msad_kd.modeling.multi_resolution import MultiResolutionMixin
from msad_kd.utils.errors import InputError
from msad_kd.utils.seed import preserved_rng


@dataclass(frozen=True)
class TeacherSpec:
    """The teacher that a student's config names: read once, then handed on."""

    # The teacher's own config, frozen, with KD.TEACHER.WEIGHTS as its MODEL.WEIGHTS and with the
    # student's data sets, device and number of workers.
    cfg: CfgNode
    config_file: str
    branch: str
    # What the teacher's classes have to be the student's for, or "".
    needs_classes_for: str = ""
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
        teacher_cfg = get_cfg()
        add_msad_kd_config(teacher_cfg)
        try:
            merge_config(teacher_cfg, keys.CONFIG_FILE, list(keys.OPTS or ()))
            check_parts(teacher_cfg)
        except InputError as error:
            raise InputError(f"KD.TEACHER: {error}") from error
        meta_architecture = META_ARCH_REGISTRY.get(teacher_cfg.MODEL.META_ARCHITECTURE)
        check_branch(meta_architecture, keys.BRANCH)
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
        return cls(teacher_cfg, keys.CONFIG_FILE, keys.BRANCH, next(iter(needs), ""), keys.AMP)

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
                f"{self.needs_classes_for} needs the same in the same order; set "
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
    sides = {key: side for key, side in sides.items() if side}  # 0: images keep their size
    other = [x for x in sides if not min(trained) <= factor * sides[x] <= max(trained)]
    if other and not teacher_cfg.INPUT.JITTER.SIZE:
        key, size = other[0], factor * sides[other[0]]
        logger.warning(
            f"INPUT.{key} is {cfg.INPUT[key]}, so the teacher gets images of {size} px, but its "
            f"config '{file}' has INPUT.MIN_SIZE_TRAIN {tuple(trained)}; it is weaker at sizes "
            "that it was not trained on"
        )
    anchors, theirs = map(anchor_sizes, (cfg, teacher_cfg))
    sides, their_sides = (np.concatenate(sizes) for sizes in (anchors, theirs))
    same = sides.shape == their_sides.shape and np.allclose(factor * sides, their_sides)
    without = is_a(cfg, FCOS) or is_a(teacher_cfg, FCOS)  # it has no anchors
    if aligned and not without and not same:
        logger.warning(
            f"MODEL.ANCHOR_GENERATOR.SIZES is {theirs} in the teacher's config '{file}', not "
            f"{factor} times the student's {anchors}; the two then find an object on other levels"
        )
