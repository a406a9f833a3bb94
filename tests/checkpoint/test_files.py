"""Files that are complete or absent."""

import json
import os

import numpy as np
import pytest

from msad_kd.checkpoint.files import replacing, write_json


def test_a_file_is_replaced_at_the_end(tmp_path):
    path = tmp_path / "new" / "table.md"
    for text in ("old", "new"):
        with replacing(path) as part:
            part.write_text(text)
            assert path.exists() == (text == "new")  # the old one stays until the end
        assert path.read_text() == text
    assert os.listdir(path.parent) == ["table.md"]


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "table.json"
    path.write_text("{}")
    with pytest.raises(TypeError):
        write_json(path, {"ap": object()})
    with pytest.raises(OSError, match="disk"), replacing(path) as part:
        part.write_text("half a")
        raise OSError("the disk is full")
    assert path.read_text() == "{}" and os.listdir(tmp_path) == ["table.json"]


def test_numbers_of_numpy_are_written_as_floats(tmp_path):
    write_json(tmp_path / "a.json", {"ap": np.float32(0.5)})
    assert json.loads((tmp_path / "a.json").read_text()) == {"ap": 0.5}
