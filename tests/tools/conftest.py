"""A fixture of the tests of commands."""

import os

import pytest


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Undo what distill.py does to the environment."""
    monkeypatch.setenv("DETECTRON2_DATASETS", os.getenv("DETECTRON2_DATASETS", "datasets"))
