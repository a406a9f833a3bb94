"""The order of a ladder's teachers, by how far one model's features are from another's.

Progressive distillation (arXiv 2308.09105) selects its sequence of teachers greedily, by a cost of
adapting one representation to the next. We have the cost's name and no formula, so the one here is
ours, and the order is called 'MTPD-style': C(A->B) is the share of B's variance that the best 1x1
convolution of A's features leaves unexplained, on images it was not fitted to.

r: rows, one a cell of an image; C: channels of the source; D: of the target; I: images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from msad_kd.utils.errors import InputError

__all__ = [
    "AffineMap",
    "Cost",
    "adaptation_cost",
    "enough_rows",
    "fit_affine",
    "greedy_order",
    "image_errors",
    "training_images",
]

RIDGE = 1e-8  # on the normal equations of the whitened source, relative to their diagonal
# Directions of the source with less than this share of the largest variance are rounding errors of
# fp32 maps; whitening would blow them up.
RANK_TOLERANCE = 1e-12
ROWS_PER_CHANNEL = 2  # of the training split; with fewer, the cost tells of the sample's size
ROWS_AT_ONCE = 1 << 15  # 64 MB in fp64 at 256 channels


class AffineMap(NamedTuple):
    """x -> (x - mean) weight + offset, in fp64."""

    mean: torch.Tensor  # (C,)
    weight: torch.Tensor  # (C, D)
    offset: torch.Tensor  # (D,), the target's mean on the training split

    def __call__(self, source: torch.Tensor) -> torch.Tensor:
        """What the map makes of cells (cells, channels), in double precision."""
        return (source.double() - self.mean) @ self.weight + self.offset


@dataclass(frozen=True)
class Cost:
    """C(A->B): 0 when B's features are an affine map of A's, 1 when A tells nothing of B."""

    value: float  # mean over levels
    low: float  # 95 % interval over images
    high: float
    levels: dict[str, float]


def _blocks(*features: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Rows in fp64, some at a time: the features may be files larger than the memory for them."""
    for start in range(0, len(features[0]), ROWS_AT_ONCE):
        yield tuple(x[start : start + ROWS_AT_ONCE].double() for x in features)


def _mean(features: torch.Tensor) -> torch.Tensor:
    return sum(x.sum(0) for (x,) in _blocks(features)) / len(features)


def _whitening(source: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """(C, R) that makes the centred source's R directions uncorrelated, with variance 1."""
    deviation = sum((x - mean).square().sum(0) for (x,) in _blocks(source)).div(len(source)).sqrt()
    # Channels of one scale first: a small channel is no rounding error for being small. One that is
    # constant up to rounding is left out.
    lively = deviation > 1e-9 * mean.abs()
    scale = torch.where(lively, deviation, torch.inf).reciprocal()
    scaled = ((x - mean) * scale for (x,) in _blocks(source))
    covariance = sum(x.T @ x for x in scaled) / len(source)
    variances, directions = torch.linalg.eigh(covariance)
    kept = variances > RANK_TOLERANCE * variances[-1]
    return scale[:, None] * directions[:, kept] / variances[kept].sqrt()


def fit_affine(source: torch.Tensor, target: torch.Tensor, *, ridge: float = RIDGE) -> AffineMap:
    """The affine map with the least squared error, in closed form.

    The source is whitened, so that the ridge weighs alike on any affine version of it.

    Args:
        source: (r, C).
        target: (r, D), the same rows.
        ridge: relative to the whitened source's mean square, 1.
    """
    mean, offset = _mean(source), _mean(target)
    whitening = _whitening(source, mean)
    rank = whitening.shape[1]
    gram = torch.zeros(rank, rank, dtype=torch.float64)
    cross = torch.zeros(rank, target.shape[1], dtype=torch.float64)
    for x, y in _blocks(source, target):
        white = (x - mean) @ whitening
        gram += white.T @ white
        cross += white.T @ (y - offset)
    gram.diagonal().add_(ridge * len(source))
    return AffineMap(mean, whitening @ torch.linalg.solve(gram, cross), offset)


def image_errors(
    fitted: AffineMap, source: torch.Tensor, target: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    """(I, 2): squared error of the map, and of the training split's mean, summed over each image.

    Args:
        source, target: (r, C) and (r, D), image after image.
        counts: (I,) rows of each image.
    """
    image = torch.repeat_interleave(torch.arange(len(counts)), counts)
    errors, start = torch.zeros(len(counts), 2, dtype=torch.float64), 0
    for x, y in _blocks(source, target):
        pair = ((y - fitted(x)).square().sum(1), (y - fitted.offset).square().sum(1))
        errors.index_add_(0, image[start : start + len(x)], torch.stack(pair, 1))
        start += len(x)
    return errors


def training_images(images: int) -> int:
    """How many of the images a map is fitted to: 80 %; at least one is held out.

    Raises:
        InputError: if there are not five.
    """
    if images < 5:
        raise InputError(
            f"an adaptation cost needs five images or more, to hold 20 % out; there are {images}"
        )
    return images * 4 // 5


def enough_rows(counts: torch.Tensor, channels: int) -> bool:
    """Whether the training split has rows enough to fit a map from so many channels.

    Args:
        counts: (I,) rows of each image.
        channels: C.
    """
    return int(counts[: training_images(len(counts))].sum()) >= ROWS_PER_CHANNEL * channels


def adaptation_cost(
    levels: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    *,
    seed: int = 0,
    resamples: int = 1000,
) -> Cost:
    """C(A->B): 1 - R^2 of the best affine map on held-out images, mean over levels.

    R^2 is of all channels together, against the training split's mean of the target. The interval
    is a bootstrap's over held-out images; the map is not fitted anew.

    Args:
        levels: level to (source (r, C), target (r, D), counts (I,)), rows of the same cells, image
            after image in random order: the first 80 % of the images are the training split.
        seed: of the bootstrap.
        resamples: of the bootstrap.

    Raises:
        InputError: if there are too few images or rows, or if the target does not vary.
    """
    errors = []
    for level, (source, target, counts) in levels.items():
        if not len(source) == len(target) == int(counts.sum()):
            raise ValueError(f"{level}: {len(source)} and {len(target)} rows, {counts.sum()} told")
        if not enough_rows(counts, source.shape[1]):
            raise InputError(
                f"level {level}: there are too few rows to fit a map from {source.shape[1]} "
                f"channels; it takes {ROWS_PER_CHANNEL} a channel, so sample more images or cells"
            )
        images = training_images(len(counts))
        rows = int(counts[:images].sum())
        fitted = fit_affine(source[:rows], target[:rows])
        errors.append(image_errors(fitted, source[rows:], target[rows:], counts[images:]))
        if not errors[-1][:, 1].sum() > 0:
            raise InputError(f"level {level}: the target is the same in all held-out images")
    stacked = torch.stack(errors)  # levels, held-out images, 2
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(stacked.shape[1], (resamples, stacked.shape[1]), generator=generator)
    shares = [_unexplained(each[draws].sum(1)) for each in stacked]
    quantiles = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.stack(shares).mean(0).quantile(quantiles).tolist()
    own = _unexplained(stacked.sum(1))
    return Cost(float(own.mean()), low, high, dict(zip(levels, own.tolist())))


def _unexplained(errors: torch.Tensor) -> torch.Tensor:
    return errors[..., 0] / errors[..., 1].clamp(min=torch.finfo(torch.float64).tiny)


def greedy_order(
    costs: dict[str, dict[str, float]], student: str, strongest: str
) -> tuple[list[str], dict[str, str]]:
    """Backward greedy selection of the teachers (arXiv 2308.09105).

    The sequence ends with the strongest teacher. Before its head comes, again and again, the one
    that is cheapest to adapt to the head, among those closer to the student than the head is.

    Args:
        costs: ``costs[a][b]`` is C(a->b), of the student to every teacher and of every teacher to
            every other.
        student: the student's name in ``costs``.
        strongest: the name of the teacher to end with.

    Returns:
        the teachers in the order to learn from, and those left out, with the reason.
    """
    order = [strongest]
    pool = [name for name in costs if name not in (student, strongest)]
    distance = costs[student]
    while True:
        head = order[0]
        closer = [name for name in pool if distance[name] < distance[head]]
        if not closer:
            break
        order.insert(0, min(closer, key=lambda name: (costs[name][head], name)))
        pool.remove(order[0])
    excluded = {
        name: f"not closer to the student than {order[0]}: C({student}->{name}) = "
        f"{distance[name]:.4f}, C({student}->{order[0]}) = {distance[order[0]]:.4f}"
        for name in pool
    }
    return order, excluded
