#!/usr/bin/env python
"""Train, resume and evaluate students, multi-resolution teachers and stock detectors."""

import importlib
import os
import sys

# Scripts run from a checkout, installed or not, from any folder.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from msad_kd import KDTrainer
from msad_kd.errors import InputError
from msad_kd.setup import build_config


def setup(args):
    """Import the user's modules, read the config and prepare logs and seeds."""
    for module in args.imports:
        importlib.import_module(module)
    cfg = build_config(args.config_file, args.opts)
    cfg.freeze()
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="msad_kd")
    return cfg


def main(args):
    cfg = setup(args)
    if args.eval_only:
        model = KDTrainer.build_model(cfg)
        DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(
            cfg.MODEL.WEIGHTS, resume=args.resume
        )
        results = KDTrainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = KDTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    parser = default_argument_parser()
    parser.add_argument(
        "--import",
        dest="imports",
        metavar="MODULE",
        action="append",
        default=[],
        help="import this Python module first, so that what it registers can be named in a config; "
        "may be given several times",
    )
    arguments = parser.parse_args()
    try:
        launch(
            main,
            arguments.num_gpus,
            num_machines=arguments.num_machines,
            machine_rank=arguments.machine_rank,
            dist_url=arguments.dist_url,
            args=(arguments,),
        )
    except InputError as error:
        sys.exit(f"{os.path.basename(__file__)}: {error}")
