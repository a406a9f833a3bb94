"""A student's start from the weights of its teacher."""

import logging

import torch
from detectron2.modeling.roi_heads import CascadeROIHeads
from torch import nn

from msad_kd.checkpoint.checkpoint import TRAINING_PREFIX
from msad_kd.modeling.batch_statistics import LOW_SUFFIX
from msad_kd.utils.errors import InputError


def init_from_teacher(student: nn.Module, teacher: nn.Module, *, backbone=True) -> list[str]:
    """Copy the teacher's weights and buffers to a student where name and shape agree.

    A student with one box head takes that of the first stage of a ``CascadeROIHeads`` teacher.

    Args:
        student: the model to change.
        teacher: the model to copy from.
        backbone: whether to copy the backbone's bottom-up path too.

    Returns:
        The student's keys that were not copied, which one warning names. Keys of its ``distiller``
        do not count; nor, if ``backbone`` is False, do those of its bottom-up path.

    Raises:
        InputError: if the bottom-up path should be copied but differs from the teacher's.
    """
    source, target = teacher.state_dict(), student.state_dict()
    # The student runs at low resolution, so it takes the statistics of that resolution.
    for key in [key for key in source if key.endswith(LOW_SUFFIX)]:
        source[key.removesuffix(LOW_SUFFIX)] = source.pop(key)
    if isinstance(getattr(teacher, "roi_heads", None), CascadeROIHeads):
        source |= _first_stage(source, target)
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


def _first_stage(
    source: dict[str, torch.Tensor], target: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the first box head of a cascade's weights, by the names of a single head's.

    Its regressor, which is class-agnostic, is repeated for each class of the target.
    """
    renamed = {}
    for part in ("roi_heads.box_head.", "roi_heads.box_predictor."):
        for key in [key for key in source if key.startswith(f"{part}0.")]:
            name = part + key.removeprefix(f"{part}0.")
            if name not in target:
                continue  # a cascade, too
            tensor = source[key]
            if name.startswith("roi_heads.box_predictor.bbox_pred."):
                tensor = torch.cat([tensor] * (len(target[name]) // len(tensor)))
            renamed[name] = tensor
    return renamed
