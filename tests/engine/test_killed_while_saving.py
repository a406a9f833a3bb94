"""Runs that are killed while they write a checkpoint, and resumed."""

import multiprocessing
import os
import random
import signal

import pytest
import torch
from helpers import NO_TEST, differing, train

from msad_kd.config.build import build_config


def die_at(cfg, moment, resume):
    """Train, and kill this process at a moment of writing: the n-th time a file is synced.

    Each checkpoint syncs six times: itself, its checksum and last_checkpoint, before and after each
    is renamed. A negative moment is the middle of the file that would be synced then.
    """
    sync, count = os.fsync, iter(range(1000))

    def dying(descriptor):
        if next(count) == abs(moment):
            if moment < 0 and not os.path.isdir(f"/proc/self/fd/{descriptor}"):
                path = os.readlink(f"/proc/self/fd/{descriptor}")
                os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)

    os.fsync = dying
    torch.manual_seed(0)
    train(cfg, resume=resume)


def killed(cfg, moment, resume=False):
    child = multiprocessing.get_context("fork").Process(target=die_at, args=(cfg, moment, resume))
    child.start()
    child.join(300)
    return child.exitcode


@pytest.fixture(scope="module")
def whole(files_of, tmp_path_factory):
    """The last checkpoint of the run that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    train(build_config(str(files_of("mask_rcnn")["lr"]), ["OUTPUT_DIR", str(folder), *NO_TEST]))
    return torch.load(folder / "model_final.pth", weights_only=True)


def check_kill(config, whole, moments):
    """Kill runs at these moments; after each six syncs, two more iterations are saved."""
    cfg = config("lr", *NO_TEST)
    for number, moment in enumerate(moments):
        assert killed(cfg, moment, resume=number > 0) == -signal.SIGKILL
    torch.manual_seed(0)
    resumed = train(cfg, resume=True)
    assert resumed.start_iter >= 2 * max(abs(moment) // 6 for moment in moments)
    again = torch.load(f"{cfg.OUTPUT_DIR}/model_final.pth", weights_only=True)
    assert differing(whole["model"], again["model"]) == []
    assert again["trainer"]["iteration"] == 3


def test_killed_while_it_writes_its_second_checkpoint(config, whole):
    check_kill(config, whole, [-6])


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
def test_killed_at_random_moments_of_writing(config, whole, seed):
    generator = random.Random(seed)
    moment = generator.choice([1, -1]) * generator.randrange(18)  # three checkpoints
    check_kill(config, whole, [moment, *([generator.randrange(5)] if moment < 12 else [])])
