"""Fixtures of the tests of commands."""

import json
import os

import numpy as np
import pytest
from annotation_files import HEIGHT, WIDTH, valid_content
from helpers import load_tool
from PIL import Image


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Undo what distill.py does to the environment."""
    monkeypatch.setenv("DETECTRON2_DATASETS", os.getenv("DETECTRON2_DATASETS", "datasets"))


@pytest.fixture
def mine(tmp_path):
    """A folder with a valid data set: mine.json, and photos/7.png and 9.png."""
    (tmp_path / "photos").mkdir()
    for name in ("7.png", "9.png"):
        pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / name)
    (tmp_path / "mine.json").write_text(json.dumps(valid_content()))
    return tmp_path


@pytest.fixture
def check(mine, capsys):
    """check(argument, ...): the exit code, and what was printed; by default of ``mine``."""

    def run(*arguments):
        data = ("--json", mine / "mine.json", "--images", mine / "photos")
        code = 0
        try:
            load_tool("check_dataset").main(
                [*map(str, arguments or data), "--output", str(mine / "out")]
            )
        except SystemExit as error:
            code = error.code
        return code, capsys.readouterr().out

    return run


@pytest.fixture
def pair(mine, config_files):
    """pair(train, test, KEY, VALUE, ...): arguments to check two contents by a config."""

    def arguments(train, test, *opts):
        entries = []
        for name, content in (("one", train), ("two", test)):
            (mine / f"{name}.json").write_text(json.dumps(content))
            files = {"json": str(mine / f"{name}.json"), "images": str(mine / "photos")}
            entries.append({"name": name, **files})
        keys = ["DATASETS.COCO_FORMAT", str(entries)]
        keys += ["DATASETS.TRAIN", "('one',)", "DATASETS.TEST", "('two',)"]
        keys += ["MODEL.ROI_HEADS.NUM_CLASSES", "2"]
        return ["--config-file", config_files["lr"], *keys, *opts]

    return arguments
