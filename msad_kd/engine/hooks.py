"""What a training does between its steps: seeding, and a look at the teacher before the first."""

from __future__ import annotations

import logging
import os

from detectron2.engine import HookBase
from detectron2.utils import comm

from msad_kd.distill.teacher import teacher_config
from msad_kd.modeling.classes import number_of_classes
from msad_kd.utils.seed import derive_seed, preserved_rng, seed_all

__all__ = ["EvaluateTeacher", "SeedEachStep"]


class SeedEachStep(HookBase):
    """Seeds every generator before each step by (seed, rank, iteration).

    A step is then the same after a resume, and whatever an evaluation in between has drawn.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def before_step(self):
        seed_all(derive_seed(self.seed, comm.get_rank(), self.trainer.iter))


class EvaluateTeacher(HookBase):
    """Evaluates the teacher before the first iteration, so that a bad one is seen at once."""

    def before_train(self):
        trainer = self.trainer
        if trainer.start_iter > 0:
            return
        cfg = teacher_config(trainer.cfg).clone()
        logger = logging.getLogger(__name__)
        own, students = (number_of_classes(each) for each in (cfg, trainer.cfg))
        if own != students:
            logger.warning(
                "The teacher predicts %s classes, the student %s: the teacher is not evaluated",
                own,
                students,
            )
            return
        cfg.defrost()
        cfg.OUTPUT_DIR = os.path.join(trainer.cfg.OUTPUT_DIR, "teacher")
        for key in ("COCO_EVALUATOR", "CITYSCAPES_COCO"):  # its AP is to be compared
            cfg.TEST[key] = trainer.cfg.TEST[key]
        logger.info("Evaluating the teacher before the first iteration")
        with preserved_rng():
            trainer.test(cfg, trainer.teacher.model)
