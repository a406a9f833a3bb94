"""Rows as the demo makes them, for the tests of its parts."""

TEACHER = [f"teacher_jitter-{branch}" for branch in ("hr", "lr", "fused")]
KEYS = ["hr", *TEACHER, "lr", "lr-from-teacher", "student"]


def ap(box, mask):
    """What `measure.py` tells of a model, as far as it matters."""
    return {"bbox": {"AP": box}, "segm": {"AP": mask}}


def row(key, box, mask, gmacs=0.5):
    """A row of `table.json`."""
    return {
        "key": key,
        "model": f"model {key}",
        "side": "64",
        "box": {"AP": box, "APs": box, "APm": box, "APl": None},
        "mask": {"AP": mask},
        "gmacs": gmacs,
        "params_m": 1.5,
        "latency_ms": {"median": 41.2, "low": 38.7, "high": 44.4},
    }
