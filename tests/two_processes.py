"""Trainings by two processes on the CPU."""

import os
import signal
import subprocess
import sys

from helpers import ROOT

TERMS = [
    {"name": "l1", "weight": 0.6, "adapter": True, "warmup_iters": 2},
    {"name": "mgd", "weight": 1e-4, "levels": ["p2", "p3"]},
]
TORCHRUN_2 = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
LAUNCHED = ("--num-gpus", 2, "--dist-url", "auto")


def start(config_file, folder, *arguments, by=LAUNCHED, launcher=(), **environment):
    """Train four steps by train_net.py in two processes that share its batches; flags first."""
    flags = [x for x in arguments if str(x).startswith("--")]
    options = [
        *("KD.LOSSES", TERMS, "SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2),
        *("SOLVER.IMS_PER_BATCH", 4, "OUTPUT_DIR", folder, *arguments[len(flags) :]),
    ]
    flags += [*by, "--config-file", config_file]
    quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *map(str, [*launcher, ROOT / "train_net.py", *flags, *options])],
        cwd=ROOT,
        env={**os.environ, **quiet, **environment},
        capture_output=True,
        text=True,
        # A shell's background job ignores it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run(*arguments, **options):
    """Run the same, which has to succeed."""
    process = start(*arguments, **options)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    return process
