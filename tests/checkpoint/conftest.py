"""Fixtures: a checkpointer, the folder of a run, and a payload."""

import shutil

import pytest
from checkpoints import FINAL, ONE, THREE, new_checkpointer, save
from payloads import bomb  # noqa: F401


@pytest.fixture
def checkpointer(tmp_path):
    """A fresh checkpointer of the folder, with a model of two tensors and a buffer."""
    return new_checkpointer(tmp_path)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    for name, iteration in ((ONE, 1), (THREE, 3), ("model_0000005.pth", 5), (FINAL, 5)):
        save(new_checkpointer(folder), name, iteration)
    return folder


@pytest.fixture
def run(tmp_path, finished_run):
    """The folder of a run with checkpoints after the iterations 1, 3 and 5, the last one twice."""
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    return tmp_path
