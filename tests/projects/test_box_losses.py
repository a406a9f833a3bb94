"""projects/Shapes/box_losses.py: MSE inside and outside of boxes."""

import pytest
import torch
from detectron2.structures import Boxes, Instances
from helpers import WARMUP, build, losses_of

from msad_kd import attach_teacher
from msad_kd.losses.feature import DISTILL_LOSS_REGISTRY, mse
from msad_kd.utils.errors import InputError

NAMES = ("mse_inside", "mse_outside")


@pytest.fixture(scope="module")
def box_losses():
    """Import the module and unregister its losses at the end."""
    from projects.Shapes import box_losses

    yield box_losses
    for name in NAMES:
        DISTILL_LOSS_REGISTRY._obj_map.pop(name)


@pytest.fixture
def maps(box_losses, monkeypatch):
    """Two maps of 2x4 cells of two images of 8x13 px; a box covers the left half of the first."""
    boxes = torch.tensor([[0.0, 0.0, 7.0, 8.0]]), torch.zeros(0, 4)
    batch = [{"instances": Instances((8, 13), gt_boxes=Boxes(box))} for box in boxes]
    monkeypatch.setattr(box_losses, "_batch", batch)
    torch.manual_seed(0)
    return torch.rand(2, 3, 2, 4), torch.rand(2, 3, 2, 4)


def test_inside_and_outside_add_up_to_mse(box_losses, maps):
    square = (maps[0] - maps[1]).square()
    inside = square[0, :, :, :2]
    torch.testing.assert_close(box_losses.mse_inside(*maps), inside.sum() / square.numel())
    both = box_losses.mse_inside(*maps) + box_losses.mse_outside(*maps)
    torch.testing.assert_close(both, mse(*maps))
    box_losses._batch[0] = box_losses._batch[1]  # no boxes
    assert box_losses.mse_inside(*maps) == 0
    box_losses._batch.append(box_losses._batch[0])
    with pytest.raises(InputError, match="need boxes.*UNLABELED_PER_BATCH"):
        box_losses.mse_inside(*maps)


def test_student_trains_with_them(box_losses, student_config, batch):
    losses = [{"name": name, "weight": 1.0} for name in ("mse_inside", "mse_outside", "mse")]
    cfg = student_config("MODEL.META_ARCHITECTURE", "BoxAwareRCNN", "KD.LOSSES", losses)
    model = build(cfg)
    attach_teacher(model, cfg)
    values = losses_of(model, batch(cfg, "lr"), WARMUP)
    inside, outside, whole = (values[f"loss_kd_{loss['name']}"] for loss in losses)
    assert inside > 0 and outside > 0
    torch.testing.assert_close(inside + outside, whole)
