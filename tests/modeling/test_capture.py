"""Recording a module's calls and answering in its place leave no trace."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from torch import nn

from msad_kd.modeling.capture import answering, computing, recording
from msad_kd.modeling.fpn import LastLevelsConv


class AddOne(nn.Module):
    def forward(self, x):
        return x + 1


def test_recording_keeps_input_and_output_and_answering_does_not_compute():
    module, x = AddOne(), torch.zeros(2)
    with recording(module) as call:
        y = module(x)
    assert call.inputs == (x,) and call.output is y
    module(torch.ones(2))
    assert call.inputs == (x,)  # it listens no longer
    with answering(module, "known"):
        assert module(x) == "known"


@pytest.mark.parametrize("manager", [recording, lambda module: answering(module, None)])
def test_both_end_when_the_block_fails(manager):
    module = AddOne()
    with pytest.raises(RuntimeError), manager(module):
        raise RuntimeError
    assert module(torch.zeros(1)).item() == 1.0
    assert not module._forward_hooks and "forward" not in vars(module)


def test_a_backbone_without_a_pyramid_computes_what_it_has():
    cfg = get_cfg()
    cfg.MODEL.RESNETS.update(RES2_OUT_CHANNELS=8, STEM_OUT_CHANNELS=8, WIDTH_PER_GROUP=8)
    backbone = build_resnet_backbone(cfg, ShapeSpec(channels=3))  # of C4
    with computing(backbone, ["res4"]):
        assert backbone(torch.rand(1, 3, 32, 32))["res4"].shape == (1, 32, 2, 2)


@pytest.mark.parametrize("top_block", [LastLevelP6P7(8, 8, "p5"), LastLevelsConv(8, 8, 2, "p5")])
@pytest.mark.parametrize("levels", [["p3"], ["p5"], ["p6"], ["p7"], ["p4", "p6"]])
def test_an_fpn_computes_the_levels_that_are_read(top_block, levels):
    widths = {"RES2_OUT_CHANNELS": 8, "STEM_OUT_CHANNELS": 8, "WIDTH_PER_GROUP": 8}
    cfg = get_cfg()
    cfg.MODEL.RESNETS.update(OUT_FEATURES=["res3", "res4", "res5"], **widths)
    bottom_up = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    fpn = FPN(bottom_up, ["res3", "res4", "res5"], 8, top_block=top_block).eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = fpn(x)
        with computing(fpn, levels), recording(fpn.fpn_lateral3) as lateral:
            features = fpn(x)
        again = fpn(x)
    assert all(torch.equal(features[level], expected[level]) for level in levels)
    assert torch.is_tensor(lateral.output) == ("p3" in levels)  # it adds to p3 alone
    assert features["p7"] is None or "p7" in levels
    assert all(torch.equal(again[level], expected[level]) for level in expected)
