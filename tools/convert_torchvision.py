#!/usr/bin/env python
"""Rename the weights of a torchvision ImageNet classifier for the backbone of a detector.

    python tools/convert_torchvision.py resnet50-0676ba61.pth weights/R-50.pth

A ResNet gets the names of Detectron2's; its config needs, beside MODEL.WEIGHTS,

    MODEL.RESNETS.STRIDE_IN_1X1 False          torchvision strides in the 3x3 convolution
    MODEL.RESNETS.DEPTH 50                     and RES2_OUT_CHANNELS 64 for 18 and 34
    INPUT.FORMAT RGB
    MODEL.PIXEL_MEAN [123.675,116.28,103.53]
    MODEL.PIXEL_STD [58.395,57.12,57.375]

Any other network, and with --keep-names a ResNet too, keeps torchvision's names, for
MODEL.BACKBONE.NAME build_torchvision_fpn_backbone. What is needed is printed. The classifier is
left out.
"""

import argparse
import re

import torch

from msad_kd.checkpoint.checkpoint import read_file, save_model
from msad_kd.utils.errors import InputError

BACKBONE = "backbone.bottom_up."
PIXELS = [
    "INPUT.FORMAT RGB",
    "MODEL.PIXEL_MEAN [123.675,116.28,103.53]",
    "MODEL.PIXEL_STD [58.395,57.12,57.375]",
]
# Blocks in the four stages; 50 and 34 are told apart by the third convolution of a block.
DEPTHS = {(2, 2, 2, 2): 18, (3, 4, 6, 3): 34, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}


def is_resnet(state: dict) -> bool:
    """Whether these are the weights of a ResNet of torchvision's."""
    return {"conv1.weight", "layer1.0.conv1.weight", "layer4.0.conv1.weight"} <= state.keys()


def resnet_name(name: str) -> str:
    """The name that a parameter of torchvision's ResNet has in Detectron2's."""
    name = re.sub(r"^(?=conv1|bn1)", "stem.", name)
    name = re.sub(r"^layer(\d)", lambda layer: f"res{int(layer[1]) + 1}", name)
    name = re.sub(r"\bbn(\d)\b", r"conv\1.norm", name)
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def resnet_settings(state: dict) -> list[str]:
    """What a config has to say for Detectron2's ResNet to be the one of these weights."""
    blocks = tuple(
        1 + max(int(m[1]) for k in state if (m := re.match(rf"layer{stage}\.(\d+)\.", k)))
        for stage in (1, 2, 3, 4)
    )
    if blocks not in DEPTHS:
        raise InputError(
            f"a ResNet with {blocks} blocks in its stages is none of Detectron2's; use --keep-names"
        )
    depth, settings = DEPTHS[blocks], []
    if "layer1.0.conv3.weight" in state:
        depth = 50 if depth == 34 else depth
        width, per_group = state["layer1.0.conv2.weight"].shape[:2]
        settings = ["MODEL.RESNETS.STRIDE_IN_1X1 False"]
        settings += [f"MODEL.RESNETS.NUM_GROUPS {width // per_group}"] * (width > per_group)
        settings += [f"MODEL.RESNETS.WIDTH_PER_GROUP {per_group}"] * (per_group != 64)
    else:
        settings = ["MODEL.RESNETS.RES2_OUT_CHANNELS 64"]
    return [f"MODEL.RESNETS.DEPTH {depth}", *settings]


def convert(state: dict, keep_names: bool) -> tuple[dict, list[str]]:
    """Rename a state_dict of torchvision's.

    Returns:
        the renamed one, and the settings a config needs.
    """
    # Counters only: normalisation layers that have one start it at 0 when it is absent.
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    if is_resnet(state) and not keep_names:
        renamed = {resnet_name(k): v for k, v in state.items() if not k.startswith("fc.")}
        return {BACKBONE + k: v for k, v in renamed.items()}, [*resnet_settings(state), *PIXELS]
    kept = {k: v for k, v in state.items() if not re.match(r"(fc|classifier|head)\.", k)}
    settings = ["MODEL.BACKBONE.NAME build_torchvision_fpn_backbone", *PIXELS]
    return {f"{BACKBONE}body.{k}": v for k, v in kept.items()}, settings


def main(args):
    """Converts the file, and prints what a config needs for it."""
    state = read_file(args.source)
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise InputError(f"'{args.source}' is no state_dict of torchvision's")
    renamed, settings = convert(state, args.keep_names)
    save_model(renamed, args.target)
    print(f"{args.target}: {len(renamed)} tensors. The config needs", *settings, sep="\n    ")
    print(f"    MODEL.WEIGHTS {args.target}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="a .pth file of torchvision's")
    parser.add_argument("target", help="the file to write")
    parser.add_argument("--keep-names", action="store_true", help="for torchvision's own ResNet")
    try:
        main(parser.parse_args())
    except InputError as error:
        parser.error(str(error))
