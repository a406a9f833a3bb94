#!/usr/bin/env python
"""Write the model of a training checkpoint alone: no optimizer, no iteration, nothing of msad_kd.

    python tools/export_model.py output/shapes/student/model_final.pth student.pth --half

Stock Detectron2 loads the result with a plain config (MODEL.WEIGHTS student.pth).
"""

import argparse
import os

from msad_kd.checkpoint.checkpoint import export_weights
from msad_kd.utils.errors import InputError

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="a checkpoint that train_net.py wrote")
    parser.add_argument("target", help="the file to write")
    parser.add_argument("--half", action="store_true", help="store the weights in fp16")
    arguments = parser.parse_args()
    try:
        export_weights(arguments.source, arguments.target, half=arguments.half)
    except InputError as error:
        parser.error(str(error))
    size = os.path.getsize(arguments.target) / 2**20
    print(f"{arguments.target}: {size:.1f} MiB")
