"""The benchmark of the checks of an annotation file."""

import sys

from helpers import load_tool


def test_it_prints_a_table(monkeypatch, capsys):
    options = ["--images", "20", "--annotations", "300", "--seed", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmark_annotations.py", *options])
    load_tool("benchmark_annotations").main()
    header, _, values = capsys.readouterr().out.splitlines()
    assert "checks" in header and values.startswith("| 20 | 300 | 0 |")
