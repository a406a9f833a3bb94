"""Losses of the cells inside or outside of objects' boxes alone, to see where a loss gains.

    python train_net.py --import projects.Shapes.box_losses \
        --config-file configs/Shapes/student_one_size.yaml MODEL.META_ARCHITECTURE BoxAwareRCNN SEED 1 \
        KD.TEACHER.WEIGHTS projects/Shapes/checkpoints/teacher_one_size.pth \
        KD.LOSSES "[{'name': 'mse_inside', 'weight': 20.0, 'levels': ['p2'], 'warmup_iters': 100}]"

The maps are (N, C, H, W), the student's and the teacher's at a level; boxes are in pixels of the
low-resolution image. A box has the cells that it touches.
"""

import math

import torch
from detectron2.modeling import META_ARCH_REGISTRY

from msad_kd import DistilledRCNN
from msad_kd.losses.feature import DISTILL_LOSS_REGISTRY
from msad_kd.losses.ssim.functional import rescale, ssim_loss
from msad_kd.modeling.pyramid import cells_in_boxes

# Losses are functions of two maps, so the boxes come to them by this.
_batch = []


@META_ARCH_REGISTRY.register()
class BoxAwareRCNN(DistilledRCNN):
    """A student that tells the losses of this file which images it sees."""

    def forward(self, batched_inputs):
        _batch[:] = batched_inputs
        return super().forward(batched_inputs)


def _share(values, *, outside=False):
    """What the cells inside boxes, or outside of them, add to the mean of (N, C, H, W)."""
    height, width = values.shape[-2:]
    found = [each["instances"] for each in _batch]
    # Images are padded, so a map has cells for more than they have.
    seen = max(side / cells for x in found for side, cells in zip(x.image_size, (height, width)))
    stride = 2 ** math.ceil(math.log2(seen))
    masks = [cells_in_boxes(x.gt_boxes.tensor, stride, height, width) for x in found]
    return (values * (torch.stack(masks).unsqueeze(1) != outside)).mean()


@DISTILL_LOSS_REGISTRY.register()
def mse_inside(student, teacher):
    """The share of mean (S - T)^2 that is inside boxes; with `mse_outside` it is `mse`."""
    return _share((student - teacher).float().square())


@DISTILL_LOSS_REGISTRY.register()
def mse_outside(student, teacher):
    """The share of mean (S - T)^2 that is outside of boxes."""
    return _share((student - teacher).float().square(), outside=True)


@DISTILL_LOSS_REGISTRY.register()
def ssim_inside(student, teacher):
    """The share of mean (1 - SSIM) / 2, of the rescaled maps, that is inside boxes."""
    return _share(ssim_loss(rescale(student), rescale(teacher), reduction="none"))
