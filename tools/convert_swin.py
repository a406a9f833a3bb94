#!/usr/bin/env python
"""Make torchvision's ImageNet weights of a Swin the start of a detector.

    python tools/convert_swin.py swin_t.pth output/swin/swin_t.pth

What it writes is MODEL.WEIGHTS of configs/COCO/*_Swin_T_*.yaml. What it reads is the state dict of
``torchvision.models.swin_t(weights="DEFAULT")``, which torchvision downloads once and keeps in
``torch.hub.get_dir()``, folder checkpoints.
"""

import argparse
import os
import pickle
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

from msad_kd.errors import InputError
from msad_kd.swin import convert_torchvision


def main(args):
    if not os.path.isfile(args.source):
        raise InputError(f"the weights '{args.source}' do not exist")
    try:
        state = torch.load(args.source, map_location="cpu", weights_only=True)
    except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise InputError(f"the weights '{args.source}' cannot be read ({error})") from error
    try:
        converted = convert_torchvision(state, args.format)
    except InputError as error:
        raise InputError(f"'{args.source}': {error}") from error
    os.makedirs(os.path.dirname(args.target) or ".", exist_ok=True)
    part = f"{args.target}.part"
    torch.save({"model": converted}, part)
    os.replace(part, args.target)  # the file is complete or it isn't there
    print(f"{args.target}: {len(converted)} weights and buffers, for {args.format} images")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="a state dict of torchvision's swin_t, swin_s or swin_b")
    parser.add_argument("target", help="the file to write")
    parser.add_argument(
        "--format",
        choices=("BGR", "RGB"),
        default="BGR",
        help="INPUT.FORMAT of the detector (default: BGR, which is Detectron2's); torchvision's "
        "weights are for RGB, and a teacher has to read the images its student reads",
    )
    try:
        main(parser.parse_args())
    except InputError as error:
        parser.error(str(error))
