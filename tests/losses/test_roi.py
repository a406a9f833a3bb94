"""The losses between predictions for regions: worked-out values, and what has no regions."""

import math

import pytest
import torch
from torch.testing import assert_close

from msad_kd.losses.roi import ROI_LOSS_REGISTRY, RoIPredictions, roi_box, roi_class, roi_mask

ALL = sorted(name for name, _ in ROI_LOSS_REGISTRY)


def predictions(probabilities=((0.5, 0.5),), deltas=None, masks=((0.5,),)):
    """Of probabilities, which the losses see as logits; a mask is a row of cells."""
    classes = torch.tensor(probabilities).log()
    if deltas is None:
        deltas = [[0.0] * 4] * len(classes)
    return RoIPredictions(classes, torch.tensor(deltas), torch.tensor(masks)[:, None].logit())


def random_predictions(regions=6, classes=3):
    masks = torch.randn(regions // 2, 4, 4)
    return RoIPredictions(
        torch.randn(regions, classes + 1), torch.randn(regions, 4 * classes), masks
    )


def test_names():
    assert set(ALL) == {"roi_class", "roi_box", "roi_mask"}


def test_class_worked_out():
    student, teacher = predictions([[0.5, 0.5]]), predictions([[0.75, 0.25]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert roi_class(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    # At temperature 2 the odds of 3 are those of their root.
    p = math.sqrt(3) / (1 + math.sqrt(3))
    expected = 4 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))
    assert roi_class(student, teacher, temperature=2.0).item() == pytest.approx(expected, rel=1e-5)
    # A second region on which both agree halves the mean.
    one, other = ([[0.5, 0.5], [0.9, 0.1]], [[0.75, 0.25], [0.9, 0.1]])
    both = roi_class(predictions(one), predictions(other))
    assert_close(both, roi_class(student, teacher) / 2)


def test_box_worked_out():
    probabilities = [[0.2, 0.7, 0.1], [0.1, 0.1, 0.8]]  # class 1, and background
    theirs = [[9.0, 9.0, 9.0, 9.0, 1.0, -2.0, 0.0, 1.0], [1.0] + [0.0] * 7]
    teacher = predictions(probabilities, theirs)
    student = predictions([[0.3, 0.3, 0.4]] * 2, [[0.0] * 8] * 2)
    # 0.7 (1 + 2 + 0 + 1) of the first region, 0.1 x 1 of the second.
    assert roi_box(student, teacher).item() == pytest.approx((2.8 + 0.1) / 2, rel=1e-5)
    alike = predictions(probabilities, [each[4:] for each in theirs])
    student = predictions(probabilities, [[0.0] * 4] * 2)
    assert roi_box(student, alike).item() == pytest.approx(2.8 / 2, rel=1e-5)


def test_mask_worked_out():
    teacher = predictions(masks=[[0.75, 0.25]])
    assert roi_mask(predictions(masks=[[0.5, 0.5]]), teacher).item() == pytest.approx(math.log(2))
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert roi_mask(teacher, teacher).item() == pytest.approx(entropy)


@pytest.mark.parametrize("name", ALL)
def test_equal_predictions_pull_nowhere(name):
    torch.manual_seed(0)
    teacher = random_predictions()
    parts = [each.clone().requires_grad_() for each in vars(teacher).values()]
    loss = ROI_LOSS_REGISTRY.get(name)(RoIPredictions(*parts), teacher)
    assert loss.shape == ()
    if name != "roi_mask":  # which has the entropy
        assert_close(loss, torch.tensor(0.0))
    found = torch.autograd.grad(loss, parts, allow_unused=True)
    assert all(each is None or each.abs().max() < 1e-7 for each in found)


@pytest.mark.parametrize("name", ALL)
def test_the_gradient_goes_to_what_is_compared(name):
    torch.manual_seed(0)
    student, teacher = random_predictions(), random_predictions()
    parts = [each.requires_grad_() for each in vars(student).values()]
    found = torch.autograd.grad(
        ROI_LOSS_REGISTRY.get(name)(student, teacher), parts, allow_unused=True
    )
    moved = {key for key, each in zip(vars(student), found) if each is not None and each.any()}
    assert moved == {{"roi_class": "classes", "roi_box": "deltas", "roi_mask": "masks"}[name]}


@pytest.mark.parametrize("name", ALL)
def test_without_regions_it_is_nothing(name):
    student, teacher = random_predictions(0), random_predictions(0)
    parts = [each.requires_grad_() for each in vars(student).values()]
    loss = ROI_LOSS_REGISTRY.get(name)(student, teacher)
    assert loss.item() == 0
    loss.backward()  # a graph that some processes have and others do not stops them all
    assert sum(part.grad is not None for part in parts) == 1


@pytest.mark.parametrize("name", ALL)
def test_half_precision_is_compared_in_full(name):
    torch.manual_seed(0)
    student, teacher = (
        RoIPredictions(*(each.half() for each in vars(random_predictions()).values()))
        for _ in range(2)
    )
    loss = ROI_LOSS_REGISTRY.get(name)(student, teacher)
    assert loss.dtype == torch.float32 and loss.isfinite()


def test_what_they_refuse():
    both = random_predictions()
    with pytest.raises(ValueError, match="temperature is 0; it should be above 0"):
        roi_class(both, both, temperature=0)
    with pytest.raises(ValueError, match="needs masks of student and teacher"):
        roi_mask(both, RoIPredictions(both.classes, both.deltas, None))
