"""Fixtures of the tests of annotation files."""

import json

import pytest
from annotation_files import HEIGHT, WIDTH
from PIL import Image


@pytest.fixture
def files(tmp_path):
    """files(content): load_checked's first arguments for a content, or for a text."""
    for name in ("7.png", "9.png"):
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / name)

    def write(content):
        text = content if isinstance(content, (str, bytes)) else json.dumps(content)
        path = tmp_path / "file.json"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path), str(tmp_path)

    return write
