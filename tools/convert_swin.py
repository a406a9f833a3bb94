#!/usr/bin/env python
"""Make torchvision's ImageNet weights of a Swin the start of a detector.

    python tools/convert_swin.py swin_t.pth output/swin/swin_t.pth

What it writes is MODEL.WEIGHTS of configs/COCO/*_Swin_T_*.yaml. What it reads is the state dict of
``torchvision.models.swin_t(weights="DEFAULT")``, which torchvision downloads once and keeps in
``torch.hub.get_dir()``, folder checkpoints.
"""

import argparse

from msad_kd.checkpoint.checkpoint import read_file, save_model
from msad_kd.modeling.swin import convert_torchvision
from msad_kd.utils.errors import InputError


def main(args):
    """Converts the file; an InputError says what it is not."""
    state = read_file(args.source)
    try:
        converted = convert_torchvision(state, args.format)
    except InputError as error:
        raise InputError(f"'{args.source}': {error}") from error
    save_model(converted, args.target)
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
