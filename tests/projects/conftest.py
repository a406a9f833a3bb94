"""Fixtures of the tests of studies."""

import pytest
import yaml

from projects.study.cells import make_cells
from projects.study.grid import read_grid


@pytest.fixture
def written(tmp_path):
    def write(grid, name="study.yaml"):
        (tmp_path / name).write_text(yaml.safe_dump(grid, sort_keys=False))
        return tmp_path / name

    return write


@pytest.fixture
def cells_of(written, tmp_path):
    return lambda grid, extra=(): make_cells(read_grid(written(grid)), tmp_path / "runs", extra)
