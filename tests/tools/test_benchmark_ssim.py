"""tools/analysis/benchmark_ssim.py runs, and its report says what was measured."""

import json

import pytest
from helpers import load_tool, run_script

from msad_kd.utils.errors import InputError


def test_quick_run(tmp_path):
    arguments = ["--quick", "--blurs", "--output", tmp_path / "ssim.md"]
    run_script("tools/analysis/benchmark_ssim.py", *arguments)
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
    text = (tmp_path / "ssim.md").read_text()
    assert text.count("| cannot |") == 3 and "| cuda | | | not measured |" in text


def test_profile(tmp_path):
    arguments = ["--quick", "--profile", "--output", tmp_path / "ssim.md"]
    done = run_script("tools/analysis/benchmark_ssim.py", *arguments)
    # Three paddings of ours, and six peers, of which three have padding "valid" and need 11 cells.
    assert done.stdout.count("Self CPU time total") == 2 * (3 + 6) - 3
    assert "ours, cpu float32 13x21 valid" in done.stdout
    assert not (tmp_path / "ssim.md").exists()


def content(shape, ratio, cpu="this", peer="piqa"):
    row = {"device": "cpu", "dtype": "float32", "maps": 4, "padding": "zero", "peer": peer}
    row |= {"shape": shape, "ratio": [ratio] * 3, "ours_ms": [1.0] * 3, "peer_ms": [ratio] * 3}
    row |= {"ours_kept": 1.0, "peer_kept": 5.0}
    return {"machine": {"cpu": cpu}, "rows": [row], "blurs": []}


def test_rows_are_replaced_and_added_on_one_machine_only(tmp_path):
    tool, path = load_tool("ssim_benchmark_report"), tmp_path / "ssim.md"
    tool.write(path, content("13x21", 2.0))
    tool.write(path, content("7x11", 4.0), add=True)
    tool.write(path, content("13x21", 5.0, peer="slow"), add=True)
    text = tool.write(path, content("13x21", 1.0), add=True)
    # Of the fastest peer: the least and the geometric mean of 4 and 1.
    assert text == path.read_text() and "| 1.00x, 13x21 | 2.00x | 5.0x |" in text
    rows = json.loads(path.with_suffix(".json").read_text())["rows"]
    assert [row["ratio"][0] for row in rows] == [4.0, 1.0, 5.0]
    with pytest.raises(InputError, match="ssim.json' was measured elsewhere: {'cpu': 'this'}"):
        tool.write(path, content("7x11", 9.0, cpu="other"), add=True)
    assert path.read_text() == text
