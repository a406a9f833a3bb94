"""Small timm networks of five families, and how to build them as backbones."""

import torch

from msad_kd.modeling.timm_backbone import TimmBackbone

STAGES = ["res2", "res3", "res4", "res5"]
SWIN = "swin_tiny_patch4_window7_224"
TINY_SWIN = {"embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "window_size": 4}
MOBILE = "mobilenetv3_small_050"
FAMILIES = {
    MOBILE: {},
    "tf_efficientnet_lite0": {},
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]},
    "resnet10t": {},
    SWIN: TINY_SWIN,
}


def backbone(name=MOBILE, **changes):
    arguments = {"arguments": FAMILIES.get(name, {}), "norm": "BN", "freeze_at": 0}
    torch.manual_seed(0)
    return TimmBackbone(name=name, **{**arguments, "out_features": STAGES, **changes})


def options(name=MOBILE, *opts, kind="", **arguments):
    arguments = {**FAMILIES.get(name, {}), **arguments}
    return [
        *("MODEL.BACKBONE.NAME", f"build_{kind}timm_fpn_backbone", "MODEL.TIMM.NAME", name),
        *("MODEL.TIMM.NORM", "BN", "MODEL.TIMM.ARGUMENTS", [[*x] for x in arguments.items()]),
        *opts,
    ]
