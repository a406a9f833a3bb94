#!/usr/bin/env python
"""Train or evaluate a LazyConfig's student: Detectron2's script of this name, and a teacher.

Example: tools/lazyconfig_train_net.py --config-file configs/lazy/mask_rcnn_R_50_FPN_student_1x.py
"""

import os
import sys
from pathlib import Path

if not __package__:  # run as a script, which does not put the repository on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detectron2.config import LazyConfig, instantiate
from detectron2.engine import (
    AMPTrainer,
    SimpleTrainer,
    default_argument_parser,
    default_setup,
    default_writers,
    defaults,
    hooks,
)
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from omegaconf import OmegaConf

from msad_kd import init_from_teacher
from msad_kd.checkpoint.checkpoint import SafeCheckpointer
from msad_kd.engine.launch import run_command
from msad_kd.utils.compat import ddp_on
from msad_kd.utils.device import find_device
from msad_kd.utils.errors import InputError, nearest
from msad_kd.utils.unpickle import TrustFiles

# Keys of ``train`` that Detectron2's default_setup reads beside those of its own configs.
DEFAULT_SETUP = ("seed", "cudnn_benchmark", "float32_precision")


class Checkpointer(SafeCheckpointer):
    """Names LazyConfig's key in its messages."""

    purpose = "train.init_checkpoint"


def evaluate(cfg, model):
    """Evaluate a model on the test data."""
    loader, evaluator = instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
    results = inference_on_dataset(model, loader, evaluator)
    print_csv_format(results)
    return results


def read_config(file, overrides):
    """Return a LazyConfig with its overrides; without a GPU the device is the CPU.

    Raises:
        InputError: if the file is none, a key of ``train`` is unknown, or its folder is a file.
    """
    if not os.path.isfile(file):
        raise InputError(f"the config file '{file}' does not exist; name one by --config-file")
    if not file.endswith(".py"):
        words = "train a YAML config by train_net.py, and a run's config.yaml from its own .py file"
        raise InputError(f"'{file}' is no Python config (LazyConfig); {words}")
    cfg = LazyConfig.load(file)
    known = {f"train.{key}" for key in (*cfg.train, *DEFAULT_SETUP)}
    known |= {f"train.{key}.{x}" for key in cfg.train for x in _keys(cfg.train[key])}
    for key in (option.split("=")[0] for option in overrides):
        if key.startswith("train.") and key not in known:
            raise InputError(f"unknown config key '{key}'{nearest(key, known)}")
    cfg = LazyConfig.apply_overrides(cfg, overrides)
    if os.path.exists(cfg.train.output_dir) and not os.path.isdir(cfg.train.output_dir):
        raise InputError(f"train.output_dir: '{cfg.train.output_dir}' is no folder")
    cfg.train.device = find_device(cfg.train.device, "train.device")
    return cfg


def _keys(value):
    return value if OmegaConf.is_dict(value) else ()


def main(args):
    """Train, resume or evaluate in one process."""
    cfg = read_config(args.config_file, args.opts)
    default_setup(cfg, args)
    model = instantiate(cfg.model).to(cfg.train.device)
    if args.eval_only:
        if not cfg.train.init_checkpoint:
            raise InputError("train.init_checkpoint is empty; name the weights to evaluate")
        Checkpointer(model).load(cfg.train.init_checkpoint)
        return evaluate(cfg, model)
    teacher = instantiate(cfg.teacher).build()
    model.set_teacher(teacher)  # before the optimizer and DDP, as it may add adapters
    init_from_teacher(model, teacher.model)
    cfg.optimizer.params.model = model
    optimizer, loader = instantiate(cfg.optimizer), instantiate(cfg.dataloader.train)
    kind = AMPTrainer if cfg.train.amp.enabled else SimpleTrainer
    with ddp_on(cfg.train.device):
        trainer = kind(defaults.create_ddp_model(model, **cfg.train.ddp), loader, optimizer)
    checkpointer = Checkpointer(model, cfg.train.output_dir, trainer=trainer)
    main_process = comm.is_main_process()
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            # Saves before the evaluation, in which a run may be killed.
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer)
            if main_process
            else None,
            hooks.EvalHook(cfg.train.eval_period, lambda: evaluate(cfg, model)),
            hooks.PeriodicWriter(
                default_writers(cfg.train.output_dir, cfg.train.max_iter), cfg.train.log_period
            )
            if main_process
            else None,
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
    resumed = args.resume and checkpointer.has_checkpoint()
    trainer.train(trainer.iter + 1 if resumed else 0, cfg.train.max_iter)
    return model


if __name__ == "__main__":
    parser = default_argument_parser()
    parser.add_argument("--trust-files", action=TrustFiles)
    run_command(main, parser)
