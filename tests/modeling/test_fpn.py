"""FPNs have the stock parameters; a teacher's have more levels and pad more."""

from collections import Counter

import pytest
import torch
from detectron2.modeling import build_backbone, build_model
from detectron2.utils.events import EventStorage
from helpers import differing, tensors_of

from msad_kd import init_from_teacher
from msad_kd.utils.errors import InputError

FIVE, ALIGNED = (f"build_{kind}_resnet_fpn_backbone" for kind in ("five_level", "aligned"))
FROM_RES3 = [
    *("MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]),
    *("MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"]),
]


def five_levels(config, *opts, name=FIVE):
    torch.manual_seed(0)
    return build_backbone(config("lr", "MODEL.BACKBONE.NAME", name, *opts)).eval()


@pytest.mark.parametrize(("scale", "last"), [(1, 6), (2, 7), (4, 8)])
def test_levels_strides_and_padding(config, scale, last):
    backbone = five_levels(config, "KD.SCALE", scale, name=ALIGNED)
    strides = {name: shape.stride for name, shape in backbone.output_shape().items()}
    assert strides == {f"p{s}": 2**s for s in range(2, last + 1)}
    assert backbone.size_divisibility == 32 * scale
    side = 64 * scale
    features = backbone(torch.zeros(1, 3, side, side))
    sides = {name: feature.shape[-1] for name, feature in features.items()}
    assert sides == {name: -(-side // stride) for name, stride in strides.items()}


@pytest.mark.parametrize(
    ("name", "more", "depth"),
    [(ALIGNED, {"p7"}, 50), *((FIVE, set(), depth) for depth in (18, 34, 50, 101))],
)
def test_levels_are_the_stock_r_cnns(config, name, more, depth):
    opts = ["MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
    stock = five_levels(config, *opts, name="build_resnet_fpn_backbone")
    mine = five_levels(config, *opts, name=name)
    assert differing(tensors_of(stock), tensors_of(mine)) == []
    image = torch.randn(1, 3, 64, 128)
    expected, found = stock(image), mine(image)
    assert found.keys() - expected.keys() == more
    assert all(torch.equal(expected[level], found[level]) for level in expected)


def test_five_levels_are_the_stock_retinanets(config):
    stock = five_levels(config, *FROM_RES3, name="build_retinanet_resnet_fpn_backbone")
    mine = five_levels(config, *FROM_RES3, "MODEL.FPN.TOP_BLOCK", "conv_res5")
    mine.load_state_dict(stock.state_dict())
    image = torch.randn(1, 3, 64, 128)
    levels = mine(image)
    assert list(levels) == ["p3", "p4", "p5", "p6", "p7"]
    assert differing(stock(image), levels) == []


def test_normalised_levels_are_on_the_scale_of_the_others(config):
    backbone = five_levels(config, "MODEL.FPN.TOP_BLOCK", "conv_p5", "MODEL.FPN.NORM", "BN")
    levels = backbone.train()(torch.randn(8, 3, 128, 128))
    assert torch.equal(levels["p6"], backbone.top_block.p6(levels["p5"]))
    for name, level in levels.items():
        assert level.std().item() == pytest.approx(1.0, abs=0.01), name


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("kind", ["conv_p5", "conv_res5"])
def test_a_student_has_no_convolution_that_only_its_teacher_reads(config, batch, kind, scale):
    levels = [f"p{s + scale // 2}" for s in range(2, 7)]
    opts = ["MODEL.FPN.TOP_BLOCK", kind, "MODEL.FPN.NORM", "BN", "KD.SCALE", scale]
    heads = ["MODEL.RPN.IN_FEATURES", levels, "MODEL.ROI_HEADS.IN_FEATURES", levels[:-1]]
    teacher = build_model(config("teacher", *opts, *heads))
    student = build_model(config("lr", *opts, "MODEL.BACKBONE.NAME", FIVE))
    only = {k.split(".")[2] for k in teacher.state_dict().keys() - student.state_dict().keys()}
    assert only - {"weight"} == {f"p{s}" for s in range(7, 7 + scale // 2)}
    assert init_from_teacher(student, teacher) == []
    calls = Counter()
    for name, convolution in teacher.backbone.top_block.named_children():
        convolution.register_forward_hook(
            lambda _, __, out, name=name: calls.update([name] if out is not None else [])
        )
    with EventStorage():
        sum(teacher(batch(config("teacher", "KD.SCALE", scale), "hr")).values()).backward()
    # Once for each resolution that has a partner at the other.
    assert calls == {"p6": 2, **{f"p{s}": 1 for s in range(7, 7 + scale // 2)}}
    assert [n for n, p in teacher.named_parameters() if p.requires_grad and p.grad is None] == []


def test_an_unknown_kind_of_level(config):
    with pytest.raises(InputError, match="TOP_BLOCK is 'convolution'; use maxpool, conv_p5"):
        five_levels(config, "MODEL.FPN.TOP_BLOCK", "convolution")
