"""The losses between predictions for anchors: worked-out values, gradients, equal predictions."""

import math

import pytest
import torch
from fvcore.nn import giou_loss
from torch.testing import assert_close

from msad_kd.losses.dense import (
    DENSE_LOSS_REGISTRY,
    DensePredictions,
    _giou,
    cross_head,
    dense_box,
    dense_class,
    importance,
    rpn_box,
    rpn_class,
)

ALL = [loss for _, loss in DENSE_LOSS_REGISTRY]
SQUARE = [0.0, 0.0, 2.0, 2.0]


def predictions(scores, boxes=None, centerness=None):
    """Return predictions of given probabilities; boxes default to one square."""
    boxes = torch.tensor(boxes or [SQUARE] * len(scores))
    if centerness is not None:
        centerness = torch.tensor(centerness).logit()
    return DensePredictions(torch.tensor(scores).logit(), boxes, centerness)


def random_predictions(anchors=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corners = 10 * torch.rand(anchors, 2, generator=generator)
    sides = 1 + torch.rand(anchors, 2, generator=generator)
    classes, centerness = (
        torch.randn(anchors, *width, generator=generator) for width in ((3,), ())
    )
    return DensePredictions(classes, torch.cat([corners, corners + sides], 1), centerness)


def leaves(predictions):
    return DensePredictions(*(x.clone().requires_grad_() for x in vars(predictions).values()))


def bce(p, q):
    return -q * math.log(p) - (1 - q) * math.log(1 - p)


@pytest.mark.parametrize("loss", [dense_class, rpn_class])
def test_class_worked_out(loss):
    student, teacher = predictions([[0.5], [0.3]]), predictions([[0.8], [0.6]])
    expected = (0.3 * bce(0.5, 0.8) + 0.3 * bce(0.3, 0.6)) / 1.4  # 0.8 + 0.6 anchors that matter
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    # A third anchor that both call background counts in the sum and not in the divisor.
    pair = predictions([[0.5], [0.3], [0.02]]), predictions([[0.8], [0.6], [0.01]])
    expected += 0.01 * bce(0.02, 0.01) / 1.4
    assert loss(*pair).item() == pytest.approx(expected, rel=1e-5)


def test_boxes_worked_out():
    """Squares of side 2, one moved by 1: intersection 2, union 6, enclosing box 6."""
    moved = predictions([[0.5], [0.9]], [[1.0, 0.0, 3.0, 2.0], SQUARE])
    teacher = predictions([[0.8], [0.9]])
    assert dense_box(moved, teacher).item() == pytest.approx(0.3 * (2 / 3) / 1.7, rel=1e-5)
    # GIoU is IoU here, because the enclosing box has nothing beside the two.
    assert rpn_box(moved, teacher).item() == pytest.approx(0.8 * (2 / 3) / 1.7, rel=1e-5)
    apart = predictions([[0.5]], [[4.0, 0.0, 6.0, 2.0]])  # GIoU = 0 - (12 - 8) / 12
    one = predictions([[0.8]])  # fewer than one anchor: divided by 1
    assert rpn_box(apart, one).item() == pytest.approx(0.8 * (1 + 1 / 3), rel=1e-5)
    assert dense_box(apart, one).item() == pytest.approx(0.3, rel=1e-5)


def test_cross_head_is_the_weighted_sum():
    student = predictions([[0.5, 0.1]], [[1.0, 0.0, 3.0, 2.0]], [0.4])
    teacher = predictions([[0.8, 0.1]], centerness=[0.7])
    classes = 0.3 * bce(0.5, 0.8)
    boxes, centerness = 0.8 * 2 / 3, 0.8 * (bce(0.4, 0.7) - bce(0.7, 0.7))
    found = cross_head(student, teacher)
    assert found.item() == pytest.approx(classes + boxes + centerness, rel=1e-5)
    found = cross_head(student, teacher, box_weight=2.0, centerness_weight=0.5)
    assert found.item() == pytest.approx(classes + 2 * boxes + centerness / 2, rel=1e-5)
    without = (DensePredictions(x.classes, x.boxes) for x in (student, teacher))
    assert cross_head(*without).item() == pytest.approx(classes + boxes, rel=1e-5)


@pytest.mark.parametrize("loss", ALL)
def test_equal_predictions_cost_nothing_and_move_nothing(loss):
    teacher = random_predictions()
    student = leaves(teacher)
    value = loss(student, teacher)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    for part in vars(student).values():
        assert part.grad is None or part.grad.abs().max() < 1e-6


@pytest.mark.parametrize("loss", ALL)
def test_the_gradient_goes_to_the_student_and_order_does_not_matter(loss):
    student, teacher = leaves(random_predictions(seed=1)), random_predictions()
    value = loss(student, teacher)
    value.backward()
    assert value > 0
    assert any(x.grad is not None and x.grad.abs().max() > 0 for x in vars(student).values())
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    shuffled = (DensePredictions(*(x[order] for x in vars(y).values())) for y in (student, teacher))
    assert_close(loss(*shuffled), value)


@pytest.mark.parametrize("loss", ALL)
def test_a_teacher_that_finds_nothing_and_boxes_without_area(loss):
    """No anchor matters: boxes cost nothing, and everything stays finite."""
    teacher = predictions([[0.01], [0.02]], [[3.0] * 4, SQUARE], [0.5, 0.5])
    student = leaves(predictions([[0.01], [0.02]], [[3.0] * 4, [1.0, 1.0, 1.0, 5.0]], [0.1, 0.5]))
    assert importance(teacher).tolist() == [0, 0]
    value = loss(student, teacher)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert all(x.grad is None or x.grad.isfinite().all() for x in vars(student).values())


def test_giou_is_fvcores():
    """At random, and where boxes are equal, touch, or lie in the other without an area."""
    corners = torch.rand(200, 2, 2, generator=torch.Generator().manual_seed(0)) * 8
    sides = torch.tensor([[0.0, 3.0], [2.0, 0.0], [5.0, 1.0], [1.0, 4.0]]).repeat(50, 1)
    one, other = (torch.cat([x, x + sides], dim=1) for x in corners.unbind(1))
    square, beside, inside = [0, 0, 2, 2], [2, 0, 4, 2], [1, 0, 1, 2]
    edges = [[square, square], [square, beside], [inside, square]]
    edges = torch.tensor(edges, dtype=torch.float)
    one, other = torch.cat([one, edges[:, 0]]), torch.cat([other, edges[:, 1]])
    (ours, theirs) = (one.clone().requires_grad_() for _ in range(2))
    assert_close(1 - _giou(ours, other), giou_loss(theirs, other))
    _giou(ours, other).sum().backward()
    giou_loss(theirs, other).sum().backward()
    assert_close(ours.grad, -theirs.grad)
