"""The teachers' backbone: the stock FPN's parameters, more levels, coarser padding."""

import pytest
import torch
from detectron2.modeling import build_backbone
from helpers import differing, tensors_of


def build(config, scale, name="build_aligned_resnet_fpn_backbone"):
    torch.manual_seed(0)
    return build_backbone(config("teacher", "KD.SCALE", scale, "MODEL.BACKBONE.NAME", name)).eval()


def test_parameters_are_the_stock_fpns(config):
    stock = build(config, 2, "build_resnet_fpn_backbone")
    aligned = build(config, 2)
    assert differing(tensors_of(stock), tensors_of(aligned)) == []
    image = torch.randn(1, 3, 64, 128)
    expected, found = stock(image), aligned(image)
    assert expected.keys() == found.keys() - {"p7"}
    assert all(torch.equal(expected[level], found[level]) for level in expected)


@pytest.mark.parametrize(("scale", "last"), [(1, 6), (2, 7), (4, 8)])
def test_levels_strides_and_padding(config, scale, last):
    backbone = build(config, scale)
    strides = {name: shape.stride for name, shape in backbone.output_shape().items()}
    assert strides == {f"p{s}": 2**s for s in range(2, last + 1)}
    assert backbone.size_divisibility == 32 * scale
    side = 64 * scale
    features = backbone(torch.zeros(1, 3, side, side))
    sides = {name: feature.shape[-1] for name, feature in features.items()}
    assert sides == {name: -(-side // stride) for name, stride in strides.items()}
