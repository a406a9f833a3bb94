"""The multi-resolution teacher: three branches of one net, aligned at any size."""

import math

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.proposal_generator import build_proposal_generator
from detectron2.modeling.roi_heads import build_roi_heads
from detectron2.structures import Boxes, ImageList, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from helpers import build, losses_of, same_instances
from torch.testing import assert_close

from msad_kd.modeling.multi_resolution import BRANCHES
from msad_kd.modeling.pyramid import shift_levels
from msad_kd.utils.errors import InputError

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
    shift = int(math.log2(scale))
    levels = [f"p{s + shift}" for s in range(2, 7)]
    model = teacher(
        *("KD.SCALE", scale, "MODEL.RPN.IN_FEATURES", levels),
        *("MODEL.ROI_HEADS.IN_FEATURES", levels[:-1]),
    ).eval()
    seen, pyramids, stock = [], {}, model.pyramids
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-2:]))
    model.pyramids = lambda *args: pyramids.update(stock(*args)) or stock(*args)
    with torch.no_grad():
        model(pairs_of_images(sizes, scale))
        model.test_branch = "hr"
        model(pairs_of_images(sizes, scale))
        model.test_branch = "lr"
        model(pairs_of_images(sizes, scale))
    (high, low), (height, width) = seen[:2], map(max, zip(*sizes))
    assert tuple(low) == (-(-height // 32) * 32, -(-width // 32) * 32)  # the student's own padding
    assert tuple(high) == (scale * low[0], scale * low[1])
    shapes = [{name: level.shape for name, level in pyramids[b].items()} for b in BRANCHES]
    assert list(shapes[0]) == levels
    assert shapes[0] == shapes[1] == shapes[2]
    assert shapes[0][levels[0]] == (len(sizes), 16, low[0] // 4, low[1] // 4)


def test_a_whole_pyramid_of_each_branch(teacher):
    model = teacher().eval()
    assert model.strides() == {f"p{s}": 2**s for s in range(3, 8)}
    high, low = torch.randn(1, 3, 64, 64), torch.randn(1, 3, 32, 32)
    found = model.pyramids(high, low, [(64, 64)], BRANCHES)
    assert list(found) == list(BRANCHES)
    features, small = model.backbone(high), model.backbone(low)
    for s in range(3, 8):
        assert torch.equal(found["hr"][f"p{s}"], features[f"p{s}"])
        assert torch.equal(found["lr"][f"p{s}"], small[f"p{s - 1}"])
    expected = model.fusion(found["hr"], found["lr"])
    assert_close(found["fused"], expected)


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


def test_losses_of_three_branches(teacher, config, batch):
    losses = losses_of(teacher(), batch(config("teacher"), "hr"))
    names = ("loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask")
    assert losses.keys() == {f"{name}_{branch}" for name in names for branch in BRANCHES}
    assert all(loss.isfinite() for loss in losses.values())


def test_the_fused_losses_count_0_4(teacher, config, batch):
    inputs = batch(config("teacher"), "hr")
    default = losses_of(teacher(), inputs)
    alone = losses_of(teacher("MODEL.MULTI_RESOLUTION.FUSED_WEIGHT", 1.0), inputs)
    for name, loss in default.items():
        assert loss.item() == ((0.4 if name.endswith("_fused") else 1.0) * alone[name]).item()


def test_the_fused_loss_trains_backbone_and_fusion(teacher, config, batch):
    model = teacher()
    losses = losses_of(model, batch(config("teacher"), "hr"))
    sum(loss for name, loss in losses.items() if name.endswith("_fused")).backward()
    assert model.fusion.squeeze.weight.grad.abs().sum() > 0
    assert model.fusion.excite.weight.grad.abs().sum() > 0
    assert model.backbone.bottom_up.stem.conv1.weight.grad.abs().sum() > 0


def test_the_hr_losses_leave_the_fusion_alone(teacher, config, batch):
    model = teacher()
    losses = losses_of(model, batch(config("teacher"), "hr"))
    sum(loss for name, loss in losses.items() if not name.endswith("_fused")).backward()
    assert all(p.grad is None or not p.grad.any() for p in model.fusion.parameters())


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
        for one, other in zip(model(inputs), expected):
            assert same_instances(one["instances"], other["instances"])


def test_the_lr_branch_is_the_low_resolution_detector(teacher, config, batch):
    model = teacher("MODEL.MULTI_RESOLUTION.TEST_BRANCH", "lr").eval()
    stock = build_model(config("lr")).eval()
    missing = stock.load_state_dict(model.state_dict(), strict=False)
    assert not missing.missing_keys
    assert set(missing.unexpected_keys) == {"fusion.squeeze.weight", "fusion.excite.weight"}
    with torch.no_grad():
        found = model(batch(config("teacher"), "hr", count=3, is_train=False))
        expected = stock(batch(config("lr"), None, count=3, is_train=False))
    for one, other in zip(found, expected, strict=True):
        assert len(one["instances"]) > 5
        assert same_instances(one["instances"], other["instances"])


def test_keys_are_the_stock_models_and_the_fusions(teacher, config):
    stock = build_model(config("teacher", "MODEL.META_ARCHITECTURE", "GeneralizedRCNN"))
    fusion = {"fusion.squeeze.weight", "fusion.excite.weight"}
    assert teacher().state_dict().keys() == stock.state_dict().keys() | fusion


def test_an_unknown_branch_is_refused(teacher):
    with pytest.raises(InputError, match="TEST_BRANCH is 'both'.*hr.*lr.*fused"):
        teacher("MODEL.MULTI_RESOLUTION.TEST_BRANCH", "both")


def test_levels_that_no_branch_has_are_refused(teacher):
    # p2 of the high resolution has no partner: the low resolution would need a p1.
    with pytest.raises(InputError, match="RPN reads p2, but .* p3, p4, p5, p6, p7"):
        teacher("MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"])


def test_a_backbone_that_pads_too_little_is_refused(teacher):
    with pytest.raises(InputError, match="build_aligned_resnet_fpn_backbone"):
        teacher(
            *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"),
            *("MODEL.RPN.IN_FEATURES", ["p3", "p4", "p5", "p6"]),
            *("MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [32], [64]]),
        )


def test_images_that_do_not_belong_together_are_refused(teacher, config, batch):
    inputs = batch(config("teacher"), "hr")
    inputs[1]["image_lr"] = inputs[1]["image_lr"][..., :-1]
    with pytest.raises(InputError, match=r"\(64, 96\) stands beside .* \(64, 94\)"):
        losses_of(teacher(), inputs)


def test_data_of_the_stock_mapper_are_refused(teacher, config, batch):
    with pytest.raises(InputError, match="'image_lr'.*TwoResolutionMapper"):
        losses_of(teacher(), batch(config("teacher"), None))


class Frame:
    """Stock heads that read given features; images, boxes, anchors ``factor`` times as large."""

    LEVELS = (2, 3, 4, 5, 6)

    def __init__(self, factor):
        shift = factor.bit_length() - 1
        cfg = get_cfg()
        cfg.MODEL.MASK_ON = True
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[factor * 2**s] for s in self.LEVELS]
        cfg.MODEL.RPN.IN_FEATURES = [f"p{s + shift}" for s in self.LEVELS]
        cfg.MODEL.ROI_HEADS.IN_FEATURES = cfg.MODEL.RPN.IN_FEATURES[:-1]
        cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
        cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
        cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
        cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 2
        cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
        cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
        cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
        cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 1
        cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 8
        cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 100
        shapes = {f"p{s + shift}": ShapeSpec(16, stride=factor * 2**s) for s in self.LEVELS}
        torch.manual_seed(0)
        self.rpn = build_proposal_generator(cfg, shapes)
        self.heads = build_roi_heads(cfg, shapes)
        self.factor, self.shift = factor, shift

    def images_and_truth(self):
        size = (64 * self.factor, 96 * self.factor)
        corners = np.array([[3, 5, 40, 61], [20, 11, 93, 30], [50, 40, 57, 49]]) * self.factor
        truth = Instances(size)
        truth.gt_boxes = Boxes(torch.tensor(corners, dtype=torch.float32))
        truth.gt_classes = torch.tensor([0, 2, 1])
        truth.gt_masks = PolygonMasks(
            [[np.array([x0, y0, x1, y0, x1, y1], np.float64)] for x0, y0, x1, y1 in corners]
        )
        return ImageList(torch.zeros(1, 3, *size), [size]), [truth]

    def run(self, pyramid, train):
        features = shift_levels(pyramid, self.shift)
        images, truth = self.images_and_truth()
        self.rpn.train(train), self.heads.train(train)
        torch.manual_seed(1)
        with EventStorage():
            proposals, rpn = self.rpn(images, features, truth)
            detections, heads = self.heads(images, features, proposals, truth)
        return detections[0], {**rpn, **heads}


def test_the_frame_makes_no_difference():
    torch.manual_seed(2)
    pyramid = {f"p{s}": torch.randn(1, 16, 64 >> s, 96 >> s) for s in Frame.LEVELS}
    pyramid["p6"] = torch.randn(1, 16, 1, 2)
    low, high = Frame(1), Frame(2)
    expected, found = low.run(pyramid, True)[1], high.run(pyramid, True)[1]
    assert len(expected) == 5
    assert {n: loss.item() for n, loss in found.items()} == {
        n: loss.item() for n, loss in expected.items()
    }
    with torch.no_grad():
        one, other = low.run(pyramid, False)[0], high.run(pyramid, False)[0]
    assert len(one) > 10
    assert torch.equal(2 * one.pred_boxes.tensor, other.pred_boxes.tensor)
    for field in ("scores", "pred_classes", "pred_masks"):
        assert torch.equal(one.get(field), other.get(field))
