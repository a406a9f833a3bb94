"""Masks are encoded bit for bit as by pycocotools."""

import numpy as np
import pycocotools.mask as mask_util
import pytest

from msad_kd.evaluation.rle import encode

HEIGHT, WIDTH = 30, 40
RANDOM = np.random.default_rng(0).random((HEIGHT, WIDTH)) < 0.5


def filled(y0, y1, x0, x1, inside=True):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y0:y1, x0:x1] = inside
    return mask


CASES = {  # masks and their boxes
    "in its box": (filled(5, 20, 7, 30, RANDOM[:15, :23]), (7.4, 5.2, 29.8, 19.9)),
    "one pixel beyond its box": (filled(5, 20, 7, 30), (8, 6, 29, 19)),
    "far beyond its box": (RANDOM, (12, 5, 20, 10)),
    "nowhere near its box": (filled(0, 3, 0, 3), (20, 20, 25, 25)),
    "empty": (filled(0, 0, 0, 0), (3, 3, 9, 9)),
    "full": (filled(0, HEIGHT, 0, WIDTH), (0, 0, WIDTH, HEIGHT)),
    "all rows of some columns": (filled(0, HEIGHT, 9, 12), (9, 0, 12, HEIGHT)),
    "all but the upper row": (filled(1, HEIGHT, 9, 12), (9, 3, 12, HEIGHT)),
    "all but the lower row": (filled(0, HEIGHT - 1, 9, 12), (9, 0, 12, HEIGHT - 4)),
    "the first pixel": (filled(0, 1, 0, 1), (0, 0, 1, 1)),
    "the last pixel": (filled(HEIGHT - 1, HEIGHT, WIDTH - 1, WIDTH), (38, 28, WIDTH, HEIGHT)),
    "a box beyond the image": (filled(10, HEIGHT, 0, 9), (-30, 10, 9, 90)),
    "a box turned round": (filled(5, 20, 7, 30), (30, 20, 7, 5)),
    "a box of no number": (filled(5, 20, 7, 30), (np.nan, 5, np.inf, 20)),
}


@pytest.mark.parametrize("dtype", [bool, np.uint8])
@pytest.mark.parametrize("cases", [*([key] for key in CASES), list(CASES), []], ids=str)
def test_same_bits_as_pycocotools(cases, dtype):
    masks = np.array([CASES[key][0] for key in cases], dtype).reshape(-1, HEIGHT, WIDTH)
    boxes = np.array([CASES[key][1] for key in cases], np.float32).reshape(-1, 4)
    expected = [mask_util.encode(np.asfortranarray(mask, np.uint8)) for mask in masks]
    expected = [{**rle, "counts": rle["counts"].decode()} for rle in expected]
    assert encode(masks, boxes) == expected
