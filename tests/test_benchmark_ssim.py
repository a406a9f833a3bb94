"""tools/benchmark_ssim.py runs, and reports what it says."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT


def test_quick_run(tmp_path):
    command = [sys.executable, "tools/benchmark_ssim.py", "--quick", "--blurs"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "ssim.md")],
        **{"cwd": ROOT, "env": environment, "capture_output": True, "text": True},
    )
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "ssim.json").read_text())
    assert content["machine"]["threads"] == 1 and content["machine"]["torch"]
    places = {(row["shape"], row["padding"], row["peer"]) for row in content["rows"]}
    assert len(places) == len(content["rows"]) == 2 * (2 + 3 + 1)
    for row in content["rows"]:
        if "cannot" in row:
            # No window of 11 fits inside.
            assert (row["shape"], row["padding"]) == ("7x11", "valid")
        else:
            middle, low, high = row["ratio"]
            assert 0 < low <= middle <= high
            assert row["ours_kept"] == 1.0 and row["peer_kept"] > 3
    assert {row["shape"] for row in content["blurs"]} == {"7x11", "13x21"}
    for row in content["summary"]:
        ratios = [
            min(r["ratio"][0] for r in content["rows"] if r.get("ratio") and same(r, row, shape))
            for shape in ("7x11", "13x21")
            if any(r.get("ratio") and same(r, row, shape) for r in content["rows"])
        ]
        assert row["least"] == pytest.approx(min(ratios))
        slack = 1e-9 * max(ratios)
        assert min(ratios) - slack <= row["geometric_mean"] <= max(ratios) + slack
    text = (tmp_path / "ssim.md").read_text()
    assert text.count("| cannot |") == 3 and "| cuda | | | not measured |" in text


def same(row, group, shape):
    return row["padding"] == group["padding"] and row["shape"] == shape
