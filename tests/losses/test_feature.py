"""The feature losses: worked-out values, and what they are blind to."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from msad_kd.losses.feature import DISTILL_LOSS_REGISTRY, cwd, generator, l1, mgd, mse, pkd, ssim
from msad_kd.losses.ssim import functional as operator

ALL = sorted(name for name, _ in DISTILL_LOSS_REGISTRY)


def call(name, student, teacher):
    """A loss by its name, with parts that change nothing and nothing masked, if it takes any."""
    loss = DISTILL_LOSS_REGISTRY.get(name)
    if hasattr(loss, "parts"):
        return loss(student, teacher, nn.Identity(), mask_ratio=0.0)
    return loss(student, teacher)


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)


def test_names():
    assert set(ALL) == {"l1", "mse", "ssim", "pkd", "cwd", "mgd"}


def test_l1_and_mse_worked_out():
    student = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[None, None]
    teacher = torch.tensor([[1.0, 4.0], [0.0, 3.0]])[None, None]
    assert l1(student, teacher).item() == 1.5  # (0 + 2 + 3 + 1) / 4
    assert mse(student, teacher).item() == 3.5  # (0 + 4 + 9 + 1) / 4


@pytest.mark.parametrize("name", ALL)
def test_equal_maps_cost_nothing(name, maps):
    loss = call(name, maps[0], maps[0].clone())
    assert_close(loss, torch.tensor(0.0))


@pytest.mark.parametrize("name", ALL)
def test_scalar_whose_gradient_goes_to_the_student(name, maps):
    student = maps[0].requires_grad_()
    loss = call(name, student, maps[1])
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


def test_cwd_worked_out():
    # Two cells a channel: the softmax of (log 3, 0) is (3/4, 1/4), that of (0, 0) is (1/2, 1/2).
    log3 = float(np.log(3.0))
    student = torch.tensor([[[[0.0, 0.0]], [[0.0, 0.0]]]])
    teacher = torch.tensor([[[[log3, 0.0]], [[0.0, 0.0]]]])
    expected = 0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5)
    assert cwd(student, teacher).item() == pytest.approx(expected / 2, rel=1e-5)
    # At tau = 2 twice the map is that map again, and the loss is 4 times as large.
    assert cwd(student, 2 * teacher, tau=2.0).item() == pytest.approx(4 * expected / 2, rel=1e-5)


def test_cwd_is_blind_to_an_offset_of_a_channel(maps):
    offset = torch.tensor([-4.0, 0.0, 7.0])[:, None, None]
    assert_close(cwd(maps[0] + offset, maps[1]), cwd(*maps))


def test_mgd_is_the_sum_of_squares_by_image():
    student, teacher = torch.full((2, 3, 4, 5), 2.0), torch.full((2, 3, 4, 5), 5.0)
    loss = mgd(student, teacher, nn.Identity(), mask_ratio=0.0)
    assert loss.item() == 3 * 4 * 5 * 9.0


def test_mgd_masks_cells_in_all_channels_alike():
    seen = []

    def spy(x):
        seen.append(x)
        return x

    torch.manual_seed(0)
    mgd(torch.ones(2, 3, 64, 64), torch.zeros(2, 3, 64, 64), spy, mask_ratio=0.65)
    (masked,) = seen
    assert set(masked.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(masked, masked[:, :1].expand_as(masked))
    assert masked.mean().item() == pytest.approx(0.35, abs=0.02)
    assert not torch.equal(masked[0], masked[1])


def test_mgds_generator_keeps_the_shape():
    block = generator(4)
    assert block(torch.randn(2, 4, 5, 6)).shape == (2, 4, 5, 6)
    assert sum(p.numel() for p in block.parameters()) == 2 * (4 * 4 * 9 + 4)


def test_ssim_is_half_of_what_is_missing_to_1(maps):
    student, teacher = maps[0].sigmoid(), maps[1].sigmoid()
    expected = (1 - operator.ssim(student, teacher)) / 2
    assert_close(ssim(student, teacher, rescale="none"), expected)


def test_ssim_rescales_each_channel_of_each_image(maps):
    student, teacher = maps
    scale = torch.tensor([0.5, 3.0, 20.0])[:, None, None]
    offset = torch.tensor([-4.0, 0.0, 7.0])[:, None, None]
    expected = ssim(student, teacher)
    assert_close(ssim(student * scale + offset, teacher), expected, rtol=1e-4, atol=0)
    whole = [ssim(x, teacher, rescale="image") for x in (student, student * scale)]
    assert abs(whole[0] - whole[1]) > 1e-3


def test_ssims_components(maps):
    student, teacher = (x.sigmoid() for x in maps)
    kinds = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]]
    luminance, contrast, structure, product = (
        1 - 2 * ssim(student, teacher, rescale="none", exponents=kind) for kind in kinds
    )
    assert product < min(luminance, contrast) and structure < luminance
    with pytest.raises(ValueError, match="exponents"):
        ssim(student, teacher, exponents=[1, 1])


def test_ssim_tells_how_much_it_does_not_see():
    flat = torch.full((1, 2, 8, 8), 0.5)
    flat[..., 0, 0], flat[..., 0, 1] = 0.0, 1.0  # so that rescaling changes nothing
    measure = ssim.measures["blind_share"]
    torch.manual_seed(0)
    noisy = torch.rand(1, 2, 8, 8)
    assert 0 < measure(flat, flat, window_size=3, exponents=[1, 1, 0]) < 1
    assert measure(noisy, noisy) == 0


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
    student, teacher = maps
    expected = call(name, student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        found = call(name, student.bfloat16(), teacher.bfloat16())
    assert found.dtype == torch.float32
    assert_close(found, expected, rtol=0.03, atol=0.01)


@pytest.mark.parametrize(("name", "field"), [("mgd", "mask_ratio"), ("cwd", "tau")])
def test_fields_out_of_range(name, field, maps):
    parts = [nn.Identity()] if name == "mgd" else []
    for value in (-1, {"mask_ratio": 65, "tau": 0}[field]):
        with pytest.raises(ValueError, match=f"{field} is {value}; it has to be"):
            DISTILL_LOSS_REGISTRY.get(name)(*maps, *parts, **{field: value})
