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
    packed = [i for i, value in enumerate(counts) if isinstance(value, (str, bytes))]
    if not packed:
        return flatten(counts)
    texts = [_bytes(counts[i]) for i in packed]
    runs, numbers = _unpack(texts)
    if len(packed) == len(counts):
        return runs, numbers
    rows: list = list(counts)
    for i, number, end in zip(packed, numbers, np.cumsum(numbers.clip(min=0))):
        rows[i] = runs[end - number : end].tolist() if number >= 0 else None
    return flatten(rows)


def _bytes(text: str | bytes) -> bytes:
    if isinstance(text, bytes):
        return text
    return text.encode() if text.isascii() else b"\0"  # which is no number either


def _unpack(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Unpack compressed counts as pycocotools does, all at once; see ``run_lengths``."""
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    values = np.frombuffer(b"".join(texts), dtype=np.uint8).astype(np.int64) - 48
    owners = np.repeat(np.arange(len(texts)), lengths)
    last = (values & 32) == 0  # the last character of a number
    starts = np.flatnonzero(np.concatenate([[True], last[:-1]])) if len(values) else values
    sizes = np.diff(np.append(starts, len(values)))
    bad = np.zeros(len(texts), dtype=bool)
    bad[lengths == 0] = True
    bad[owners[(values < 0) | (values > 63)]] = True
    bad[owners[starts[sizes > _LONGEST]]] = True
    full = lengths > 0
    bad[full] |= ~last[np.cumsum(lengths)[full] - 1]
    if bad.any():  # once more without them: a number may have run from one text into the next
        numbers = np.full(len(texts), -1, dtype=np.int64)
        runs, numbers[~bad] = _unpack([text for text, wrong in zip(texts, bad) if not wrong])
        return runs, numbers
    if not len(values):
        return values.astype(float), lengths
    place = np.arange(len(values)) - np.repeat(starts, sizes)
    steps = np.add.reduceat((values & 31) << (5 * place), starts)
    negative = (values[starts + sizes - 1] & 16) != 0
    steps -= np.where(negative, 1 << (5 * sizes), 0)
    numbers = np.bincount(owners[starts], minlength=len(texts))
    # From the fourth run on, the text has the difference from the run two places before.
    place = np.arange(len(steps)) - np.repeat(np.cumsum(numbers) - numbers, numbers)
    chain = 3 * owners[starts] + np.where(place == 0, 0, 1 + place % 2)
    order = np.argsort(chain, kind="stable")
    sums = np.cumsum(steps[order])
    first = np.flatnonzero(np.diff(chain[order], prepend=-1))
    offsets = sums[first] - steps[order][first]
    runs = np.empty_like(steps)
    runs[order] = sums - np.repeat(offsets, np.diff(np.append(first, len(steps))))
    return runs.astype(float), numbers


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
        place = np.arange(len(runs)) - np.repeat(
            np.cumsum(numbers[good]) - numbers[good], numbers[good]
        )
        covered = reduce_rows(np.add, runs * (place % 2), numbers[good])
    areas[good] = np.where(~wrong & (total == pixels[good]), covered, np.nan)
    return areas
