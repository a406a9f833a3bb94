"""What the demo tells of its metrics."""

from projects.Shapes import measure


def test_sizes_present():
    assert measure.sizes_present([100, 1023]) == {"APs"}
    assert measure.sizes_present([100, 5000, 20000]) == {"APs", "APm", "APl"}


def test_nothing_found_is_ap_0_and_nothing_there_is_none():
    metrics = dict.fromkeys(measure.METRICS, float("nan")) | {"AP50": 12.5}
    tidy = measure.tidy_metrics(metrics, {"APs"})
    assert tidy == {"AP": 0.0, "AP50": 12.5, "AP75": 0.0, "APs": 0.0, "APm": None, "APl": None}
