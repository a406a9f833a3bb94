"""Trainings by two processes on the CPU."""

import os
import subprocess
import sys

from helpers import ROOT, run_script

TERMS = [
    {"name": "l1", "weight": 0.6, "adapter": True, "warmup_iters": 2},
    {"name": "mgd", "weight": 1e-4, "levels": ["p2", "p3"]},
]
TORCHRUN_2 = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
LAUNCHED = ("--num-gpus", 2)


def start(config_file, folder, *arguments, by=LAUNCHED, launcher=None, **options):
    """Train four steps by train_net.py in two processes that share its batches; flags first.

    They are forked, unless ``launcher`` says what is to run train_net.py: () is Python itself.
    """
    flags = [x for x in arguments if str(x).startswith("--")]
    keys = [
        *("KD.LOSSES", TERMS, "SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2),
        *("SOLVER.IMS_PER_BATCH", 4, "OUTPUT_DIR", folder, *arguments[len(flags) :]),
    ]
    flags += [*by, "--config-file", config_file]
    if launcher is None:
        return run_script("train_net.py", *flags, *keys, **options)
    command = [sys.executable, *map(str, [*launcher, ROOT / "train_net.py", *flags, *keys])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done
