"""The losses of projects/Shapes/box_losses.py: of what a box holds, and of what none does."""

import pytest
import torch
from detectron2.structures import Boxes, Instances
from helpers import WARMUP, build, losses_of

from msad_kd import attach_teacher
from msad_kd.losses.feature import DISTILL_LOSS_REGISTRY, mse
from msad_kd.losses.ssim.functional import rescale, ssim_loss

NAMES = ("mse_inside", "mse_outside", "ssim_inside")


@pytest.fixture(scope="module")
def box_losses():
    """The module, whose losses other tests do not find."""
    from projects.Shapes import box_losses

    yield box_losses
    for name in NAMES:
        DISTILL_LOSS_REGISTRY._obj_map.pop(name)


@pytest.fixture
def maps(box_losses, monkeypatch):
    """Two maps of 2x4 cells, of two images of 8x13 px; a box holds the left half of the first."""
    boxes = torch.tensor([[0.0, 0.0, 7.0, 8.0]]), torch.zeros(0, 4)
    batch = [{"instances": Instances((8, 13), gt_boxes=Boxes(each))} for each in boxes]
    monkeypatch.setattr(box_losses, "_batch", batch)
    torch.manual_seed(0)
    return torch.rand(2, 3, 2, 4), torch.rand(2, 3, 2, 4)


def test_mse_of_the_cells_that_are_meant(box_losses, maps):
    square = (maps[0] - maps[1]).square()
    inside = square[0, :, :, :2]
    torch.testing.assert_close(box_losses.mse_inside(*maps), inside.sum() / square.numel())
    both = box_losses.mse_inside(*maps) + box_losses.mse_outside(*maps)
    torch.testing.assert_close(both, mse(*maps))


def test_ssim_of_the_cells_that_are_meant(box_losses, maps):
    whole = ssim_loss(*map(rescale, maps), reduction="none")
    inside = whole[0, :, :, :2].sum() / whole.numel()
    torch.testing.assert_close(box_losses.ssim_inside(*maps), inside)


def test_no_box_is_no_loss(box_losses, maps):
    box_losses._batch[0] = box_losses._batch[1]
    assert box_losses.mse_inside(*maps) == 0


def test_a_student_learns_by_them(box_losses, student_config, batch):
    losses = [{"name": name, "weight": 1.0} for name in ("mse_inside", "mse_outside", "mse")]
    cfg = student_config("MODEL.META_ARCHITECTURE", "BoxAwareRCNN", "KD.LOSSES", losses)
    model = build(cfg)
    attach_teacher(model, cfg)
    found = losses_of(model, batch(cfg, "lr"), WARMUP)
    inside, outside, whole = (found[f"loss_kd_{each['name']}"] for each in losses)
    assert inside > 0 and outside > 0
    torch.testing.assert_close(inside + outside, whole)
