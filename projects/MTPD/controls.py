#!/usr/bin/env python
"""Write the controls of a ladder, all of the ladder's total of iterations, as configs.

    python projects/MTPD/controls.py projects/MTPD/configs/Shapes/ladder.yaml

What a ladder gains over its strongest teacher alone may be the longer training, the restarts of the
learning rate or the start; each control takes one of them away. It prints how to run them.

In the controls' names `strongest` means the last stage's teacher; which one is, is not measured.
"""

import argparse
import os
import sys
from pathlib import Path

if not __package__:  # run as a script, which does not put the repository on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import yaml
from detectron2.modeling import META_ARCH_REGISTRY

from msad_kd import DistilledMixin, InputError, build_config
from msad_kd.ladder.controls import control_stages


def stock_name(name: str) -> str:
    """The meta-architecture that a student is without distillation."""
    for parent in META_ARCH_REGISTRY.get(name).__mro__[1:]:
        if parent.__name__ in META_ARCH_REGISTRY and not issubclass(parent, DistilledMixin):
            return parent.__name__
    raise InputError(f"MODEL.META_ARCHITECTURE '{name}' is no student")


def main(args):
    """Writes the controls' configs beside one another; an InputError says what the ladder lacks."""
    # As it stands in the file: each run scales its schedule to its processes.
    cfg = build_config(args.ladder, ["SOLVER.REFERENCE_WORLD_SIZE", 0])
    stages, solver = cfg.KD.LADDER.STAGES, cfg.SOLVER
    if not stages:
        raise InputError(f"'{args.ladder}' has no KD.LADDER.STAGES")
    contents = {
        name: {"KD": {"LADDER": {"STAGES": own}}}
        for name, own in control_stages(stages, solver.MAX_ITER).items()
    }
    total = sum(stage.get("iterations") or solver.MAX_ITER for stage in stages)
    contents["no_kd"] = {
        "MODEL": {"META_ARCHITECTURE": stock_name(cfg.MODEL.META_ARCHITECTURE)},
        "KD": {"LADDER": {"STAGES": []}},
        "SOLVER": {
            "STEPS": [round(step * total / solver.MAX_ITER) for step in solver.STEPS],
            "MAX_ITER": total,
        },
    }
    output = Path(args.output or f"{cfg.OUTPUT_DIR}_controls")
    output.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        file = output / f"{name}.yaml"
        base = os.path.relpath(args.ladder, output)
        own = {"_BASE_": base, **content, "OUTPUT_DIR": str(output / name)}
        file.write_text(yaml.safe_dump(own, sort_keys=False))
        print(f"python train_net.py --config-file {file}")


if __name__ == "__main__":
    first, *_, last = __doc__.strip().split("\n\n")
    parser = argparse.ArgumentParser(description=first, epilog=last)
    parser.add_argument("ladder", help="a student's config with KD.LADDER.STAGES")
    parser.add_argument("--output", help="folder for configs and runs; else <OUTPUT_DIR>_controls")
    try:
        main(parser.parse_args())
    except InputError as error:
        parser.error(str(error))
