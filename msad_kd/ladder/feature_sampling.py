"""Features of several models at the same cells of the same images, kept in files.

Models that are compared may read images of another resolution and have levels of other names; cells
are the same where strides are, in pixels of the high-resolution image.

C: channels of a level; r: rows, one a sampled cell; k: high-resolution side / low-resolution.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from detectron2.layers import ShapeSpec

from msad_kd.distill.teacher import Teacher
from msad_kd.utils.errors import InputError
from msad_kd.utils.seed import derive_seed

__all__ = [
    "cell_counts",
    "cells_per_image",
    "common_strides",
    "read_features",
    "sample_cells",
    "write_features",
]

BYTES_A_MODEL = 10**9
FLOAT = 4  # bytes of an fp32 number


def common_strides(
    models: dict[str, dict[str, ShapeSpec]],
) -> tuple[list[int], dict[str, list[str]]]:
    """The strides at which all models have a level.

    Costs are means over levels, which only the same levels make comparable.

    Args:
        models: name to levels, strides in pixels of the high-resolution image.

    Returns:
        the strides, finest first, and of each model the levels that are left out.

    Raises:
        InputError: if there is no such stride.
    """
    strides = {name: {x.stride for x in levels.values()} for name, levels in models.items()}
    common = sorted(set.intersection(*strides.values()))
    if not common:
        told = "; ".join(f"{name}: {sorted(own)}" for name, own in strides.items())
        raise InputError(
            f"no stride is common to all models, in pixels of the high-resolution image ({told}); "
            "check KD.SCALE and the models' levels"
        )
    left_out = {
        name: [level for level, x in levels.items() if x.stride not in common]
        for name, levels in models.items()
    }
    return common, left_out


def cells_per_image(images: int, levels: int, channels: int, wanted: int) -> int:
    """How many cells of an image and level a gigabyte a model leaves room for, up to ``wanted``.

    images x levels x cells x channels x 4 bytes: with 2,000 images, 5 levels and 256 channels, 64
    cells take 655 MB, and 97 are the most.

    Raises:
        InputError: if there is no room for one.
    """
    room = BYTES_A_MODEL // (images * levels * channels * FLOAT)
    if room < 1:
        raise InputError(
            f"one cell a level of {images} images, with {channels} channels at {levels} levels, "
            "takes more than 1 GB; use fewer images"
        )
    return min(wanted, room)


def _grid(size: tuple[int, int], stride: int) -> tuple[int, int]:
    return -(-size[0] // stride), -(-size[1] // stride)


def sample_cells(size: tuple[int, int], stride: int, cells: int, seed: int) -> torch.Tensor:
    """Cells of a level that the image touches, drawn without repetition; all, if they are fewer.

    Args:
        size: (height, width) of the image without padding.
        stride: of the level, in the same pixels.
        cells: how many to draw.
        seed: what is drawn depends on this and the sizes alone.

    Returns:
        (r, 2) rows and columns.
    """
    rows, columns = _grid(size, stride)
    generator = torch.Generator().manual_seed(derive_seed(seed, stride))
    drawn = torch.randperm(rows * columns, generator=generator)[:cells]
    return torch.stack((drawn // columns, drawn % columns), 1)


def cell_counts(sizes: list[tuple[int, int]], stride: int, cells: int) -> torch.Tensor:
    """(I,): how many cells ``sample_cells`` draws from each image."""
    grids = (_grid(size, stride) for size in sizes)
    return torch.tensor([min(cells, rows * columns) for rows, columns in grids])


@torch.no_grad()
def write_features(
    model: Teacher,
    inputs: Iterable[dict],
    strides: list[int],
    *,
    cells: int,
    divisibility: int,
    seed: int,
    folder: Path,
) -> list[tuple[int, int]]:
    """Write a model's features at the sampled cells: a file of fp32 rows (C,) for each stride.

    The rows go to the files image by image, so that they take no memory.

    Args:
        model: student or teacher.
        inputs: ``image`` (3, h, w) and ``image_hr`` (3, kh, kw), one image after the other.
        strides: in pixels of the high-resolution image.
        cells: as ``sample_cells``.
        divisibility: of which low-resolution images are padded to a multiple, as the student does.
        seed: the same for all models that are compared.
        folder: for the files, which are called by the strides.

    Returns:
        the images' (height, width) at high resolution.
    """
    names = {shape.stride: level for level, shape in model.levels().items()}
    os.makedirs(folder, exist_ok=True)
    files = {stride: open(folder / str(stride), "wb") for stride in strides}
    sizes = []
    try:
        for number, entry in enumerate(inputs):
            height, width = entry["image"].shape[-2:]
            padded = (height + -height % divisibility, width + -width % divisibility)
            pyramid = model.pyramid([entry], padded)
            sizes.append((height * model.scale, width * model.scale))
            for stride, file in files.items():
                drawn = sample_cells(sizes[-1], stride, cells, derive_seed(seed, number))
                rows = pyramid[names[stride]][0][:, drawn[:, 0], drawn[:, 1]].T
                file.write(rows.float().cpu().contiguous().numpy().tobytes())
    finally:
        for file in files.values():
            file.close()
    return sizes


def read_features(folder: Path, stride: int, channels: int) -> torch.Tensor:
    """(r, C) in fp32: what ``write_features`` wrote, read from the file where it is used."""
    file = folder / str(stride)
    numbers = file.stat().st_size // FLOAT
    flat = torch.from_file(str(file), shared=False, size=numbers, dtype=torch.float32)
    return flat.view(-1, channels)
