"""Hooks of the trainer: they seed steps, evaluate the teacher and make checkpoints complete."""

import logging
import os

from detectron2.engine import HookBase
from detectron2.utils import comm

from msad_kd.data.classes import model_classes
from msad_kd.distill.teacher_spec import TeacherSpec
from msad_kd.modeling.batch_statistics import share_statistics
from msad_kd.modeling.classes import number_of_classes
from msad_kd.modeling.loss_normalizer import get_normalizer, set_normalizer
from msad_kd.utils.seed import derive_seed, preserved_rng, seed_all


class SeedEachStep(HookBase):
    """Seed every random generator before each step by (seed, rank, iteration).

    A step is then the same after a resume, and after an evaluation, which draws random numbers.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def before_step(self):
        """Seed the generators."""
        seed_all(derive_seed(self.seed, comm.get_rank(), self.trainer.iter))


class EvaluateTeacher(HookBase):
    """Evaluate the teacher before the first iteration, so that a bad one is noticed at once."""

    def __init__(self, spec: TeacherSpec):
        self.spec = spec

    def before_train(self):
        """Evaluate the teacher on the student's data sets, unless the run is resumed."""
        trainer, logger = self.trainer, logging.getLogger(__name__)
        if trainer.start_iter > 0:
            return
        cfg, names = self.spec.cfg.clone(), getattr(trainer.teacher.model, "classes", ())
        theirs, ours = number_of_classes(cfg), number_of_classes(trainer.cfg)
        lacking = [name for name in model_classes(trainer.cfg)[0] if name not in names]
        if lacking if names else theirs != ours:
            counts = f"{theirs} classes, the student {ours}"
            counts = f"no {', '.join(lacking)}" if names else counts
            logger.warning(f"The teacher predicts {counts}: the teacher is not evaluated")
            return
        cfg.defrost()
        if names:
            cfg.DATASETS.CLASSES = []  # the evaluation takes those that the checkpoint names
        cfg.OUTPUT_DIR = os.path.join(trainer.cfg.OUTPUT_DIR, "teacher")
        for key in ("COCO_EVALUATOR", "CITYSCAPES_COCO"):  # to compare its AP with the student's
            cfg.TEST[key] = trainer.cfg.TEST[key]
        logger.info(f"Evaluating the teacher's branch '{self.spec.branch}' before the training")
        with preserved_rng():
            trainer.test(cfg, trainer.teacher.model)


class KeepNormalizer(HookBase):
    """Let all processes prepare a checkpoint, which the main one writes alone.

    They share the running statistics, so that what is evaluated in the run is what is saved. The
    loss normalizer of each is kept in the training checkpoints, not in the model's. It has to stand
    before the hook that writes checkpoints, in all processes.

    Args:
        periods: iterations between two checkpoints, and between two evaluations; 0: only after the
            last iteration.
    """

    def __init__(self, *periods: int):
        self.periods = periods
        self._gathered: tuple[int, list[float | None]] = (-1, [])

    def after_step(self):
        """Prepare if a period or the training is over."""
        if is_due(self.trainer, *self.periods):
            self.prepare()

    def prepare(self):
        """Prepare for a checkpoint after this iteration. All processes have to call it."""
        model = self.trainer.checkpointer.model
        share_statistics(model)
        self._gathered = self.trainer.iter + 1, comm.all_gather(get_normalizer(model))

    def state_dict(self) -> dict:
        """Return the normalizers, of this process alone if the checkpoint was not due."""
        done, values = self._gathered
        if done != self.trainer.iter + 1:
            values = [get_normalizer(self.trainer.checkpointer.model)]
        return {} if values[0] is None else {"values": values}

    def load_state_dict(self, state: dict) -> None:
        """Give this process its normalizer back, or the first one if it is new."""
        values, rank = state["values"], comm.get_rank()
        value = values[rank] if rank < len(values) else values[0]
        set_normalizer(self.trainer.checkpointer.model, value)


def is_due(trainer, *periods: int) -> bool:
    """Return whether this iteration is the last one, or ends a period; 0 is no period."""
    done = trainer.iter + 1
    return done >= trainer.max_iter or any(p > 0 and done % p == 0 for p in periods)
