"""Detectron2's ``DefaultTrainer`` with two resolutions, a teacher and repeatable steps."""

from __future__ import annotations

import contextlib
import logging
import os

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, TrainerBase
from detectron2.engine.hooks import EvalHook, PeriodicWriter
from detectron2.modeling import GeneralizedRCNNWithTTA
from torch import nn

from msad_kd.checkpoint.checkpoint import check_exists, load_strictly
from msad_kd.checkpoint.start import init_from_teacher
from msad_kd.data.loader import CheckedMapper, build_train_loader, explain_missing_data
from msad_kd.data.mapper import build_mapper
from msad_kd.distill.student import DistilledMixin, attach_teacher
from msad_kd.distill.teacher import teacher_config
from msad_kd.engine.hooks import EvaluateTeacher, KeepNormalizer, SeedEachStep
from msad_kd.engine.launch import ddp_on_cpu
from msad_kd.engine.optimizer import build_optimizer
from msad_kd.evaluation.build import build_evaluator, check_augmentation, check_precise_bn
from msad_kd.modeling.classes import check_classes, is_a
from msad_kd.utils.errors import InputError

__all__ = ["KDTrainer"]


def _is_student(cfg: CfgNode) -> bool:
    return is_a(cfg, DistilledMixin)


class KDTrainer(DefaultTrainer):
    """Trains students, multi-resolution teachers and stock detectors alike.

    Beside ``DefaultTrainer``: both resolutions from the loader, AdamW as an option, step data that
    are a function of (SEED, rank, iteration), a student that starts from its teacher.
    """

    def __init__(self, cfg: CfgNode):
        check_augmentation(cfg)
        check_precise_bn(cfg)
        if _is_student(cfg):
            teacher_config(cfg)  # its mistakes are told before the data are read
            keys = cfg.KD.TEACHER
            check_exists(keys.WEIGHTS, f"KD.TEACHER.CONFIG_FILE '{keys.CONFIG_FILE}'")
        elif cfg.KD.TEACHER.CONFIG_FILE:
            logging.getLogger(__name__).warning(
                "KD.TEACHER is not used: a %s is trained without distillation (DistilledRCNN and "
                "the like are the students)",
                cfg.MODEL.META_ARCHITECTURE,
            )
        with ddp_on_cpu() if cfg.MODEL.DEVICE == "cpu" else contextlib.nullcontext():
            super().__init__(cfg)
        self.teacher = attach_teacher(self._trainer.model, cfg) if _is_student(cfg) else None

    def train(self) -> dict:
        """Train to the end.

        Returns:
            the last results on DATASETS.TEST; only the main process has any.
        """
        try:
            # TorchScript rewrites a function (the focal loss of RetinaNet and FCOS) after its first
            # calls, which changes its last bits: a resumed run, whose first calls come later, would
            # not be the same. On a GPU no bits are promised, and the rewritten one saves memory.
            with torch.jit.optimized_execution(self.cfg.MODEL.DEVICE != "cpu"):
                super().train()
        except FloatingPointError as error:  # Detectron2's, which names the totals
            model = getattr(self._trainer.model, "module", self._trainer.model)
            bad = model.not_finite() if self.teacher is not None else []
            if not bad:
                raise
            raise FloatingPointError(
                f"{error}\nNot finite at iteration {self.iter}: {', '.join(bad)}"
            ) from error
        # Detectron2 returns them only if they are to be verified.
        return getattr(self, "_last_eval_results", {})

    def resume_or_load(self, resume: bool = True) -> None:
        fresh = not (resume and self.checkpointer.has_checkpoint())
        weights = self.cfg.MODEL.WEIGHTS
        if fresh and weights:
            check_exists(weights, "MODEL.WEIGHTS")
        super().resume_or_load(resume)
        self.data_loader.start = self.start_iter
        if fresh and self.teacher is not None and self.cfg.KD.TEACHER.INIT_STUDENT:
            backbone = self.cfg.KD.TEACHER.INIT_BACKBONE
            if weights and backbone:
                logging.getLogger(__name__).warning(
                    "The teacher's weights replace those of MODEL.WEIGHTS '%s'; set "
                    "KD.TEACHER.INIT_STUDENT False to keep them",
                    weights,
                )
            init_from_teacher(self.checkpointer.model, self.teacher.model, backbone=backbone)

    def state_dict(self) -> dict:
        # The inner trainer has the optimizer, which Detectron2 0.6 leaves out of checkpoints; its
        # git main does not, but takes a checkpoint without it for a broken one.
        return {
            **TrainerBase.state_dict(self),
            "_trainer": self._trainer.state_dict(),
            "images_per_batch": self.cfg.SOLVER.IMS_PER_BATCH,
        }

    def load_state_dict(self, state_dict: dict) -> None:
        images, own = state_dict.get("images_per_batch"), self.cfg.SOLVER.IMS_PER_BATCH
        if images not in (None, own):
            raise InputError(
                f"the run in '{self.cfg.OUTPUT_DIR}' had {images} images a batch and is resumed "
                f"with {own}, which is another schedule; resume it on as many processes, with the "
                "same SOLVER.IMS_PER_BATCH"
            )
        TrainerBase.load_state_dict(self, state_dict)
        if "_trainer" in state_dict:
            self._trainer.load_state_dict(state_dict["_trainer"])
        else:
            logging.getLogger(__name__).warning(
                "The checkpoint has no optimizer state: it was written by Detectron2 0.6 itself"
            )

    def build_hooks(self):
        hooks = super().build_hooks()
        hooks.insert(0, KeepNormalizer(self.cfg.SOLVER.CHECKPOINT_PERIOD))
        if self.cfg.SEED >= 0:
            hooks.insert(0, SeedEachStep(self.cfg.SEED))
        if _is_student(self.cfg) and self.cfg.KD.TEACHER.EVAL_BEFORE_TRAIN:
            hooks.insert(0, EvaluateTeacher())
        if self.cfg.TEST.AUG.ENABLED:
            writers = [i for i, hook in enumerate(hooks) if isinstance(hook, PeriodicWriter)]
            augmented = EvalHook(0, lambda: self.test_with_TTA(self.cfg, self.model))
            hooks.insert(min(writers, default=len(hooks)), augmented)  # it is to be written, too
        return hooks

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        loader = build_train_loader(cfg, build_mapper(cfg, is_train=True))
        check_classes(cfg, (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
        return loader

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        mapper = CheckedMapper(build_mapper(cfg, is_train=False))
        with explain_missing_data((dataset_name,)):
            loader = build_detection_test_loader(cfg, dataset_name, mapper=mapper)
        check_classes(cfg, (dataset_name,))
        return loader

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None):
        return build_evaluator(cfg, dataset_name, output_folder)

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: nn.Module) -> dict:  # as Detectron2's tools call it
        """Evaluate with the test-time augmentation of TEST.AUG.

        Returns:
            as ``test``, so by data set where there are several, with "_TTA" after each task's name.

        Raises:
            InputError: as ``check_augmentation``.
        """
        check_augmentation(cfg)
        logging.getLogger(__name__).info("Evaluating with test-time augmentation (TEST.AUG)")
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        if len(cfg.DATASETS.TEST) > 1:
            return {name: _renamed(tasks) for name, tasks in results.items()}
        return _renamed(results)

    @classmethod
    def load_model(cls, cfg: CfgNode, weights: str | None, told: str) -> nn.Module:
        """The model of a config as it is evaluated, with a checkpoint that fits to the last key.

        Nothing is needed, built or loaded of what a student has for its training alone.

        Args:
            cfg: of the model.
            weights: of the checkpoint; None leaves the model as it is initialised.
            told: what the config is, for the message.

        Raises:
            InputError: as ``load_strictly``.
        """
        cfg = cfg.clone()
        cfg.defrost()
        cfg.KD.LOSSES = []
        cfg.MODEL.WEIGHTS = weights or cfg.MODEL.WEIGHTS  # so MODEL.TIMM's weights are not read
        model = cls.build_model(cfg)
        if weights is not None:
            load_strictly(model, weights, told)
        return model.eval()


def _renamed(results: dict) -> dict:
    return {f"{task}_TTA": metrics for task, metrics in results.items()}
