"""The demo end to end, with a few scenes and steps."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
from demo_rows import KEYS
from helpers import ROOT

from projects.Shapes import records
from projects.Shapes.demo import RESULTS


def run_demo(output, *arguments):
    """A demo with a few scenes and steps; (exit status, what it printed)."""
    few = ["--train", "6", "--val", "5", "--set", "SOLVER.IMS_PER_BATCH", "2"]
    command = [sys.executable, "projects/Shapes/demo.py", "--output", str(output), *few, *arguments]
    environment = {**os.environ, "DETECTRON2_DATASETS": str(output / "datasets")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def full_demo(tmp_path_factory):
    """The folder of a tiny `demo.py --full`, which leaves checkpoints, and what it printed."""
    output = tmp_path_factory.mktemp("demo")
    status, printed = run_demo(output, "--full", "--set", "SOLVER.MAX_ITER", "2")
    assert status == 0, printed
    return output, printed


def check_results(folder, printed, iterations):
    for name in RESULTS:
        assert (folder / name).stat().st_size > 0
    summary = json.loads((folder / "table.json").read_text())
    assert [each["key"] for each in summary["rows"]] == KEYS
    assert summary["run"]["iterations"] == iterations
    by_key = {each["key"]: each for each in summary["rows"]}
    for start, kind in itertools.product(("lr", "lr-from-teacher"), ("box", "mask")):
        student, baseline, high = (by_key[key][kind]["AP"] for key in ("student", start, "hr"))
        expected = None if high <= baseline else (student - baseline) / (high - baseline)
        assert summary["gap_closed"][start][kind] == pytest.approx(expected)
    assert by_key["student"]["params_m"] == by_key["lr"]["params_m"] == by_key["hr"]["params_m"]
    assert (
        by_key["teacher_jitter-fused"]["side"] == "128 + 64" and by_key["student"]["side"] == "64"
    )
    text = (folder / "table.md").read_text()
    assert text in printed and all(each["model"] in text for each in summary["rows"])
    for name in ("scenes.png", "ap_cost.png"):
        assert cv2.imread(str(folder / name)).std() > 10


@pytest.mark.long
def test_full_demo(full_demo):
    output, printed = full_demo
    check_results(output / "demo-full", printed, iterations=2)
    found = records.read(output / "demo-full" / "checkpoints")
    assert "configs/Shapes/teacher_jitter.yaml" in found["teacher_jitter"]["command"]
    size = sum(path.stat().st_size for path in (output / "demo-full" / "checkpoints").iterdir())
    assert size < 10e6


@pytest.mark.long
def test_demo_from_checkpoints(full_demo):
    output, _ = full_demo
    checkpoints = output / "demo-full" / "checkpoints"
    status, printed = run_demo(
        output, "--checkpoints", str(checkpoints), "--set", "SOLVER.MAX_ITER", "3"
    )
    assert status == 0, printed
    assert "there already, kept" in printed and printed.count("as recorded") == 4
    check_results(output / "demo", printed, iterations=3)
    assert "loss_kd" in (output / "demo" / "student" / "metrics.json").read_text()
    assert "loss_kd" not in (output / "demo" / "lr" / "metrics.json").read_text()


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_demo_stops_where_a_checkpoint_is_not_what_was_recorded(full_demo, tmp_path):
    output, _ = full_demo
    for path in (output / "demo-full" / "checkpoints").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    record = json.loads((tmp_path / "hr.json").read_text())
    record["results"]["hr"]["segm"]["AP"] = 50.0
    (tmp_path / "hr.json").write_text(json.dumps(record))
    status, printed = run_demo(
        output, "--checkpoints", str(tmp_path), "--set", "SOLVER.MAX_ITER", "100000"
    )
    assert status == 1
    assert printed.splitlines()[-1].startswith("demo.py: stock HR, p2-p6 has mask AP ")
    assert not (output / "demo" / "table.md").exists()
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")]
    assert not any(str(output / "demo").encode() in command for command in commands)
