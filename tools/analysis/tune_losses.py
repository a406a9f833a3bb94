#!/usr/bin/env python
"""Try losses on a part of a student's schedule, beside the control, and rank them.

    python tools/analysis/tune_losses.py --config-file my/student.yaml --output output/tune

Each candidate is the student of the config with other KD.LOSSES; the control has none. All have the
whole learning-rate schedule in --iterations, the same seeds and images, and are measured on
DATASETS.TEST: name images there that you do not report. Without --losses, the candidates are

    l1      weight 0.6 on all levels, as MSAD has it
    ssim    on the level with most detection gradient, at --ratio of that gradient
    heads   the losses of the RoI heads, or cross_head of a dense head, at weight 1
    both    ssim and heads

--losses names a YAML file of others, NAME: [{name: pkd, weight: 1.0}, ...]. After a stop, the
same command continues. OUTPUT gets candidates.yaml, grid.yaml, and the results of a study.
"""

import argparse
import gc
import json
import os
import sys
from collections import defaultdict
from copy import deepcopy
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for projects.study

import pandas as pd
import torch
import yaml
from arguments import positive
from compare_gradients import DETECTION, PREFIX, load_student, measure_batch
from detectron2.utils.events import EventStorage
from tabulate import tabulate

from msad_kd import DistilledMixin, InputError, build_config
from msad_kd.checkpoint.files import replacing
from msad_kd.config.derive import WARMUP_SHARE, default_losses
from msad_kd.config.imports import add_code_options
from msad_kd.data.coco_format import datasets_folder
from msad_kd.losses.terms import read_losses
from msad_kd.modeling.classes import is_a
from msad_kd.utils.errors import in_one_sentence
from projects.study import run as study
from projects.study.jobs import count_cores
from projects.study.reports import KINDS, spread

CONTROL = "control"


def balance(args):
    """Return the level that detection pulls at most, and the weight of ssim for --ratio there."""
    words = {"config_file": args.config_file, "weights": "", "batches": args.batches}
    losses = ["KD.LOSSES", "[{name: ssim, weight: 1.0}]"]
    words = argparse.Namespace(**words, opts=[*args.opts, *losses])
    model, _, batches = load_student(words)
    norms = defaultdict(lambda: defaultdict(float))
    with EventStorage():
        for batch in batches:
            for level, squares in measure_batch(model, batch).items():
                for name, sums in squares.items():
                    norms[level][name] += float(sums[:, 0].sum()) ** 0.5
    del model, batches, batch, squares, sums
    gc.collect()
    torch.cuda.empty_cache()  # the trainings need it
    level = max(norms, key=lambda name: norms[name][DETECTION])
    if not (gradient := norms[level][PREFIX + "ssim"]):
        raise InputError(
            f"ssim has no gradient on {level}: student and teacher have the same features there; "
            "name candidates by --losses"
        )
    return level, float(f"{args.ratio * norms[level][DETECTION] / gradient:.2g}")


def default_candidates(args, cfg):
    """Return the losses to try by name."""
    warmup = {"warmup_iters": int(WARMUP_SHARE * cfg.SOLVER.MAX_ITER)}
    dense = cfg.MODEL.META_ARCHITECTURE != "DistilledRCNN"
    names = ["cross_head"] if dense else [x["name"] for x in default_losses(cfg)]
    # Heads that no loss compares (CascadeROIHeads) have l1 by default.
    heads = [{"name": name, "weight": 1.0, **warmup} for name in names if name != "l1"]
    level, weight = balance(args)
    ssim = {"name": "ssim", "weight": weight, "levels": [level], **warmup}
    l1 = {"name": "l1", "weight": 0.6, **warmup}
    of_heads = {"heads": heads, "both": deepcopy([ssim, *heads])} if heads else {}
    return {"l1": [l1], "ssim": [ssim], **of_heads}


def read_candidates(args, cfg):
    """Return the losses to try by name, those of the first call if it is typed again.

    Raises:
        InputError: if the file has no such entries.
    """
    kept = args.output / "candidates.yaml"
    source = args.losses or (kept if kept.is_file() else None)
    if source == kept:
        print(f"The candidates are those of '{kept}'; remove it to find them anew")
    if source is None:
        candidates = default_candidates(args, cfg)
    else:
        try:
            candidates = yaml.safe_load(source.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise InputError(f"--losses: '{source}': {error}") from error
    if not isinstance(candidates, dict) or CONTROL in candidates:
        raise InputError(
            f"--losses: '{source}' should have NAME: [{{name: ..., weight: ...}}, ...]"
        )
    for losses in candidates.values():
        read_losses(losses)
    with replacing(kept) as part:
        part.write_text(yaml.safe_dump(candidates, sort_keys=False))
    return candidates


def make_grid(args, cfg, candidates):
    """Return the study of the candidates and their control."""
    factor = args.iterations / cfg.SOLVER.MAX_ITER
    schedule = {
        "SOLVER.MAX_ITER": args.iterations,
        "SOLVER.STEPS": sorted({max(1, round(step * factor)) for step in cfg.SOLVER.STEPS}),
        "SOLVER.WARMUP_ITERS": round(cfg.SOLVER.WARMUP_ITERS * factor),
    }
    given = dict(zip(args.opts[::2], args.opts[1::2]))
    rows = {}
    for name, losses in {CONTROL: [], **candidates}.items():
        losses = [{**x, "warmup_iters": round(x.get("warmup_iters", 0) * factor)} for x in losses]
        # The schedule is a part of the given one, too, which cfg has.
        options = {**given, **schedule, "KD.LOSSES": losses}
        rows[name] = {"title": name, "config": args.config_file, "options": options}
    return {
        "output": str(args.output),
        "seeds": [*range(1, args.seeds + 1)],
        "rows": rows,
        "tables": [{"name": "losses", "title": "Losses", "rows": [*rows], "control": CONTROL,
                    "baseline": CONTROL}],
    }  # fmt: skip


def rank(cells, names):
    """Return the candidates from the best to the worst mean AP, and the table of them.

    Args:
        cells: results by "NAME/SEED", as a study's results.json has them.
        names: of the candidates, control included.
    """
    seeds = sorted({int(key.split("/")[1]) for key in cells})
    kinds = {kind: name for kind, name in KINDS.items() if kind in cells[f"{CONTROL}/{seeds[0]}"]}
    lines = {}
    for name in names:
        aps = {kind: pd.Series([cells[f"{name}/{s}"][kind]["AP"] for s in seeds]) for kind in kinds}
        lines[name] = aps
    order = sorted(lines, key=lambda name: -sum(aps.mean() for aps in lines[name].values()))
    table = []
    for name in order:
        gains = [lines[name][kind] - lines[CONTROL][kind] for kind in kinds]
        texts = [spread(lines[name][kind]) for kind in kinds]
        texts += ["-" if name == CONTROL else spread(gain, "+") for gain in gains]
        table.append([name, *texts])
    headers = ["losses", *(f"{x} AP" for x in kinds.values())]
    headers += [f"{x}, against the control" for x in kinds.values()]
    return order, tabulate(table, headers, "pipe", disable_numparse=True)


def parse_arguments(arguments=None):
    """Read the command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--config-file", required=True, help="a student's config, with a trained teacher")
    add("--output", required=True, type=Path, help="folder of runs and results")
    add("--losses", type=Path, metavar="FILE", help="candidates as YAML; see above")
    add("--iterations", type=positive, help="SOLVER.MAX_ITER of a run (default: a quarter)")
    add("--seeds", type=positive, default=1, help="runs of each candidate (default: 1)")
    add("--ratio", type=float, default=0.2, help="gradient of ssim / of detection (default: 0.2)")
    add("--batches", type=positive, default=8, help="to measure gradients on (default: 8)")
    add("--slots", type=positive, default=count_cores(), help="runs at a time (default: the cores)")
    gpus = min(1, torch.cuda.device_count())
    add("--num-gpus", type=int, default=gpus, help="of each training (then one runs at a time)")
    add_code_options(parser)
    add(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="config keys of all runs; their paths start in this repository",
    )
    return parser.parse_args(arguments)


def main(arguments=None):
    """Run the command line; an expected error ends it with one sentence."""
    args = parse_arguments(arguments)
    args.output, args.losses = args.output.absolute(), args.losses and args.losses.absolute()
    args.config_file = os.path.abspath(args.config_file)
    os.environ["DETECTRON2_DATASETS"] = os.path.abspath(datasets_folder())
    os.chdir(study.ROOT)  # where the runs start; a path in the config that is wrong there is told
    with in_one_sentence("tune_losses.py"):
        # Each training scales its schedule to the processes that it has.
        cfg = build_config(args.config_file, ["SOLVER.REFERENCE_WORLD_SIZE", 0, *args.opts])
        if not is_a(cfg, DistilledMixin):
            raise InputError(f"'{args.config_file}' is not the config of a student")
        args.iterations = args.iterations or max(1, cfg.SOLVER.MAX_ITER // 4)
        args.output.mkdir(parents=True, exist_ok=True)
        candidates = read_candidates(args, cfg)
        path = args.output / "grid.yaml"
        with replacing(path) as part:
            part.write_text(yaml.safe_dump(make_grid(args, cfg, candidates), sort_keys=False))
    words = ["--grid", str(path), "--slots", str(args.slots), "--num-gpus", str(args.num_gpus)]
    study.main(words)
    cells = json.loads((args.output / "results.json").read_text())["cells"]
    order, table = rank(cells, [CONTROL, *candidates])
    print(f"\n{table}\n")
    if order[0] == CONTROL:
        print("No candidate is ahead of the control.")
    else:
        print(f"Best: {order[0]}. KD.LOSSES: {json.dumps(candidates[order[0]])}")
    print(f"{args.seeds} seed(s): trust no difference that is smaller than that between seeds.")


if __name__ == "__main__":
    main()
