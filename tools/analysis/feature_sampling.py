"""Features of several models at the same cells of the same images, kept in files.

The models may read different resolutions and name their levels differently: cells match where the
strides match. Strides are in pixels of the high-resolution image.

C: channels of a level; r: rows, one per sampled cell; I: images; k: HR side / LR side.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import torch
from detectron2.layers import ShapeSpec

from msad_kd.distill.teacher import Teacher
from msad_kd.utils.errors import InputError
from msad_kd.utils.seed import derive_seed

_BYTES_PER_MODEL = 10**9
_FLOAT = 4  # bytes of an fp32 number


def common_strides(
    models: dict[str, dict[str, ShapeSpec]],
) -> tuple[list[int], dict[str, list[str]]]:
    """Return the strides at which every model has a level, and each model's other levels.

    Costs are means over levels, so they are comparable only over the same levels.

    Args:
        models: model name to levels.

    Raises:
        InputError: if the models have no stride in common.
    """
    strides = {name: {x.stride for x in levels.values()} for name, levels in models.items()}
    common = sorted(set.intersection(*strides.values()))
    if not common:
        listed = "; ".join(f"{name}: {sorted(values)}" for name, values in strides.items())
        raise InputError(
            f"the models have no stride in common, in pixels of the high-resolution image: "
            f"{listed}; check KD.SCALE and the models' levels"
        )
    others = {
        name: [level for level, x in levels.items() if x.stride not in common]
        for name, levels in models.items()
    }
    return common, others


def cells_per_image(images: int, levels: int, channels: int, wanted: int) -> int:
    """Return how many cells per image and level fit into 1 GB per model, at most ``wanted``.

    A model takes images x levels x cells x channels x 4 bytes. Not even one cell: ``InputError``.
    """
    room = _BYTES_PER_MODEL // (images * levels * channels * _FLOAT)
    if room < 1:
        raise InputError(
            f"{images} images take more than 1 GB with one cell of {channels} channels at each of "
            f"{levels} levels; use fewer images"
        )
    return min(wanted, room)


def _grid(size: tuple[int, int], stride: int) -> tuple[int, int]:
    return -(-size[0] // stride), -(-size[1] // stride)


def sample_cells(size: tuple[int, int], stride: int, cells: int, seed: int) -> torch.Tensor:
    """Draw cells of a level without repetition: (r, 2) rows and columns.

    Args:
        size: (height, width) of the image without padding, in the stride's pixels.
        stride: of the level.
        cells: how many to draw; all if the image covers fewer.
        seed: the cells depend on it, the stride and the grid alone.
    """
    rows, columns = _grid(size, stride)
    generator = torch.Generator().manual_seed(derive_seed(seed, stride))
    drawn = torch.randperm(rows * columns, generator=generator)[:cells]
    return torch.stack((drawn // columns, drawn % columns), 1)


def cell_counts(sizes: list[tuple[int, int]], stride: int, cells: int) -> torch.Tensor:
    """Return (I,): how many cells ``sample_cells`` draws from each image."""
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
    """Write features at the sampled cells, and return the images' (height, width) at HR.

    Args:
        model: a student or teacher.
        inputs: dicts with ``image`` (3, h, w) and ``image_hr`` (3, kh, kw).
        strides: of the levels to write.
        cells: per image and level, as in ``sample_cells``.
        divisibility: of the student: its images are padded to a multiple of this.
        seed: the same for all models under comparison.
        folder: gets a file of fp32 rows (C,) for each stride, named after it.
    """
    names = {shape.stride: level for level, shape in model.levels().items()}
    folder.mkdir(parents=True, exist_ok=True)
    sizes = []
    with ExitStack() as stack:
        files = {
            stride: stack.enter_context(open(folder / str(stride), "wb")) for stride in strides
        }
        for number, entry in enumerate(inputs):
            height, width = entry["image"].shape[-2:]
            padded = (height + -height % divisibility, width + -width % divisibility)
            pyramid = model.pyramid([entry], padded)
            sizes.append((height * model.scale, width * model.scale))
            for stride, file in files.items():
                drawn = sample_cells(sizes[-1], stride, cells, derive_seed(seed, number))
                rows = pyramid[names[stride]][0][:, drawn[:, 0], drawn[:, 1]].T
                file.write(rows.float().cpu().contiguous().numpy().tobytes())
    return sizes


def read_features(folder: Path, stride: int, channels: int) -> torch.Tensor:
    """Return (r, C) in fp32 as ``write_features`` wrote it, mapped from the file."""
    file = folder / str(stride)
    numbers = file.stat().st_size // _FLOAT
    flat = torch.from_file(str(file), shared=False, size=numbers, dtype=torch.float32)
    return flat.view(-1, channels)
