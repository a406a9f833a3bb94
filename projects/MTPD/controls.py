#!/usr/bin/env python
"""Write the controls of a ladder, all of the ladder's total of iterations, as configs.

    python projects/MTPD/controls.py projects/MTPD/configs/Shapes/ladder.yaml

What a ladder gains over its strongest teacher alone may be the longer training, the restarts of the
learning rate or the start; each control takes one of them away. It prints how to run them.
"""

import argparse
import copy
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import yaml
from detectron2.modeling import META_ARCH_REGISTRY

from msad_kd import DistilledMixin, InputError, build_config

# What belongs to a stage's teacher; iterations, base_lr and start belong to its place.
TEACHERS = ("name", "config_file", "weights", "opts", "kind", "image", "losses")


def control_stages(stages: list[dict], max_iter: int) -> dict[str, list[dict]]:
    """The stages of each control that has a teacher.

    All start as the ladder does: from its first teacher's checkpoint where it starts from that
    teacher (but for running statistics that the checkpoint has for low resolution). A ladder that
    starts from its first teacher's neck and heads alone (``teacher_heads``) has controls that do so
    from theirs.

    Args:
        stages: KD.LADDER.STAGES of the ladder.
        max_iter: iterations of a stage that names none.
    """
    total = sum(stage.get("iterations", max_iter) for stage in stages)
    places = [{k: v for k, v in stage.items() if k not in TEACHERS} for stage in stages]
    if places[0].get("start") == "teacher":
        places[0]["start"] = stages[0]["weights"]
    whole = [{**places[0], "iterations": total}]
    return {
        "no_kd_same_start": _filled(whole, [_unheeded(stages[0])]),
        "strongest": _filled(whole, stages[-1:]),
        "strongest_restarted": _filled(places, [stages[-1]] * len(stages)),
        "first_restarted": _filled(places, [stages[0]] * len(stages)),
        "reversed": _filled(places, stages[::-1]),
    }


def _filled(places: list[dict], teachers: list[dict]) -> list[dict]:
    filled = []
    for number, (place, teacher) in enumerate(zip(places, teachers), start=1):
        own = {key: copy.deepcopy(teacher[key]) for key in TEACHERS if key in teacher}
        own["name"] = f"{number}_{own['name']}"  # names are told apart, teachers need not be
        filled.append({**own, **place})
    return filled


def _unheeded(stage: dict) -> dict:
    return {**stage, "losses": [{"name": "mse", "weight": 0.0}]}


def stock_name(name: str) -> str:
    """The meta-architecture that a student is without distillation."""
    for parent in META_ARCH_REGISTRY.get(name).__mro__[1:]:
        if parent.__name__ in META_ARCH_REGISTRY and not issubclass(parent, DistilledMixin):
            return parent.__name__
    raise InputError(f"MODEL.META_ARCHITECTURE '{name}' is no student")


def main(args):
    # As it stands in the file: each run scales its schedule to its processes.
    cfg = build_config(args.ladder, ["SOLVER.REFERENCE_WORLD_SIZE", 0])
    stages, solver = cfg.KD.LADDER.STAGES, cfg.SOLVER
    if not stages:
        raise InputError(f"'{args.ladder}' has no KD.LADDER.STAGES")
    contents = {
        name: {"KD": {"LADDER": {"STAGES": own}}}
        for name, own in control_stages(stages, solver.MAX_ITER).items()
    }
    total = sum(stage.get("iterations", solver.MAX_ITER) for stage in stages)
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("ladder", help="a student's config with KD.LADDER.STAGES")
    parser.add_argument("--output", help="folder for configs and runs; else <OUTPUT_DIR>_controls")
    try:
        main(parser.parse_args())
    except InputError as error:
        parser.error(str(error))
