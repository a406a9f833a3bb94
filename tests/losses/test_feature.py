"""The losses between feature maps: worked-out values and invariances."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from msad_kd.losses import DISTILL_LOSS_REGISTRY
from msad_kd.losses import ssim as operator
from msad_kd.losses.feature import cwd, generator, l1, mgd, mse, pkd, ssim

ALL = ("l1", "mse", "ssim", "pkd", "cwd", "mgd")
SCALE = torch.tensor([0.5, 3.0, 20.0])[:, None, None]  # of three channels
OFFSET = torch.tensor([-4.0, 0.0, 7.0])[:, None, None]


def call(name, student, teacher):
    """Call a loss by name; a loss with parts has an identity for them and masks nothing."""
    loss = DISTILL_LOSS_REGISTRY.get(name)
    if hasattr(loss, "parts"):
        return loss(student, teacher, nn.Identity(), mask_ratio=0.0)
    return loss(student, teacher)


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)


def test_l1_and_mse_worked_out():
    student, teacher = (torch.tensor(x).view(1, 1, 2, 2) for x in ([1.0, 2, 3, 4], [1.0, 4, 0, 3]))
    assert l1(student, teacher).item() == 1.5  # (0 + 2 + 3 + 1) / 4
    assert mse(student, teacher).item() == 3.5  # (0 + 4 + 9 + 1) / 4


@pytest.mark.parametrize("name", ALL)
def test_equal_maps_cost_nothing_and_others_pull_the_student(name, maps):
    assert_close(call(name, maps[0], maps[0].clone()), torch.tensor(0.0))
    student = maps[0].requires_grad_()
    loss = call(name, student, maps[1])
    assert loss.shape == () and loss > 0
    loss.backward()
    assert student.grad.isfinite().all() and student.grad.abs().sum() > 0


def test_pkd_is_one_minus_pearson_of_each_channel(maps):
    student, teacher = maps
    channels = zip(*(x.transpose(0, 1).flatten(1) for x in maps))
    correlations = [np.corrcoef(s, t)[0, 1] for s, t in channels]
    assert_close(pkd(student, teacher).item(), 1 - np.mean(correlations), rtol=1e-5, atol=0)
    assert_close(pkd(student, -student), torch.tensor(2.0))
    # It is blind to scale and offset of a channel.
    expected = pkd(student, teacher)
    assert_close(pkd(student * SCALE + OFFSET, teacher), expected, rtol=1e-4, atol=0)
    assert_close(pkd(student, teacher * SCALE + OFFSET), expected, rtol=1e-4, atol=0)
    assert_close(pkd(student * SCALE + OFFSET, student), torch.tensor(0.0), atol=1e-6, rtol=0)
    # Over the batch, not per image: here each image is constant, and only the batch varies.
    student = torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 1, 3, 3)
    assert_close(pkd(student, 5 * student), torch.tensor(0.0))


def test_pkd_of_constant_channels_and_in_fp16(maps):
    student = torch.full((2, 3, 4, 5), 2.0, requires_grad=True)
    loss = pkd(student, maps[1])
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()
    halves = [x.half() for x in maps]  # fp16 would lose the variance
    assert_close(pkd(*halves), pkd(*(x.float() for x in halves)))


def test_cwd_worked_out(maps):
    # Two cells a channel: the softmax of (log 3, 0) is (3/4, 1/4), that of (0, 0) is (1/2, 1/2).
    student = torch.tensor([[[[0.0, 0.0]], [[0.0, 0.0]]]])
    teacher = torch.tensor([[[[float(np.log(3.0)), 0.0]], [[0.0, 0.0]]]])
    expected = 0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5)
    assert cwd(student, teacher).item() == pytest.approx(expected / 2, rel=1e-5)
    # tau = 2 halves twice the map, and the loss is 4 times as large.
    assert cwd(student, 2 * teacher, tau=2.0).item() == pytest.approx(4 * expected / 2, rel=1e-5)
    assert_close(cwd(maps[0] + OFFSET, maps[1]), cwd(*maps))  # blind to an offset of a channel


def test_mgd_masks_cells_in_all_channels_and_sums_the_squares_of_an_image():
    student, teacher = torch.full((2, 3, 4, 5), 2.0), torch.full((2, 3, 4, 5), 5.0)
    loss = mgd(student, teacher, nn.Identity(), mask_ratio=0.0)
    assert loss.item() == 3 * 4 * 5 * 9.0
    torch.manual_seed(0)
    inputs = []
    maps = torch.ones(2, 3, 64, 64), torch.zeros(2, 3, 64, 64)
    mgd(*maps, lambda x: inputs.append(x) or x, mask_ratio=0.65)
    (masked,) = inputs
    assert set(masked.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(masked, masked[:, :1].expand_as(masked))
    assert masked.mean().item() == pytest.approx(0.35, abs=0.02)
    assert not torch.equal(masked[0], masked[1])

    block = generator(4)
    assert block(torch.randn(2, 4, 5, 6)).shape == (2, 4, 5, 6)
    assert sum(p.numel() for p in block.parameters()) == 2 * (4 * 4 * 9 + 4)


def test_ssim_is_the_operators_loss_of_maps_rescaled_per_channel_and_image(maps):
    student, teacher = maps
    small = [x.sigmoid() for x in maps]
    assert_close(ssim(*small, rescale="none"), (1 - operator.ssim(*small)) / 2)
    assert_close(ssim(student * SCALE + OFFSET, teacher), ssim(*maps), rtol=1e-4, atol=0)
    per_image = [ssim(x, teacher, rescale="image") for x in (student, student * SCALE)]
    assert abs(per_image[0] - per_image[1]) > 1e-3
    exponents = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]]
    luminance, contrast, structure, product = (
        1 - 2 * ssim(*small, rescale="none", exponents=e) for e in exponents
    )
    assert product < min(luminance, contrast) and structure < luminance


def test_ssim_measures_the_share_of_flat_windows(maps):
    flat = torch.full((1, 2, 8, 8), 0.5)
    flat[..., 0, 0], flat[..., 0, 1] = 0.0, 1.0  # so that rescaling changes nothing
    measure = ssim.measures["blind_share"]
    assert 0 < measure(flat, flat, window_size=3, exponents=[1, 1, 0]) < 1
    assert measure(*maps) == 0


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 2), (13, 21)])
def test_any_map_size(name, shape):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, *shape, requires_grad=True), torch.randn(2, 3, *shape)
    loss = call(name, student, teacher)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_half_precision(name, maps):
    expected = call(name, *maps)
    with torch.autocast("cpu", torch.bfloat16):
        loss = call(name, *(x.bfloat16() for x in maps))
    assert loss.dtype == torch.float32
    assert_close(loss, expected, rtol=0.03, atol=0.01)


@pytest.mark.parametrize(("name", "field"), [("mgd", "mask_ratio"), ("cwd", "tau")])
def test_fields_out_of_range(name, field, maps):
    parts = [nn.Identity()] if name == "mgd" else []
    for value in (-1, {"mask_ratio": 65, "tau": 0}[field]):
        with pytest.raises(ValueError, match=f"{field} is {value}; it has to be"):
            DISTILL_LOSS_REGISTRY.get(name)(*maps, *parts, **{field: value})
