"""A student's start from the weights of its teacher."""

import logging

from torch import nn

from msad_kd.checkpoint.checkpoint import TRAINING_PREFIX
from msad_kd.modeling.batch_statistics import LOW_SUFFIX
from msad_kd.utils.errors import InputError


def init_from_teacher(student: nn.Module, teacher: nn.Module, *, backbone=True) -> list[str]:
    """Copy the teacher's weights and buffers to a student where name and shape agree.

    Args:
        student: the model to change.
        teacher: the model to copy from.
        backbone: whether to copy the backbone's bottom-up path too.

    Returns:
        The student's keys that were not copied, which one warning names: without those of its
        ``distiller``, nor without ``backbone`` those of its bottom-up path.

    Raises:
        InputError: if the bottom-up path should be copied but differs from the teacher's.
    """
    source, target = teacher.state_dict(), student.state_dict()
    # The student runs at low resolution, so it takes the statistics of that resolution.
    for key in [key for key in source if key.endswith(LOW_SUFFIX)]:
        source[key.removesuffix(LOW_SUFFIX)] = source.pop(key)
    copied = {k: v for k, v in source.items() if k in target and target[k].shape == v.shape}
    prefix = "backbone.bottom_up."
    # Frozen batch normalisation has no counter of batches.
    teacher_keys, student_keys = (
        {key for key in state if key.startswith(prefix) and "batches" not in key}
        for state in (source, target)
    )
    if not backbone:
        copied = {k: v for k, v in copied.items() if not k.startswith(prefix)}
    elif differing := sorted(teacher_keys ^ student_keys | student_keys - copied.keys()):
        raise InputError(
            f"a student cannot start from its teacher: their backbones differ in {len(differing)} "
            f"weights, e.g. {differing[0]}; set KD.TEACHER.INIT_BACKBONE False to copy neck and "
            "heads alone, and MODEL.WEIGHTS to where the backbone starts"
        )
    student.load_state_dict(copied, strict=False)
    ignored = (TRAINING_PREFIX,) if backbone else (TRAINING_PREFIX, prefix)
    kept = [key for key in target if key not in copied and not key.startswith(ignored)]
    logger = logging.getLogger(__name__)
    logger.info("Copied %d weights and buffers from the teacher to the student", len(copied))
    if kept:
        logger.warning("Not in the teacher, so not copied: %s", ", ".join(kept))
    return kept
