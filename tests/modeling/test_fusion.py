"""Crossing feature-level fusion: worked-out numbers, per image, blind to padding."""

import math

import pytest
import torch
from torch.testing import assert_close

from msad_kd import CrossingFeatureFusion
from msad_kd.modeling.fusion import masked_mean
from msad_kd.utils.errors import InputError


def random_pyramid(images=2, channels=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"p{s}": torch.randn(images, channels, 64 >> s, 96 >> s, generator=generator)
        for s in (3, 4, 5)
    }


def test_worked_out():
    """C = 1: squeeze passes both means on, excite gives the first ln 3 and the second nothing."""
    fusion = CrossingFeatureFusion(1, reduction=1)
    with torch.no_grad():
        fusion.squeeze.weight.copy_(torch.eye(2))
        fusion.excite.weight.copy_(torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]]))
    # The means are 1 and 2, the logits ln 3 and 0, the weights 3/4 and 1/4.
    hr = torch.tensor([[[[0.0, 2.0], [1.0, 1.0]]]], requires_grad=True)
    lr = torch.tensor([[[[2.0, 2.0], [0.0, 4.0]]]], requires_grad=True)
    expected = torch.tensor([[0.5, 2.0], [0.75, 1.75]])[None, None]
    fused = fusion({"p3": hr}, {"p3": lr})["p3"]
    assert_close(fused, expected)
    tensors = (hr, lr, *fusion.parameters())
    assert all(x.any() for x in torch.autograd.grad(fused.square().sum(), tensors))
    # Not 1/4 and 3/4: the high resolution comes first. The ReLU cuts a negative mean.
    for hr, lr in ((0.0, 1.0), (-5.0, 3.0)):
        constant = (torch.full((1, 1, 2, 2), mean) for mean in (hr, lr))
        assert_close(fusion.weights(*constant), torch.tensor([[0.5, 0.5]]))


def test_each_image_and_level_has_its_own_weights():
    fusion = CrossingFeatureFusion(8, reduction=2)
    hr, lr = random_pyramid(seed=0), random_pyramid(seed=1)
    weights = fusion.weights(10 * hr["p3"], 10 * lr["p3"])
    assert weights.shape == (2, 2) and (weights >= 0).all()
    assert_close(weights.sum(dim=1), torch.ones(2))
    assert not torch.allclose(weights[0], weights[1])
    together = fusion(hr, lr)
    assert together.keys() == hr.keys()
    for level in hr:
        assert torch.equal(together[level], fusion({"x": hr[level]}, {"x": lr[level]})["x"])
        for i in range(2):
            alone = fusion(*({level: p[level][i : i + 1]} for p in (hr, lr)))
            assert_close(together[level][i : i + 1], alone[level])


def test_parameters_and_initialisation_of_the_paper():
    fusion = CrossingFeatureFusion(256)
    shapes = {name: tuple(p.shape) for name, p in fusion.named_parameters()}
    assert shapes == {"squeeze.weight": (32, 512), "excite.weight": (2, 32)}
    bound = math.sqrt(3 / 512)  # Kaiming-uniform with a = 1: the variance is 1 / fan-in
    assert 0.99 * bound < fusion.squeeze.weight.abs().max() <= bound


def test_masked_mean():
    x = torch.tensor([[1.0, 2.0], [3.0, 100.0]])[None, None]
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])[None, None]
    assert masked_mean(x, mask).tolist() == [[2.0]]
    assert masked_mean(x).tolist() == [[26.5]]
    assert masked_mean(x, torch.zeros_like(mask)).tolist() == [[0.0]]
    large = torch.full((1, 1, 200, 336), 2.0, dtype=torch.float16)  # its sum is beyond fp16
    mean = masked_mean(large, torch.ones_like(large))
    assert mean.dtype == large.dtype and mean.tolist() == [[2.0]]


def test_padding_does_not_change_the_weights():
    fusion = CrossingFeatureFusion(8, reduction=2)
    hr, lr = random_pyramid(seed=0), random_pyramid(seed=1)
    for name, level in hr.items():
        rows, columns = level.shape[-2:]
        mask = torch.zeros(2, 1, 20, 30)
        mask[..., :rows, :columns] = 1
        high, low = torch.full((2, 2, 8, 20, 30), 50.0)
        high[..., :rows, :columns], low[..., :rows, :columns] = level, lr[name]
        expected = fusion.weights(level, lr[name])
        assert_close(fusion.weights(high, low, mask), expected)
        assert not torch.allclose(fusion.weights(high, low), expected)
        fused = fusion({name: high}, {name: low}, {name: mask})[name]
        assert_close(fused[..., :rows, :columns], fusion(hr, lr)[name])


def test_unequal_levels_are_named():
    fusion, level = CrossingFeatureFusion(4), torch.zeros(1, 4, 2, 2)
    with pytest.raises(InputError, match=r"\['p3'\].*\['p4'\]"):
        fusion({"p3": level}, {"p4": level})
    with pytest.raises(InputError, match=r"p3.*\(1, 4, 2, 2\).*\(1, 4, 2, 3\)"):
        fusion({"p3": level}, {"p3": torch.zeros(1, 4, 2, 3)})
