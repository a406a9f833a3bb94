"""The losses between RoI predictions: worked-out values, gradients, and no regions."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from msad_kd.losses import ROI_LOSS_REGISTRY, RoIPredictions
from msad_kd.losses.roi import roi_box, roi_class, roi_keypoint, roi_mask

ALL = ("roi_class", "roi_box", "roi_mask", "roi_keypoint")


def predictions(probabilities=((0.5, 0.5),), deltas=None, masks=((0.5,),), keypoints=((1.0,),)):
    """Return the predictions of given probabilities; a mask or heat map is a row of cells."""
    classes = torch.tensor(probabilities).log()
    deltas = torch.tensor(deltas or [[0.0] * 4] * len(classes))
    heat_maps = torch.tensor(keypoints)[:, None].log()
    return RoIPredictions(classes, deltas, torch.tensor(masks)[:, None].logit(), heat_maps)


def random_predictions(regions=6):
    shapes = (regions, 4), (regions, 12), (regions // 2, 4, 4), (2 * regions, 3, 3)
    return RoIPredictions(*map(torch.randn, shapes))


def parts_of(predictions):
    """Return the four tensors as leaves that want a gradient."""
    return [part.clone().requires_grad_() for part in vars(predictions).values()]


def test_class_worked_out():
    student, teacher = predictions([[0.5, 0.5]]), predictions([[0.75, 0.25]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert roi_class(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    # Temperature 2 takes the root of the odds, which are 3.
    p = math.sqrt(3) / (1 + math.sqrt(3))
    expected = 4 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))
    assert roi_class(student, teacher, temperature=2.0).item() == pytest.approx(expected, rel=1e-5)
    # A second region on which both agree halves the mean.
    pair = predictions([[0.5, 0.5], [0.9, 0.1]]), predictions([[0.75, 0.25], [0.9, 0.1]])
    assert_close(roi_class(*pair), roi_class(student, teacher) / 2)


def test_class_weights_worked_out():
    student, teacher = predictions([[0.5, 0.5]]), predictions([[0.75, 0.25]])
    # p log(p / q) - p + q of the object class and of the background, at weights 3 : 1 of mean 1.
    parts = 0.75 * math.log(1.5) - 0.25, 0.25 * math.log(0.5) + 0.25
    loss = roi_class(student, teacher, class_weights=[3, 1])
    assert loss.item() == pytest.approx(1.5 * parts[0] + 0.5 * parts[1], rel=1e-5)
    assert_close(roi_class(student, teacher, class_weights=[0.3, 0.1]), loss)
    assert_close(roi_class(student, teacher, 2.0, [7, 7]), roi_class(student, teacher, 2.0))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_equal_predictions_are_the_minimum_whatever_the_class_weights(temperature):
    torch.manual_seed(0)
    teacher, weights = random_predictions(), [0.0, 1.0, 5.0, 0.1]
    (classes, *others) = parts_of(teacher)
    value = roi_class(RoIPredictions(classes, *others), teacher, temperature, weights)
    assert value.item() == 0
    (gradient,) = torch.autograd.grad(value, classes)
    assert not gradient.any()
    assert roi_class(random_predictions(), teacher, temperature, weights) > 0


def test_both_sets_of_regions_by_hand():
    """KL of ((0.5, 0.5), (0.75, 0.25)) in one set of a single region, 0 in the other of two."""
    one = predictions([[0.5, 0.5]]), predictions([[0.75, 0.25]])
    other = [predictions([[0.5, 0.5], [0.9, 0.1]], masks=((0.5,), (0.3,)))] * 2
    joined = [RoIPredictions.cat(parts) for parts in zip(one, other)]
    assert [len(x.classes) for x in joined] == [3, 3]
    assert [len(x.masks) for x in joined] == [3, 3]
    expected = (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 3
    assert roi_class(*joined).item() == pytest.approx(expected, rel=1e-5)
    without = RoIPredictions(one[0].classes, one[0].deltas, None)
    assert RoIPredictions.cat([without, other[0]]).masks is None
    assert RoIPredictions.cat([without]) is without


def test_box_worked_out():
    probabilities = [[0.2, 0.7, 0.1], [0.1, 0.1, 0.8]]  # class 1, and background
    deltas = [[9.0] * 4 + [1.0, -2.0, 0.0, 1.0], [1.0] + [0.0] * 7]
    student = predictions([[0.3, 0.3, 0.4]] * 2, [[0.0] * 8] * 2)
    # 0.7 (1 + 2 + 0 + 1) for the first region, 0.1 x 1 for the second.
    loss = roi_box(student, predictions(probabilities, deltas))
    assert loss.item() == pytest.approx((2.8 + 0.1) / 2, rel=1e-5)
    agnostic = predictions(probabilities, [row[4:] for row in deltas])
    loss = roi_box(predictions(probabilities, [[0.0] * 4] * 2), agnostic)
    assert loss.item() == pytest.approx(2.8 / 2, rel=1e-5)


def test_mask_worked_out():
    teacher = predictions(masks=[[0.75, 0.25]])
    assert roi_mask(predictions(masks=[[0.5, 0.5]]), teacher).item() == pytest.approx(math.log(2))
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert roi_mask(teacher, teacher).item() == pytest.approx(entropy)


def test_keypoint_worked_out():
    """Heat maps of two cells: KL of (0.5, 0.5) against (0.75, 0.25), and of equal ones."""
    student, teacher = predictions(keypoints=[[0.5, 0.5]]), predictions(keypoints=[[0.75, 0.25]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert roi_keypoint(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    same = roi_class(predictions([[0.5, 0.5]]), predictions([[0.75, 0.25]]), temperature=2.0)
    assert_close(roi_keypoint(student, teacher, temperature=2.0), same)
    pair = [predictions(keypoints=[*rows, [0.9, 0.1]]) for rows in ([[0.5] * 2], [[0.75, 0.25]])]
    assert roi_keypoint(*pair).item() == pytest.approx(expected / 2, rel=1e-5)


def test_the_order_of_keypoints_and_a_constant_in_their_logits_do_not_matter():
    torch.manual_seed(0)
    pair = [random_predictions() for _ in range(2)]
    order = torch.randperm(12)
    others = [replace(x, keypoints=x.keypoints[order] + torch.randn(12, 1, 1)) for x in pair]
    assert_close(roi_keypoint(*others, 2.0), roi_keypoint(*pair, 2.0))


@pytest.mark.parametrize("name", ALL)
def test_the_gradient_goes_to_what_is_compared_and_is_0_for_equal_predictions(name):
    torch.manual_seed(0)
    loss, teacher = ROI_LOSS_REGISTRY.get(name), random_predictions()
    parts = parts_of(random_predictions())
    gradients = torch.autograd.grad(loss(RoIPredictions(*parts), teacher), parts, allow_unused=True)
    assert [x is not None and bool(x.any()) for x in gradients] == [name == other for other in ALL]
    parts = parts_of(teacher)
    value = loss(RoIPredictions(*parts), teacher)
    assert value.shape == ()
    if name != "roi_mask":  # which has the teacher's entropy
        assert_close(value, torch.tensor(0.0))
    gradients = torch.autograd.grad(value, parts, allow_unused=True)
    assert all(x is None or x.abs().max() < 1e-7 for x in gradients)


@pytest.mark.parametrize("name", ALL)
def test_without_regions_the_loss_is_0_with_a_graph(name):
    parts = parts_of(random_predictions(0))
    loss = ROI_LOSS_REGISTRY.get(name)(RoIPredictions(*parts), random_predictions(0))
    assert loss.item() == 0
    loss.backward()  # processes whose graphs differ wait for each other for ever
    assert sum(part.grad is not None for part in parts) == 1


@pytest.mark.parametrize("name", ALL)
def test_half_precision_is_compared_in_fp32(name):
    torch.manual_seed(0)
    parts = [[part.half() for part in parts_of(random_predictions())] for _ in range(2)]
    loss = ROI_LOSS_REGISTRY.get(name)(*(RoIPredictions(*half) for half in parts))
    assert loss.dtype == torch.float32 and loss.isfinite()


def test_errors():
    both = random_predictions()
    with pytest.raises(ValueError, match="temperature is 0; it should be above 0"):
        roi_class(both, both, temperature=0)
    with pytest.raises(ValueError, match="class_weights has 3 numbers, not 4"):
        roi_class(both, both, class_weights=[1.0] * 3)
    with pytest.raises(ValueError, match="needs masks of student and teacher"):
        roi_mask(both, RoIPredictions(both.classes, both.deltas, None))
    with pytest.raises(ValueError, match="needs keypoints of student and teacher"):
        roi_keypoint(RoIPredictions(both.classes, both.deltas, None), both)
