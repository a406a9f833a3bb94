"""What the demo says of its results: the share of the gap, the table, the verification."""

import pytest
import torch
from demo_rows import ap, row

from projects.Shapes import report
from projects.Shapes.jobs import DemoError, clock

ROWS = [row(*each) for each in (("hr", 44, 40), ("lr", 34, 30), ("student", 36, 35))]
ROWS.append(row("lr-from-teacher", 35, 36))


def test_gap_closed_is_the_share_of_the_distance_to_the_hr_model():
    assert report.gap_closed(student=36.0, baseline=34.0, high=44.0) == pytest.approx(0.2)
    assert report.gap_closed(student=33.0, baseline=34.0, high=44.0) == pytest.approx(-0.1)
    assert report.gap_closed(student=36.0, baseline=34.0, high=34.0) is None


def test_gaps_of_a_table():
    closed = report.close_gaps([*ROWS, row("teacher-hr", 50, 50)])
    assert closed["lr"] == pytest.approx({"box": 0.2, "mask": 0.5})
    assert closed["lr-from-teacher"] == pytest.approx({"box": 1 / 9, "mask": -1 / 4})
    assert report.gap_sentence("LR", closed["lr"]) == (
        "Gap closed, (student - LR) / (stock HR - LR): box AP 20 %, mask AP 50 %."
    )
    assert "cannot be told" in report.gap_sentence("LR", {"box": None, "mask": 0.5})


def test_table_has_a_dash_for_sizes_that_do_not_occur():
    header, _, line = report.table([row("lr", 34.04, 33.96, gmacs=0.1234)]).splitlines()
    names = [cell.strip() for cell in header.strip("|").split("|")]
    cells = dict(zip(names, [cell.strip() for cell in line.strip("|").split("|")]))
    assert cells == {
        "model": "model lr",
        "test side (px)": "64",
        "box AP": "34.0",
        "mask AP": "34.0",
        "APs": "34.0",
        "APm": "34.0",
        "APl": "-",
        "GMACs": "0.12",
        "params (M)": "1.50",
        "latency (ms)": "41 (39-44)",
    }


def test_markdown_tells_what_a_reader_needs_to_repeat_it():
    run = {"iterations": 1200, "batch_size": 8, "seed": 1, "full": False, "data": {"train": 300}}
    run |= {"device": "no GPU", "machine": "some CPU, 2 cores", "seconds": 725}
    run |= {"learning_rate": {"lr": 0.006, "student": 0.002}}
    run |= {"train_sides": {"lr": [64], "student": [48, 64]}}
    text = report.markdown({"rows": ROWS, "gap_closed": report.close_gaps(ROWS), "run": run})
    for part in ("1200 iterations of 8 images, seed 1", "train 300", "some CPU, 2 cores", "12:05"):
        assert part in text
    assert "images: model lr 0.006, 64 px; model student 0.002, 48/64 px." in text
    assert "(student - model lr-from-teacher)" in text
    assert "one CPU thread" in text and "model student" in text


def test_machine_names_versions():
    assert f"torch {torch.__version__.partition('+')[0]}" in report.machine("no GPU")


def test_clock():
    assert [clock(seconds) for seconds in (0, 65, 3600, 7322.4)] == [
        "0:00",
        "1:05",
        "1:00:00",
        "2:02:02",
    ]


def test_verification_within_the_tolerance():
    sentence = report.verify("teacher, fused", "t.pth", ap(44.5, 43.0), ap(44.65, 42.85))
    assert sentence.startswith("teacher, fused: box AP 44.5, mask AP 43.0, as recorded")


@pytest.mark.parametrize("box, mask, said", [(44.1, 43.0, "box AP 44.1"), (44.5, 40, "mask AP 40")])
def test_verification_names_the_file_and_both_numbers(box, mask, said):
    with pytest.raises(DemoError, match=rf"teacher has {said}.* here, but .* beside 't.pth'"):
        report.verify("teacher", "t.pth", ap(box, mask), ap(44.5, 43.0))


def test_verification_refuses_nan():
    with pytest.raises(DemoError):
        report.verify("teacher", "t.pth", ap(float("nan"), 43.0), ap(44.5, 43.0))
