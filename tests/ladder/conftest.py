"""Fixtures of the tests of ladders."""

import copy
import logging
import shutil

import pytest
from ladders import MGD

from msad_kd.config.build import build_config
from msad_kd.ladder.run import run_ladder


@pytest.fixture(scope="session")
def three_stages(config_files, teacher_weights):
    """The fused teacher, its high-resolution branch, the fused one again."""
    common = {"config_file": str(config_files["teacher"]), "weights": str(teacher_weights)}
    return [
        {**common, "name": "first", "losses": MGD, "iterations": 2, "start": "teacher"},
        {**common, "name": "second", "kind": "plain", "image": "hr", "losses": MGD},
        {**common, "name": "third", "iterations": 1, "base_lr": 0.0005},
    ]


@pytest.fixture
def stages(three_stages):
    """The three stages, to be changed."""
    return copy.deepcopy(three_stages)


def make_config(config_files, stages, folder, *options):
    keys = ["KD.LADDER.STAGES", stages, "OUTPUT_DIR", str(folder)]
    keys += ["SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, "DATASETS.TEST", []]
    keys += ["KD.TEACHER.EVAL_BEFORE_TRAIN", False]
    cfg = build_config(str(config_files["student"]), [*keys, *options])
    cfg.freeze()
    return cfg


@pytest.fixture
def ladder_config(config_files, stages, tmp_path):
    """ladder_config(folder, KEY, VALUE, ...): a frozen config of the three stages."""
    return lambda folder="ladder", *options: make_config(
        config_files, stages, tmp_path / folder, *options
    )


@pytest.fixture(scope="session")
def trained(config_files, three_stages, tmp_path_factory):
    """The folder of a ladder of the three stages that has been run."""
    folder = tmp_path_factory.mktemp("trained") / "ladder"
    run_ladder(make_config(config_files, three_stages, folder), resume=False)
    return folder


@pytest.fixture
def resume(caplog):
    """resume(cfg): resume a ladder, and return what it logs."""

    def run(cfg):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            run_ladder(cfg, resume=True)
        return caplog.text

    return run


@pytest.fixture
def finished(trained, ladder_config, stages):
    """The config of a ladder of one stage that has been run."""
    del stages[1:]
    cfg = ladder_config()
    shutil.copytree(trained, cfg.OUTPUT_DIR)
    return cfg
