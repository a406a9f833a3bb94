"""The multi-resolution teacher: three branches of one net, aligned at any size."""

import numpy as np
import pytest
import torch
from detectors import DETECTORS, reading
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.utils.events import EventStorage
from helpers import build, differing, ground_truth, losses_of, same_predictions
from torch.testing import assert_close

from msad_kd.modeling.capture import answering
from msad_kd.modeling.multi_resolution import BRANCHES, MultiResolutionMixin
from msad_kd.modeling.pyramid import shift_levels
from msad_kd.utils.errors import InputError

FROZEN = ["MODEL.MULTI_RESOLUTION.SEPARATE_STATISTICS", True, "MODEL.RESNETS.NORM", "FrozenBN"]
FINE = ["p2", "p3", "p4", "p5", "p6"]
CORNERS = np.array([[3, 5, 40, 61], [20, 11, 93, 30], [50, 40, 57, 49], [0, 0, 90, 62]])
ODD_SIZES = [[(61, 83)], [(33, 31), (40, 97)], [(64, 64)], [(95, 129), (1, 7)]]


@pytest.fixture
def teacher(config):
    """teacher(KEY, VALUE, ...): a model with the same weights each time."""
    return lambda *opts: build(config("teacher", *opts))


def pairs_of_images(sizes, scale):
    generator = torch.Generator().manual_seed(0)

    def noise(height, width):
        return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)

    return [
        {"image": noise(scale * h, scale * w), "image_lr": noise(h, w), "height": h, "width": w}
        for h, w in sizes
    ]


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("sizes", ODD_SIZES)
def test_levels_of_both_resolutions_have_equal_shapes(teacher, sizes, scale):
    levels = [f"p{s + scale // 2}" for s in range(2, 7)]
    model = teacher("KD.SCALE", scale, *reading("mask_rcnn", levels)).eval()
    seen, pyramids, stock = [], {}, model.pyramids
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-2:]))
    model.pyramids = lambda *args: pyramids.update(stock(*args)) or stock(*args)
    for model.test_branch in ("fused", "hr", "lr"):
        with torch.no_grad():
            model(pairs_of_images(sizes, scale))
    (high, low), (height, width) = seen[:2], map(max, zip(*sizes))
    assert tuple(low) == (-(-height // 32) * 32, -(-width // 32) * 32)  # the student's own padding
    assert tuple(high) == (scale * low[0], scale * low[1])
    shapes = [{name: level.shape for name, level in pyramids[b].items()} for b in BRANCHES]
    assert list(shapes[0]) == levels
    assert shapes[0] == shapes[1] == shapes[2]
    assert shapes[0][levels[0]] == (len(sizes), 16, low[0] // 4, low[1] // 4)


@pytest.mark.parametrize("top_block", ["maxpool", "conv_p5"])
def test_a_whole_pyramid_of_each_branch(teacher, top_block):
    model = teacher("MODEL.FPN.TOP_BLOCK", top_block).eval()
    assert model.strides() == {f"p{s}": 2**s for s in range(3, 8)}
    high, low = torch.randn(1, 3, 64, 64), torch.randn(1, 3, 32, 32)
    found = model.pyramids(high, low, [(64, 64)], BRANCHES)
    assert list(found) == list(BRANCHES)
    features, small = model.backbone(high), model.backbone(low)
    for s in range(3, 8):
        assert torch.equal(found["hr"][f"p{s}"], features[f"p{s}"])
        assert torch.equal(found["lr"][f"p{s}"], small[f"p{s - 1}"])
    assert_close(found["fused"], model.fusion(found["hr"], found["lr"]))


def test_the_level_that_only_the_high_resolution_has_is_not_computed(teacher):
    model = teacher().eval()
    calls = []
    for name in ("fpn_output2", "fpn_output3"):
        convolution = getattr(model.backbone, name)
        convolution.register_forward_hook(lambda _, __, out, name=name: calls.append((name, out)))
    model.pyramids(torch.randn(1, 3, 64, 64), torch.randn(1, 3, 32, 32), [(64, 64)], BRANCHES)
    sides = [(name, out.shape[-1]) for name, out in calls if out is not None]
    assert sorted(sides) == [("fpn_output2", 8), ("fpn_output3", 4), ("fpn_output3", 8)]
    assert set(model.backbone(torch.randn(1, 3, 64, 64))) == {f"p{s}" for s in range(2, 8)}


def test_padding_is_masked_or_not(teacher):
    high, low = torch.randn(1, 3, 64, 128), torch.randn(1, 3, 32, 64)
    found = []
    for masked in (True, False):
        model = teacher("MODEL.MULTI_RESOLUTION.MASK_PADDING", masked).eval()
        with torch.no_grad():
            found.append(model.pyramids(high, low, [(64, 64)], ("fused", "hr", "lr")))
    assert torch.equal(found[0]["hr"]["p3"], found[1]["hr"]["p3"])
    assert not torch.allclose(found[0]["fused"]["p3"], found[1]["fused"]["p3"])
    whole = model.fusion(found[1]["hr"], found[1]["lr"])
    assert torch.equal(found[1]["fused"]["p3"], whole["p3"])


@pytest.mark.parametrize("detector", DETECTORS, indirect=True)
def test_losses_of_three_branches(teacher, config, batch):
    losses = losses_of(teacher(), batch(config("teacher"), "hr"))
    names = {name.rpartition("_")[0] for name in losses}
    assert losses.keys() == {f"{name}_{branch}" for name in names for branch in BRANCHES}
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize(
    ("options", "fused"), [((), 0.4), (("MODEL.MULTI_RESOLUTION.FUSED_WEIGHT", 1.0), 1.0)]
)
def test_images_are_preprocessed_once_and_the_losses_are_the_stock_ones(
    teacher, config, batch, monkeypatch, options, fused
):
    calls, stock = [], GeneralizedRCNN.preprocess_image
    monkeypatch.setattr(
        GeneralizedRCNN, "preprocess_image", lambda *args: calls.append(1) or stock(*args)
    )
    inputs = batch(config("teacher"), "hr")
    losses = losses_of(teacher(*options), inputs)
    assert len(calls) == 1
    model = teacher().train()
    images = model.preprocess_image(inputs)
    low = model.low_resolution_batch(inputs, images.tensor)
    pyramids = model.pyramids(images.tensor, low, images.image_sizes, BRANCHES)
    torch.manual_seed(1)
    for branch, pyramid in pyramids.items():
        with EventStorage(), answering(model.backbone, pyramid):
            expected = GeneralizedRCNN.forward(model, inputs)  # it preprocesses them again
        weight = fused if branch == "fused" else 1.0
        for name, loss in expected.items():
            assert torch.equal(losses[f"{name}_{branch}"], weight * loss)
    calls.clear()
    model.eval()(batch(config("teacher"), "hr", is_train=False))
    assert len(calls) == 1


def test_only_the_fused_loss_trains_the_fusion(teacher, config, batch):
    for fused in (True, False):
        model = teacher()
        losses = losses_of(model, batch(config("teacher"), "hr"))
        sum(x for name, x in losses.items() if name.endswith("_fused") == fused).backward()
        for layer in (model.fusion.squeeze, model.fusion.excite):
            assert bool(layer.weight.grad is not None and layer.weight.grad.any()) == fused
        assert model.backbone.bottom_up.stem.conv1.weight.grad.any()


def test_each_branch_predicts_in_its_own_way(teacher, config, batch):
    inputs = batch(config("teacher"), "hr", count=3, is_train=False)
    found = {}
    for branch in BRANCHES:
        model = teacher("MODEL.MULTI_RESOLUTION.TEST_BRANCH", branch).eval()
        with torch.no_grad():
            found[branch] = [x["instances"] for x in model(inputs)]
        assert len(found[branch]) == 3 and all(len(x) for x in found[branch])
    for one, other in (("hr", "lr"), ("hr", "fused"), ("lr", "fused")):
        assert not torch.equal(found[one][0].scores, found[other][0].scores)


def test_the_hr_branch_needs_no_low_resolution(teacher, config, batch):
    cfg = config("teacher")
    model = teacher("MODEL.MULTI_RESOLUTION.TEST_BRANCH", "hr").eval()
    with torch.no_grad():
        expected = model(batch(cfg, "hr", is_train=False))
        (first, _) = inputs = batch(cfg, None, is_train=False)
        assert "image_lr" not in first
        assert same_predictions(model(inputs), expected)


@pytest.mark.parametrize("detector", DETECTORS, indirect=True)
def test_the_lr_branch_is_the_low_resolution_detector(teacher, config, batch):
    model = teacher("MODEL.MULTI_RESOLUTION.TEST_BRANCH", "lr").eval()
    stock = build_model(config("lr")).eval()
    missing = stock.load_state_dict(model.state_dict(), strict=False)
    assert not missing.missing_keys
    assert set(missing.unexpected_keys) == {"fusion.squeeze.weight", "fusion.excite.weight"}
    with torch.no_grad():
        found = model(batch(config("teacher"), "hr", count=3, is_train=False))
        expected = stock(batch(config("lr"), None, count=3, is_train=False))
    assert same_predictions(found, expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["MODEL.MULTI_RESOLUTION.TEST_BRANCH", "both"], "TEST_BRANCH is 'both'.*hr.*lr.*fused"),
        (FROZEN, "SEPARATE_STATISTICS is True, but no normalisation"),
        # p2 of the high resolution has no partner: the low resolution would need a p1.
        (["MODEL.RPN.IN_FEATURES", FINE], "RPN reads p2, but .* p3, p4, p5, p6, p7"),
        (
            [
                *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"),
                *("MODEL.RPN.IN_FEATURES", ["p3", "p4", "p5", "p6"]),
                *("MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [32], [64]]),
            ],
            "pads images for one resolution; use one of the backbones build_aligned_",
        ),
    ],
)
def test_teachers_that_cannot_be_built(teacher, options, words):
    with pytest.raises(InputError, match=words):
        teacher(*options)


def test_images_that_do_not_belong_together_are_refused(teacher, config, batch):
    inputs = batch(config("teacher"), "hr")
    inputs[1]["image_lr"] = inputs[1]["image_lr"][..., :-1]
    with pytest.raises(InputError, match=r"\(64, 96\) px should have \(64, 94\)"):
        losses_of(teacher(), inputs)
    with pytest.raises(InputError, match="'image_lr'.*TwoResolutionMapper"):
        losses_of(teacher(), batch(config("teacher"), None))


def run(model, pyramid, factor, train):
    """Run the stock part of a detector, given the features, on images of 64 x 96 px x factor."""
    stock = super(MultiResolutionMixin, model).forward if factor > 1 else model.forward
    inputs = []
    for corners in (factor * CORNERS, factor * CORNERS[1:]):
        size = (64 * factor, 96 * factor)
        inputs.append({"image": torch.zeros(3, *size), "instances": ground_truth(size, corners)})
    torch.manual_seed(1)
    with EventStorage(), answering(model.train(train).backbone, pyramid):
        return stock(inputs)


@pytest.mark.parametrize("detector", DETECTORS, indirect=True)
@pytest.mark.parametrize("scale", [2, 4])
def test_heads_in_high_resolution_pixels_do_to_scaled_boxes_what_the_stock_heads_do(
    scale, detector, config
):
    shift = scale.bit_length() - 1
    levels = [f"p{s + shift}" for s in range(2, 7)]
    low = config("lr")
    high = config("teacher", "KD.SCALE", scale, *reading(detector, levels))
    sizes = [[scale * side for side in level] for level in low.MODEL.ANCHOR_GENERATOR.SIZES]
    high.MODEL.ANCHOR_GENERATOR.SIZES = sizes
    low, high = build(low), build(high)
    with torch.no_grad():
        for parameter in low.parameters():
            if parameter.dim() > 1:  # so that predictions differ from each other
                parameter.normal_(std=0.1)
    missing = high.load_state_dict(low.state_dict(), strict=False).missing_keys
    assert all(key.startswith("fusion.") for key in missing)
    pyramid = {f"p{s}": torch.randn(2, 16, 64 >> s, 96 >> s) for s in range(2, 6)}
    pyramid["p6"] = torch.randn(2, 16, 1, 2)
    expected = run(low, pyramid, 1, True)
    found = run(high, shift_levels(pyramid, shift), scale, True)
    assert differing(found, expected) == []
    assert all(loss > 0 for loss in expected.values())
    with torch.no_grad():
        expected = run(low, pyramid, 1, False)
        found = run(high, shift_levels(pyramid, shift), scale, False)
    for one, other in zip(expected, found, strict=True):
        one, other = one["instances"], other["instances"]
        assert len(one) > 5
        assert torch.equal(scale * one.pred_boxes.tensor, other.pred_boxes.tensor)
        assert torch.equal(one.scores, other.scores)
        assert torch.equal(one.pred_classes, other.pred_classes)
