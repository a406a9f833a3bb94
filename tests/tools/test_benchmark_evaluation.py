"""The benchmark of COCO's AP."""

import sys

from helpers import load_tool


def test_it_prints_a_table_of_parts_after_equal_results(monkeypatch, capsys):
    options = ["--images", "6", "--objects", "40", "--detections", "120", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmark_evaluation.py", *options])
    tool = load_tool("benchmark_evaluation")
    tool.main()
    first, *_, header, _ = (lines := capsys.readouterr().out.splitlines())[: -len(tool.PARTS) - 1]
    assert first.startswith("Equal results, AP ") and "Detectron2, pycocotools | ours" in header
    parts = [line.split("|")[1].strip() for line in lines[-len(tool.PARTS) - 1 :]]
    assert parts == [*tool.PARTS, "all"]


def test_a_part_within_another_counts_for_itself_alone(monkeypatch):
    clock = load_tool("benchmark_evaluation").Clock()
    times = iter([0.0, 1.0, 4.0, 5.0, 7.0, 9.0])
    monkeypatch.setattr("time.process_time", lambda: next(times))
    with clock.part("outer"):
        for _ in range(2):
            clock.part("inner")(int)()
    assert clock.seconds == {"outer": 4.0, "inner": 5.0}
