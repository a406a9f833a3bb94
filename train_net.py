#!/usr/bin/env python
"""Train, resume and evaluate students, ladders of teachers, teachers and stock detectors."""

import logging
from logging.handlers import MemoryHandler

from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from msad_kd import KDTrainer
from msad_kd.checkpoint.checkpointer import find_checkpoint
from msad_kd.config.build import build_config
from msad_kd.config.imports import add_code_options
from msad_kd.engine.launch import is_restarted, run_command
from msad_kd.engine.run_folder import explain_disk_errors, make_folder, take_folder
from msad_kd.evaluation.build import check_augmentation
from msad_kd.ladder.run import run_ladder
from msad_kd.utils.errors import InputError

EXAMPLES = """
examples:
  train_net.py --config-file configs/Shapes/student_multi_size.yaml
  train_net.py --config-file my.yaml --resume
  train_net.py --config-file my.yaml --eval-only MODEL.WEIGHTS output/model_final.pth

Configs are YAML files, and options on top of them are KEY VALUE pairs. Python configs (LazyConfig)
are for tools/lazyconfig_train_net.py. Without a GPU, --num-gpus counts processes on the CPU.
Instead of --num-gpus, torchrun may start the processes; those that it starts again after a failure
resume by themselves.
"""


def setup(args):
    """Read the config, and prepare logs and seeds."""
    # The config says where the log goes: keep what is logged before it is read.
    logger, early = logging.getLogger("msad_kd"), MemoryHandler(1000, logging.CRITICAL + 1)
    logger.addHandler(early)
    cfg = build_config(args.config_file, args.opts)
    cfg.freeze()
    if args.eval_only:
        make_folder(cfg.OUTPUT_DIR)
    else:  # before the config is written there
        take_folder(cfg, resume=args.resume)
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="msad_kd")
    logger.removeHandler(early)
    for record in early.buffer:
        logger.handle(record)
    logging.raiseExceptions = False  # no traceback for each line that a full disk does not take
    # Detectron2 logs the traceback of any error in training; an InputError needs none.
    logging.getLogger("detectron2.engine.train_loop").addFilter(
        lambda record: not (record.exc_info and isinstance(record.exc_info[1], InputError))
    )
    return cfg


@explain_disk_errors()
def main(args):
    """Train, resume or evaluate in one process, as the command line and the config say."""
    args.resume |= is_restarted() and not args.eval_only
    cfg = setup(args)
    if args.eval_only:
        check_augmentation(cfg)
        weights = cfg.MODEL.WEIGHTS
        if args.resume:  # the run's last checkpoint, if there is one
            weights = str(find_checkpoint(cfg.OUTPUT_DIR, training=False) or weights)
        model = KDTrainer.load_model(cfg, weights, f"the config '{args.config_file}'")
        results = KDTrainer.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            # The keys are tasks or, with several data sets, data sets that hold tasks.
            for name, augmented in KDTrainer.test_with_TTA(cfg, model).items():
                results[name] = {**results.get(name, {}), **augmented}
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    if cfg.KD.LADDER.STAGES:
        return run_ladder(cfg, resume=args.resume)
    trainer = KDTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    parser = default_argument_parser(epilog=EXAMPLES)
    (options,) = [action for action in parser._actions if action.dest == "opts"]
    options.help = "KEY VALUE pairs on top of the config file"  # Detectron2's names LazyConfig
    add_code_options(parser)
    run_command(main, parser, "; --resume goes on from the last checkpoint")
