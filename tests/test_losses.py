"""The feature losses: worked-out values, and what they are blind to."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from msad_kd.losses import DISTILL_LOSS_REGISTRY, l1, mse, pkd

ALL = sorted(name for name, _ in DISTILL_LOSS_REGISTRY)


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)


def test_names():
    assert {"l1", "mse", "pkd"} <= set(ALL)


def test_l1_and_mse_worked_out():
    student = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[None, None]
    teacher = torch.tensor([[1.0, 4.0], [0.0, 3.0]])[None, None]
    assert l1(student, teacher).item() == 1.5  # (0 + 2 + 3 + 1) / 4
    assert mse(student, teacher).item() == 3.5  # (0 + 4 + 9 + 1) / 4


@pytest.mark.parametrize("name", ALL)
def test_equal_maps_cost_nothing(name, maps):
    loss = DISTILL_LOSS_REGISTRY.get(name)(maps[0], maps[0].clone())
    assert_close(loss, torch.tensor(0.0))


@pytest.mark.parametrize("name", ALL)
def test_scalar_whose_gradient_goes_to_the_student(name, maps):
    student = maps[0].requires_grad_()
    loss = DISTILL_LOSS_REGISTRY.get(name)(student, maps[1])
    assert loss.shape == () and loss > 0
    loss.backward()
    assert student.grad.isfinite().all() and student.grad.abs().sum() > 0


def test_pkd_is_one_minus_pearson_of_each_channel(maps):
    student, teacher = maps
    expected = np.mean(
        [
            1 - np.corrcoef(student[:, c].flatten(), teacher[:, c].flatten())[0, 1]
            for c in range(student.shape[1])
        ]
    )
    assert_close(pkd(student, teacher).item(), float(expected), rtol=1e-5, atol=0)


def test_pkd_is_blind_to_scale_and_offset_of_a_channel(maps):
    student, teacher = maps
    scale = torch.tensor([0.5, 3.0, 20.0])[:, None, None]
    offset = torch.tensor([-4.0, 0.0, 7.0])[:, None, None]
    expected = pkd(student, teacher)
    assert_close(pkd(student * scale + offset, teacher), expected, rtol=1e-4, atol=0)
    assert_close(pkd(student, teacher * scale + offset), expected, rtol=1e-4, atol=0)
    assert_close(pkd(student * scale + offset, student), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_pkd_of_opposite_maps_is_two(maps):
    assert_close(pkd(maps[0], -maps[0]), torch.tensor(2.0))


def test_pkd_looks_at_the_whole_batch_not_at_one_image():
    # Each image alone is constant; only from one to the other do they vary alike.
    student = torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 1, 3, 3)
    assert_close(pkd(student, 5 * student), torch.tensor(0.0))


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 3, 1, 1)])
def test_pkd_of_constant_channels_is_finite(shape):
    student = torch.full(shape, 2.0, requires_grad=True)
    torch.manual_seed(0)
    loss = pkd(student, torch.rand(shape))
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


def test_pkd_computes_in_fp32(maps):
    student, teacher = (x.half() for x in maps)
    offset = 500.0  # in fp16 the variance about this mean would be lost
    assert pkd(student + offset, teacher).dtype == torch.float32
    assert_close(pkd(student, teacher), pkd(student.float(), teacher.float()))
