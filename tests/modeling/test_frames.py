"""Heads in high-resolution pixels do to scaled boxes what the stock heads do."""

import numpy as np
import pytest
import torch
from detectors import DETECTORS, reading
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from helpers import build, differing

from msad_kd.modeling.capture import answering
from msad_kd.modeling.multi_resolution import MultiResolutionMixin
from msad_kd.modeling.pyramid import shift_levels

CORNERS = np.array([[3, 5, 40, 61], [20, 11, 93, 30], [50, 40, 57, 49], [0, 0, 90, 62]])


def in_frame(factor, masks):
    """Two images, of 64 x 96 px times ``factor``, with boxes."""
    inputs = []
    for corners in (CORNERS, CORNERS[1:]):
        size, corners = (64 * factor, 96 * factor), corners * factor
        truth = Instances(size)
        truth.gt_boxes = Boxes(torch.tensor(corners, dtype=torch.float32))
        truth.gt_classes = torch.arange(len(corners))
        if masks:
            triangles = corners[:, None, [0, 1, 2, 1, 2, 3]].astype(np.float64)
            truth.gt_masks = PolygonMasks([list(polygons) for polygons in triangles])
        inputs.append({"image": torch.zeros(3, *size), "instances": truth})
    return inputs


def run(model, pyramid, factor, train):
    """The stock part of a detector, given the features."""
    masks = getattr(getattr(model, "roi_heads", None), "mask_on", False)
    stock = super(MultiResolutionMixin, model).forward if factor > 1 else model.forward
    torch.manual_seed(1)
    with EventStorage(), answering(model.train(train).backbone, pyramid):
        return stock(in_frame(factor, masks))


@pytest.mark.parametrize("detector", DETECTORS, indirect=True)
@pytest.mark.parametrize("scale", [2, 4])
def test_both_frames_agree(scale, detector, config):
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
