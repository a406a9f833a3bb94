"""Hooks of the trainer: seeding each step, and evaluating the teacher before the first one."""

import logging
import os

from detectron2.engine import HookBase
from detectron2.utils import comm

from msad_kd.distill.teacher import TeacherSpec
from msad_kd.modeling.classes import number_of_classes
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
        classes = [number_of_classes(cfg) for cfg in (self.spec.cfg, trainer.cfg)]
        if classes[0] != classes[1]:
            logger.warning(
                "The teacher predicts %s classes, the student %s: the teacher is not evaluated",
                *classes,
            )
            return
        cfg = self.spec.cfg.clone()
        cfg.defrost()
        cfg.OUTPUT_DIR = os.path.join(trainer.cfg.OUTPUT_DIR, "teacher")
        for key in ("COCO_EVALUATOR", "CITYSCAPES_COCO"):  # to compare its AP with the student's
            cfg.TEST[key] = trainer.cfg.TEST[key]
        logger.info(
            "Evaluating the teacher's branch '%s' before the first iteration", self.spec.branch
        )
        with preserved_rng():
            trainer.test(cfg, trainer.teacher.model)
