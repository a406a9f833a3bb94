"""Detectron2's ``DefaultTrainer`` with two resolutions, a teacher and repeatable steps."""

import contextlib
import functools
import logging
import os

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.engine.hooks import PreciseBN
from detectron2.evaluation import DatasetEvaluator, verify_results
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from torch import nn

from msad_kd.checkpoint.checkpoint import load_strictly
from msad_kd.checkpoint.checkpointer import TrainingCheckpointer
from msad_kd.checkpoint.start import init_from_teacher
from msad_kd.config.values import warn_of_long_warmups
from msad_kd.data.classes import align_classes, with_classes_of
from msad_kd.data.loader import ResumableLoader, build_test_loader, build_train_loader
from msad_kd.data.mapper import build_mapper
from msad_kd.distill.student import DistilledMixin
from msad_kd.distill.teacher import Teacher
from msad_kd.distill.teacher_spec import TeacherSpec
from msad_kd.engine.accumulate import accumulating
from msad_kd.engine.best import EndOfTraining, KeepBest, check_metric
from msad_kd.engine.hook_order import add_hooks, find_hook, resume_precise_bn
from msad_kd.engine.not_finite import WatchLosses
from msad_kd.engine.optimizer import build_optimizer
from msad_kd.engine.resume import OWN_LOADER, check_state, images_per_step, restore_state
from msad_kd.engine.run_folder import (
    explain_disk_errors,
    folder_locked,
    make_folder,
    reopen_writers,
    take_folder,
)
from msad_kd.engine.signals import StopOnSignal
from msad_kd.evaluation.build import build_evaluator, check_augmentation, check_precise_bn
from msad_kd.losses.terms import read_losses
from msad_kd.modeling.batch_statistics import check_synchronised
from msad_kd.modeling.classes import is_a
from msad_kd.utils.compat import checkpointer_of, ddp_on, trainer_state
from msad_kd.utils.errors import InputError

_logger = logging.getLogger(__name__)


class KDTrainer(DefaultTrainer):
    """Trains students, multi-resolution teachers and stock detectors.

    It adds to ``DefaultTrainer``: both resolutions from the loader, AdamW as an option, steps whose
    data depend on (SEED, rank, iteration) alone, and a student's teacher.

    Args:
        cfg: the config of the run.
        teacher_spec: a student's teacher, if its config has been read already.

    Raises:
        InputError: if TEST asks for what the model cannot do, if data are missing or do not fit, if
            the teacher cannot be built, or if the student cannot learn from it.
    """

    def __init__(self, cfg: CfgNode, teacher_spec: TeacherSpec | None = None):
        check_augmentation(cfg)
        check_precise_bn(cfg)
        self._check_test_data(cfg)
        self.teacher: Teacher | None = None
        self.teacher_spec: TeacherSpec | None = None
        student = is_a(cfg, DistilledMixin)
        warn_of_long_warmups(cfg, read_losses(cfg.KD.LOSSES) if student else [])
        if student:
            self.teacher_spec = teacher_spec or TeacherSpec.from_config(cfg)
            # DefaultTrainer's constructor builds the model and then its optimizer. In between, the
            # teacher has to be attached: it decides which adapters there are to train.
            self.build_model = self._build_student
        elif cfg.KD.TEACHER.CONFIG_FILE:
            _logger.warning(
                f"KD.TEACHER is not used: a {cfg.MODEL.META_ARCHITECTURE} is trained without "
                "distillation (students are DistilledRCNN and the like)"
            )
        make_folder(cfg.OUTPUT_DIR)
        with ddp_on(cfg.MODEL.DEVICE), checkpointer_of(TrainingCheckpointer):
            super().__init__(cfg)
        if cfg.SOLVER.ACCUMULATE > 1:
            if not isinstance(self.data_loader, ResumableLoader):
                kind = type(self.data_loader).__name__
                raise InputError(
                    f"SOLVER.ACCUMULATE is {cfg.SOLVER.ACCUMULATE}, but build_train_loader returns "
                    f"a {kind}, which ignores this key; {OWN_LOADER}"
                )
            self._trainer = accumulating(self._trainer, cfg.SOLVER.ACCUMULATE)
        if cfg.DATASETS.TRAIN:
            names = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes")
            self.checkpointer.extra = {"classes": list(names)} if names else {}

    def _check_test_data(self, cfg: CfgNode) -> None:
        """Read what the evaluations will read: its mistakes cost a training if found later."""
        align_classes(cfg, cfg.DATASETS.TRAIN)
        evaluators = {}
        for name in cfg.DATASETS.TEST or ():
            self.build_test_loader(cfg, name)
            with contextlib.suppress(NotImplementedError):  # as in Detectron2: not evaluated
                evaluators[name] = self.build_evaluator(cfg, name)
        check_metric(cfg, evaluators)

    def _build_student(self, cfg: CfgNode) -> nn.Module:
        student = type(self).build_model(cfg)
        self.teacher = self.teacher_spec.build()
        student.set_teacher(self.teacher)
        return student

    def train(self) -> dict:
        """Train to the end.

        Returns:
            The last results on DATASETS.TEST; only the main process has any.

        Raises:
            NotFiniteError: in all processes, if a loss of one is NaN or infinite.
            Stopped: if this or another process has got a signal; the step is done and saved.
        """
        # TorchScript rewrites a function (the focal loss of RetinaNet and FCOS) after its first
        # calls, which changes its last bits: a resumed run, whose first calls come later, would
        # differ. GPUs do not promise equal bits, and there the rewritten one saves memory.
        stop = find_hook(self, StopOnSignal)
        with (
            folder_locked(self.cfg.OUTPUT_DIR),
            stop.handling() if stop else contextlib.nullcontext(),
            torch.jit.optimized_execution(self.cfg.MODEL.DEVICE != "cpu"),
        ):
            try:
                super().train()
            except EndOfTraining:  # by TEST.PATIENCE; Detectron2 verifies after its own end alone
                if self.cfg.TEST.EXPECTED_RESULTS and comm.is_main_process():
                    verify_results(self.cfg, self._last_eval_results)
        # Detectron2 returns them only if TEST.EXPECTED_RESULTS is set.
        return getattr(self, "_last_eval_results", {})

    def run_step(self) -> None:
        """Train one step; signals and losses that are not finite end all processes after it."""
        stop, losses = (find_hook(self, kind) for kind in (StopOnSignal, WatchLosses))
        if stop is None or losses is None:  # a subclass has hooks of its own
            return super().run_step()
        error = ""
        try:
            super().run_step()
        except FloatingPointError as e:  # of the losses: in the main process alone
            error = str(e)
        except AssertionError as e:  # fvcore's GIoU raises it for boxes that are not finite
            if "bad box" not in str(e):
                raise
            error = str(e)
        if (error and losses.in_forward) or stop.agree(bool(error)):
            raise losses.explain(error)

    def resume_or_load(self, resume: bool = True) -> None:
        """Resume the run or start it, a student from its teacher's weights (INIT_STUDENT).

        A fresh start moves an old run in OUTPUT_DIR aside; see ``engine.run_folder``.

        Raises:
            InputError: if MODEL.WEIGHTS does not exist or the backbones differ, if the run cannot
                be resumed with this config, or if another run is at work in OUTPUT_DIR.
        """
        if take_folder(self.cfg, resume=resume):
            reopen_writers(self._hooks, self.build_writers)
        if found := self.checkpointer.find() if resume else None:
            self.checkpointer.resume(found)
            self.data_loader.start = self.start_iter = self.iter + 1
            resume_precise_bn(find_hook(self, PreciseBN), self.cfg, self.start_iter)
            best = find_hook(self, KeepBest)
            if best is not None and best.resume(self.start_iter):
                self.max_iter = self.start_iter
            if self.start_iter == self.max_iter:  # it may have been killed before its last file
                self.checkpointer.keep_as_final(found)
            return
        super().resume_or_load(resume=False)
        self.data_loader.start = self.start_iter
        if self.teacher is not None and self.cfg.KD.TEACHER.INIT_STUDENT:
            weights, backbone = self.cfg.MODEL.WEIGHTS, self.cfg.KD.TEACHER.INIT_BACKBONE
            if weights and backbone:
                _logger.warning(
                    f"The teacher's weights replace those of MODEL.WEIGHTS '{weights}'; set "
                    "KD.TEACHER.INIT_STUDENT False to keep them"
                )
            init_from_teacher(self.checkpointer.model, self.teacher.model, backbone=backbone)

    def state_dict(self) -> dict:
        """Return the state for a checkpoint, with optimizer, batch size, processes and config."""
        images = images_per_step(self.cfg)
        run = {"images_per_batch": images, "processes": comm.get_world_size()}
        return {**trainer_state(self), **run, "config": self._config_text}

    @functools.cached_property
    def _config_text(self) -> str:
        return self.cfg.dump()

    def check_state_dict(self, state_dict: dict) -> str:
        """Check a checkpoint's state before anything is loaded; see ``engine.resume``."""
        return check_state(self, state_dict)

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore a checkpoint's state; see ``engine.resume``."""
        restore_state(self, state_dict)

    def after_step(self):
        """Run the hooks, which write checkpoints, logs and results."""
        with explain_disk_errors():
            super().after_step()

    def after_train(self):
        """Run the hooks after the last step."""
        with explain_disk_errors():
            super().after_train()

    def build_hooks(self):
        """Build Detectron2's hooks and those of this project; see ``engine.hook_order``."""
        return add_hooks(self, super().build_hooks())

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Build the optimizer of SOLVER.OPTIMIZER; see ``engine.optimizer``."""
        check_synchronised(model, cfg)
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        """Build a loader whose batches depend on (SEED, rank, iteration) alone."""
        return build_train_loader(cfg, build_mapper(cfg, is_train=True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        """Build Detectron2's loader with the mapper that the model needs."""
        return build_test_loader(cfg, dataset_name, build_mapper(cfg, is_train=False))

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None) -> DatasetEvaluator:
        """Build the evaluator of a data set; see ``evaluation.build``."""
        return build_evaluator(cfg, dataset_name, output_folder)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: list | None = None) -> dict:
        """Evaluate as Detectron2 does, with the classes that the model's checkpoint names."""
        return super().test(with_classes_of(cfg, model), model, evaluators)

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: nn.Module) -> dict:  # as Detectron2's tools call it
        """Evaluate with the test-time augmentation of TEST.AUG.

        Returns:
            The results as ``test`` returns them, with "_TTA" after the name of each task.
        """
        _logger.info("Evaluating with test-time augmentation (TEST.AUG)")
        cfg = with_classes_of(cfg, model)
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        if len(cfg.DATASETS.TEST) > 1:
            return {name: _add_suffix(tasks) for name, tasks in results.items()}
        return _add_suffix(results)

    @classmethod
    def load_model(cls, cfg: CfgNode, weights: str | None, source: str) -> nn.Module:
        """Build a model for evaluation without its teacher; load weights by ``load_strictly``.

        Args:
            cfg: the config of the model.
            weights: the checkpoint; None keeps the initial weights.
            source: what to call the config in an error.
        """
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.WEIGHTS = weights or cfg.MODEL.WEIGHTS  # so MODEL.TIMM's weights are not read
        model = cls.build_model(cfg)
        if weights is not None:
            load_strictly(model, weights, source)
        return model.eval()


def _add_suffix(results: dict) -> dict:
    return {f"{task}_TTA": metrics for task, metrics in results.items()}
