"""How hard it is to predict one model's features from another's, and the order of teachers by it.

MTPD (arXiv 2308.09105) publishes no formula for its adaptation cost. Ours, C(A->B), is the share of
the variance of B's features that the best 1x1 convolution of A's features leaves unexplained on
held-out images. We call the resulting order "MTPD-style".

r: rows, one per cell of an image; C: channels of the source A; D: of the target B; I: images.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from msad_kd.utils.errors import InputError

RIDGE = 1e-8  # relative to the whitened source's mean square, which is 1
# Directions with a smaller share of the largest variance are fp32 rounding errors; whitening would
# amplify them.
RANK_TOLERANCE = 1e-12
ROWS_PER_CHANNEL = 2  # needed to fit; with fewer rows the cost depends on the sample's size
ROWS_AT_ONCE = 1 << 15  # 64 MB in fp64 at 256 channels


class AffineMap(NamedTuple):
    """The map x -> (x - mean) weight + offset in fp64."""

    mean: torch.Tensor  # (C,)
    weight: torch.Tensor  # (C, D)
    offset: torch.Tensor  # (D,), the target's mean over the training split

    def __call__(self, source: torch.Tensor) -> torch.Tensor:
        """Map rows (r, C) to (r, D)."""
        return (source.double() - self.mean) @ self.weight + self.offset


@dataclass(frozen=True)
class Cost:
    """C(A->B): 0 if B's features are an affine map of A's, 1 if A's features say nothing of B's."""

    value: float  # mean over levels
    low: float  # bounds of the 95 % interval over images
    high: float
    levels: dict[str, float]


def _blocks(*features: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield rows in fp64, a block at a time: features may be files larger than the memory."""
    for start in range(0, len(features[0]), ROWS_AT_ONCE):
        yield tuple(x[start : start + ROWS_AT_ONCE].double() for x in features)


def _mean(features: torch.Tensor) -> torch.Tensor:
    return sum(x.sum(0) for (x,) in _blocks(features)) / len(features)


def _whitening(source: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Return (C, rank): it maps the centred source to uncorrelated directions of variance 1."""
    deviation = sum((x - mean).square().sum(0) for (x,) in _blocks(source)).div(len(source)).sqrt()
    # Scale the channels alike first: a small channel is not a rounding error. A channel that is
    # constant up to rounding is dropped.
    varies = deviation > 1e-9 * mean.abs()
    scale = torch.where(varies, deviation, torch.inf).reciprocal()
    scaled = ((x - mean) * scale for (x,) in _blocks(source))
    covariance = sum(x.T @ x for x in scaled) / len(source)
    variances, directions = torch.linalg.eigh(covariance)
    kept = variances > RANK_TOLERANCE * variances[-1]
    return scale[:, None] * directions[:, kept] / variances[kept].sqrt()


def fit_affine(source: torch.Tensor, target: torch.Tensor) -> AffineMap:
    """Fit the affine map with the least squared error from rows (r, C) to the same cells' (r, D).

    The source is whitened, so the ridge acts alike on any affine version of it.
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
    gram.diagonal().add_(RIDGE * len(source))
    return AffineMap(mean, whitening @ torch.linalg.solve(gram, cross), offset)


def image_errors(
    fitted: AffineMap, source: torch.Tensor, target: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    """Return (I, 2): the squared error of the map and that of the training split's mean, by image.

    ``source`` (r, C) and ``target`` (r, D) hold ``counts`` (I,) rows of one image after the other.
    """
    errors = [
        torch.stack(((y - fitted(x)).square().sum(1), (y - fitted.offset).square().sum(1)), 1)
        for x, y in _blocks(source, target)
    ]
    return torch.stack([rows.sum(0) for rows in torch.cat(errors).split(counts.tolist())])


def _unexplained(errors: torch.Tensor) -> torch.Tensor:
    return errors[..., 0] / errors[..., 1].clamp(min=torch.finfo(torch.float64).tiny)


def training_images(images: int) -> int:
    """Return the number of images a map is fitted to: 80 %. ``InputError`` below five images."""
    if images < 5:
        raise InputError(f"an adaptation cost needs five images or more; there are {images}")
    return images * 4 // 5


def enough_rows(counts: torch.Tensor, channels: int) -> bool:
    """Return whether the training split of ``counts`` (I,) rows is enough for C channels."""
    return int(counts[: training_images(len(counts))].sum()) >= ROWS_PER_CHANNEL * channels


def adaptation_cost(
    levels: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    *,
    seed: int = 0,
    resamples: int = 1000,
) -> Cost:
    """Return C(A->B): 1 - R^2 of the best affine map on held-out images, averaged over levels.

    R^2 is over all channels together, relative to the target's mean in the training split.

    Args:
        levels: level name to (source (r, C), target (r, D), counts (I,)): rows of the same cells,
            image after image in random order; the first 80 % of the images are the training split.
        seed: of the bootstrap over held-out images, which does not refit the map.
        resamples: of the bootstrap.

    Raises:
        InputError: if a level has too few images or rows, or a target that does not vary.
    """
    errors = []  # of each level, (held-out images, 2)
    for level, (source, target, counts) in levels.items():
        if not enough_rows(counts, source.shape[1]):
            raise InputError(
                f"level {level}: too few rows to fit a map from {source.shape[1]} channels; it "
                f"needs {ROWS_PER_CHANNEL} per channel, so sample more images or cells"
            )
        images = training_images(len(counts))
        rows = int(counts[:images].sum())
        fitted = fit_affine(source[:rows], target[:rows])
        errors.append(image_errors(fitted, source[rows:], target[rows:], counts[images:]))
        if not errors[-1][:, 1].sum() > 0:
            raise InputError(f"level {level}: the target is the same in all held-out images")
    held_out, generator = len(errors[0]), torch.Generator().manual_seed(seed)
    draws = torch.randint(held_out, (resamples, held_out), generator=generator)
    resampled = torch.stack([_unexplained(level[draws].sum(1)) for level in errors]).mean(0)
    low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    values = _unexplained(torch.stack(errors).sum(1))
    return Cost(float(values.mean()), low, high, dict(zip(levels, values.tolist())))


def greedy_order(
    costs: dict[str, dict[str, float]], student: str, strongest: str
) -> tuple[list[str], dict[str, str]]:
    """Order the teachers by backward greedy selection, and say why the others are left out.

    The sequence ends with the strongest teacher. As long as any teachers are closer to the student
    than the head of the sequence, the one that is cheapest to adapt to the head goes before it.
    ``costs[a][b]`` is C(a->b), from the student and every teacher to every teacher.
    """
    order = [strongest]
    pool = [name for name in costs if name not in (student, strongest)]
    distance = costs[student]
    while closer := [name for name in pool if distance[name] < distance[order[0]]]:
        order.insert(0, min(closer, key=lambda name: (costs[name][order[0]], name)))
        pool.remove(order[0])
    first = order[0]
    return order, {
        name: f"not closer to the student than {first}: C({student}->{name}) = "
        f"{distance[name]:.4f}, C({student}->{first}) = {distance[first]:.4f}"
        for name in pool
    }
