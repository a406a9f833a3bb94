#!/usr/bin/env python
"""Write the configs of a ladder's controls: runs as long as the ladder that lack one part of it.

    python projects/MTPD/controls.py projects/MTPD/configs/Shapes/ladder.yaml --start ''

A ladder may beat its last teacher alone because of its sequence of teachers, its longer training,
the restarts of its learning rate or its start. Each control removes one of these. The command
prints how to train them.

A control named `strongest` uses the last stage's teacher; the command does not measure which
teacher is the strongest.
"""

import argparse
import os
import shlex
from pathlib import Path

import yaml
from detectron2.modeling import META_ARCH_REGISTRY

from msad_kd import DistilledMixin, InputError, build_config
from msad_kd.ladder import control_stages, write_start
from msad_kd.utils.errors import in_one_sentence


def stock_name(name: str) -> str:
    """Return the name of a student's stock meta-architecture."""
    for parent in META_ARCH_REGISTRY.get(name).__mro__[1:]:
        if parent.__name__ in META_ARCH_REGISTRY and not issubclass(parent, DistilledMixin):
            return parent.__name__
    raise InputError(f"MODEL.META_ARCHITECTURE '{name}' is not a student")


def main(args):
    """Write one config per control, and print the commands that train them."""
    # Unscaled: each run scales its own schedule to its number of processes.
    cfg = build_config(args.ladder, ["SOLVER.REFERENCE_WORLD_SIZE", 0])
    stages, solver = cfg.KD.LADDER.STAGES, cfg.SOLVER
    if not stages:
        raise InputError(f"'{args.ladder}' has no KD.LADDER.STAGES")
    output = Path(args.output or f"{cfg.OUTPUT_DIR}_controls")
    beginning = str(output / "start.pth")
    controls = control_stages(stages, solver.MAX_ITER, beginning)
    changes = {name: {"KD": {"LADDER": {"STAGES": x}}} for name, x in controls.items()}
    total = controls["strongest"][0]["iterations"]  # the ladder's, in one stage
    start = cfg.MODEL.WEIGHTS if args.start is None else args.start
    if not start and args.start is None:
        raise InputError(
            "no_kd has no teacher to start from: give --start WEIGHTS, such as those of ImageNet, "
            "or --start '' to train it from scratch"
        )
    changes["no_kd"] = {
        "MODEL": {
            "META_ARCHITECTURE": stock_name(cfg.MODEL.META_ARCHITECTURE),
            "WEIGHTS": start,
        },
        "KD": {"LADDER": {"STAGES": []}},
        "SOLVER": {
            "STEPS": [round(step * total / solver.MAX_ITER) for step in solver.STEPS],
            "MAX_ITER": total,
        },
    }
    output.mkdir(parents=True, exist_ok=True)
    if stages[0].get("start") == "teacher":
        write_start(cfg, beginning)
    base = os.path.relpath(args.ladder, output)
    for name, change in changes.items():
        file = output / f"{name}.yaml"
        content = {"_BASE_": base, **change, "OUTPUT_DIR": str(output / name)}
        file.write_text(yaml.safe_dump(content, sort_keys=False))
        print(shlex.join(["python", "train_net.py", "--config-file", str(file)]))


if __name__ == "__main__":
    first, *_, last = __doc__.strip().split("\n\n")
    parser = argparse.ArgumentParser(description=first, epilog=last)
    parser.add_argument("ladder", help="config of a student with KD.LADDER.STAGES")
    parser.add_argument("--start", help="MODEL.WEIGHTS of no_kd (default: the ladder's)")
    parser.add_argument(
        "--output", help="folder for the configs and their runs (default: <OUTPUT_DIR>_controls)"
    )
    arguments = parser.parse_args()
    with in_one_sentence(parser.prog):
        main(arguments)
