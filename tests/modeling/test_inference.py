"""The copy of a backbone for inference has its levels, and leaves the backbone alone."""

from contextlib import nullcontext

import pytest
import torch
from detectron2.modeling import build_backbone
from helpers import differing, tensors_of
from timm_networks import options

from msad_kd.modeling import inference
from msad_kd.modeling.batch_statistics import (
    add_low_resolution_statistics,
    low_resolution_statistics,
)

WIDE = ("STEM_OUT_CHANNELS", "RES2_OUT_CHANNELS", "WIDTH_PER_GROUP")  # GN has 32 groups
KEYS = {
    "FrozenBN": ["MODEL.RESNETS.NORM", "FrozenBN"],
    "BN": ["MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "BN"],
    "GN": [x for key in WIDE for x in (f"MODEL.RESNETS.{key}", 32)] + ["MODEL.RESNETS.NORM", "GN"],
    "timm": options(kind="aligned_"),
}


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("kind", KEYS)
def test_the_copy_has_the_same_levels(config, monkeypatch, kind, separate):
    monkeypatch.setattr(inference, "_LARGE", 2**12)  # so that some of these maps are large
    torch.manual_seed(0)
    backbone = build_backbone(config("teacher", *KEYS[kind])).eval()
    if separate:
        add_low_resolution_statistics(backbone)
    for value in [*backbone.buffers(), *backbone.parameters()]:
        if value.dim() == 1 and value.is_floating_point():  # statistics, scales and offsets
            value.data.uniform_(0.5, 1.5)
    before = tensors_of(backbone)
    copy, x = inference.for_inference(backbone), torch.randn(2, 3, 64, 128)
    with torch.no_grad():
        for resolution in (nullcontext, low_resolution_statistics):
            with resolution(backbone), resolution(copy):
                expected, found = backbone(x), copy(x)
            assert found.keys() == expected.keys()
            for name, level in found.items():
                assert (level - expected[name]).norm() < 1e-5 * expected[name].norm()
                assert level.is_contiguous()
    assert differing(before, tensors_of(backbone)) == []
