"""MSE inside or outside of the objects' boxes alone, to see where a loss helps or hurts.

    python train_net.py --import projects.Shapes.box_losses \
        --config-file configs/Shapes/student_one_size.yaml \
        MODEL.META_ARCHITECTURE BoxAwareRCNN SEED 1 \
        KD.TEACHER.WEIGHTS projects/Shapes/checkpoints/teacher_one_size.pth \
        KD.LOSSES "[{'name': 'mse_inside', 'weight': 20.0, 'levels': ['p2'], 'warmup_iters': 100}]"

Maps are (N, C, H, W); boxes are in pixels of the low-resolution image. A cell is inside a box when
the box touches it.
"""

import math

import torch
from detectron2.modeling import META_ARCH_REGISTRY

from msad_kd import DISTILL_LOSS_REGISTRY, DistilledRCNN
from msad_kd.modeling.pyramid import cells_in_boxes
from msad_kd.utils.errors import InputError

# A loss is a function of two maps, so the boxes reach it through this list.
_batch = []


@META_ARCH_REGISTRY.register()
class BoxAwareRCNN(DistilledRCNN):
    """A student that hands its batch to the losses of this file."""

    def forward(self, batched_inputs):
        """Run the student."""
        _batch[:] = batched_inputs
        return super().forward(batched_inputs)


def _masked_mse(student, teacher, *, inside):
    """Return the part of the mean of (S - T)^2 that comes from cells inside or outside of boxes."""
    square = (student - teacher).float().square()
    cells = square.shape[-2:]
    if len(_batch) != len(student):
        raise InputError(
            "mse_inside and mse_outside need boxes: leave out SOLVER.UNLABELED_PER_BATCH"
        )
    instances = [image["instances"] for image in _batch]
    # The map covers the padding, too, so side / cells of an image is at most the stride.
    quotient = max(side / n for x in instances for side, n in zip(x.image_size, cells))
    stride = 2 ** math.ceil(math.log2(quotient))
    masks = [cells_in_boxes(x.gt_boxes.tensor, stride, *cells) for x in instances]
    masks = torch.stack(masks).unsqueeze(1).to(square.device)
    return (square * (masks == inside)).mean()


@DISTILL_LOSS_REGISTRY.register()
def mse_inside(student, teacher):
    """Return the part of `mse` inside of boxes; with `mse_outside` it adds up to `mse`."""
    return _masked_mse(student, teacher, inside=True)


@DISTILL_LOSS_REGISTRY.register()
def mse_outside(student, teacher):
    """Return the part of `mse` outside of boxes."""
    return _masked_mse(student, teacher, inside=False)
