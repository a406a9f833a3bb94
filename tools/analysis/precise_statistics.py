#!/usr/bin/env python
"""Recompute a multi-resolution teacher's running statistics, separately for each resolution.

    python tools/analysis/precise_statistics.py --batches 40 \
        --config-file configs/Shapes/teacher_one_size.yaml \
        output/shapes/teacher_one_size/model_final.pth precise.pth

Training keeps exponential averages of the last batches. This tool averages evenly over training
batches at the final weights. It can also give a teacher that shared its statistics between the
resolutions (MODEL.MULTI_RESOLUTION.SEPARATE_STATISTICS False) one set for each: batch normalisation
does not read them in training, so its weights fit both.
"""

import argparse

import torch
from arguments import check_target, positive, run
from fvcore.nn.precise_bn import update_bn_stats
from tqdm import tqdm

from msad_kd import InputError, KDTrainer, build_config
from msad_kd.checkpoint.checkpoint import load_strictly, read_model, save_model
from msad_kd.modeling.batch_statistics import LOW_SUFFIX, low_resolution_statistics
from msad_kd.modeling.multi_resolution import MultiResolutionMixin


def main(args):
    """Average over training batches, first at high and then at low resolution."""
    contents = read_model(args.source, "its statistics")
    state, classes = contents["model"], contents.get("classes")
    check_target(args.target)
    cfg = build_config(args.config_file, args.opts)
    cfg.SOLVER.ACCUMULATE = 1  # each batch is one pass
    model = KDTrainer.build_model(cfg)
    if not isinstance(model, MultiResolutionMixin):
        raise InputError(f"'{args.config_file}' is not a multi-resolution teacher")
    if not any(key.endswith(LOW_SUFFIX) for key in model.state_dict()):
        raise InputError(
            f"the resolutions of '{args.config_file}' share their statistics; add "
            "MODEL.MULTI_RESOLUTION.SEPARATE_STATISTICS True (frozen ones are never recomputed)"
        )
    for key in model.state_dict():
        # If the shared key is missing as well, load_strictly reports it.
        if key.endswith(LOW_SUFFIX) and (shared := key.removesuffix(LOW_SUFFIX)) in state:
            state.setdefault(key, state[shared])
    load_strictly(model, args.source, f"the config '{args.config_file}'", contents)

    # Only the backbone's normalisation is in train mode; frozen layers keep their statistics.
    model.eval().backbone.train()
    batches = KDTrainer.build_train_loader(cfg)
    with torch.no_grad():
        high = (model.preprocess_image(x).tensor for x in batches)
        update_bn_stats(model.backbone, tqdm(high, total=args.batches), args.batches)
        low = (model.low_resolution_batch(x, model.preprocess_image(x).tensor) for x in batches)
        with low_resolution_statistics(model.backbone):
            update_bn_stats(model.backbone, tqdm(low, total=args.batches), args.batches)
    save_model(model.state_dict(), args.target, classes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config-file", required=True, help="the teacher's config")
    batches = "training batches to average over (default: 200)"
    parser.add_argument("--batches", type=positive, default=200, help=batches)
    parser.add_argument("source", help="a teacher's checkpoint")
    parser.add_argument("target", help="the file to write")
    parser.add_argument("opts", nargs="*", help="KEY VALUE pairs on top of the config")
    run(parser, main)
