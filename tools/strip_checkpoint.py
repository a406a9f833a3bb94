#!/usr/bin/env python
"""Strip a training checkpoint to its model: no optimizer, no iteration, no distillation weights.

    python tools/strip_checkpoint.py output/mine/student/model_final.pth student.pth --half

Stock Detectron2 loads the result with a plain config (MODEL.WEIGHTS student.pth). A name that ends
in .safetensors writes that format. The file's SHA-256 is written beside it (student.pth.sha256).
"""

import argparse
import os

from msad_kd.checkpoint.strip import strip_checkpoint
from msad_kd.utils.errors import in_one_sentence
from msad_kd.utils.unpickle import TrustFiles

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="a checkpoint written by train_net.py")
    parser.add_argument("target", help="the file to write")
    parser.add_argument("--half", action="store_true", help="store the weights in fp16")
    parser.add_argument("--trust-files", action=TrustFiles)
    arguments = parser.parse_args()
    with in_one_sentence(parser.prog):
        strip_checkpoint(arguments.source, arguments.target, half=arguments.half)
    size = os.path.getsize(arguments.target) / 2**20
    print(f"{arguments.target}: {size:.1f} MiB")
