"""Compute what segmentations in COCO format cover, many at once and without decoding them.

N segmentations; a polygon is a list of x, y, x, y, ...; an RLE is a dict of ``size`` (height,
width) and ``counts``, the lengths of its runs, column by column, the first of background. Counts
are a list of numbers, or a text which packs 5 bits into a character.
"""

import numpy as np

from msad_kd.data.annotations.columns import flatten, reduce_rows

_LONGEST = 7  # characters of a number in a compressed RLE: 35 bits


def polygon_bounds(polygons: list[list]) -> tuple[np.ndarray, np.ndarray]:
    """Return what polygons span and their area.

    Args:
        polygons: N lists of at least 6 numbers, of even length.

    Returns:
        x and y of two corners (N, 4), and areas (N,), all NaN for what is no list of numbers.
    """
    flat, lengths = flatten(polygons)
    spans, areas = np.full((len(polygons), 4), np.nan), np.full(len(polygons), np.nan)
    good = lengths > 0
    sizes = lengths[good] // 2
    x, y = flat[0::2], flat[1::2]
    corners = [(np.minimum, x), (np.minimum, y), (np.maximum, x), (np.maximum, y)]
    spans[good] = np.stack([reduce_rows(*corner, sizes) for corner in corners], axis=1)
    following = np.arange(1, len(x) + 1)
    ends = np.cumsum(sizes) - 1
    following[ends] -= sizes  # after a polygon's last point comes its first
    with np.errstate(all="ignore"):
        cross = x * y[following] - x[following] * y
        areas[good] = np.abs(reduce_rows(np.add, cross, sizes)) / 2
    return spans, areas


def run_lengths(counts: list) -> tuple[np.ndarray, np.ndarray]:
    """Return the run lengths of N RLEs, one after another, and the number of runs of each.

    The number is -1 for counts that are neither a list of numbers nor a text with numbers.
    """
    return flatten([_unpack(x) if isinstance(x, (str, bytes)) else x for x in counts])


def _unpack(text: str | bytes) -> list[int] | None:
    """Return the run lengths in a text, as pycocotools reads them; None if it holds none."""
    if isinstance(text, str):
        if not text.isascii():
            return None
        text = text.encode()
    values = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - 48
    if not len(values) or values.min() < 0 or values.max() > 63:
        return None
    last = (values & 32) == 0  # the last character of a number
    starts = np.flatnonzero(np.append(True, last[:-1]))
    sizes = np.diff(starts, append=len(values))
    if not last[-1] or sizes.max() > _LONGEST:
        return None
    place = np.arange(len(values)) - np.repeat(starts, sizes)
    runs = np.add.reduceat((values & 31) << (5 * place), starts)
    runs -= np.where(values[last] & 16, 1 << (5 * sizes), 0)  # negative numbers
    # From the fourth run on, the text has the difference from the run two places before.
    for first in (1, 2):
        runs[first::2] = np.cumsum(runs[first::2])
    return runs.tolist()


def mask_areas(counts: list, pixels: np.ndarray) -> np.ndarray:
    """Return the pixels (N,) that N RLEs cover; NaN if the counts do not fit the image.

    Args:
        counts: the RLEs' counts.
        pixels: the number of pixels of each RLE's image (N,).
    """
    runs, numbers = run_lengths(counts)
    areas = np.full(len(counts), np.nan)
    good = numbers > 0
    with np.errstate(all="ignore"):
        wrong = reduce_rows(np.logical_or, ~((runs >= 0) & (runs == np.floor(runs))), numbers[good])
        total = reduce_rows(np.add, runs, numbers[good])
        odd = np.concatenate([np.arange(number) % 2 for number in numbers[good]] or [[]])
        covered = reduce_rows(np.add, runs * odd, numbers[good])
    areas[good] = np.where(~wrong & (total == pixels[good]), covered, np.nan)
    return areas
