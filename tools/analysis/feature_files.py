"""Features of several models on the same images, for the tools that compare them."""

from pathlib import Path

import torch
from adaptation_cost import Cost, adaptation_cost, enough_rows, training_images
from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from detectron2.layers import ShapeSpec
from feature_sampling import (
    cell_counts,
    cells_per_image,
    common_strides,
    read_features,
    write_features,
)
from tqdm import tqdm

from msad_kd import InputError, TwoResolutionMapper
from msad_kd.data.dict_checks import explain_missing_data
from msad_kd.distill.teacher import Teacher
from msad_kd.utils.seed import derive_seed


class Measurement:
    """Writes the features of models to files, and computes the costs between models."""

    def __init__(
        self, cfg: CfgNode, names: tuple[str, ...], *, images: int, seed: int, folder: Path
    ):
        """Draw the images.

        Args:
            cfg: the student's config.
            names: the data sets.
            images: how many of their images to draw.
            seed: decides images, cells and intervals.
            folder: the folder for the files.

        Raises:
            InputError: if a data set is missing or has fewer than five images.
        """
        with explain_missing_data(names):
            dicts = get_detection_dataset_dicts(names, filter_empty=False)
        generator = torch.Generator().manual_seed(derive_seed(seed))
        indices = torch.randperm(len(dicts), generator=generator)[:images]
        self.dicts = [dicts[i] for i in indices]
        training_images(len(self.dicts))
        self.mapper = TwoResolutionMapper(cfg, is_train=False, frame="lr")
        self.folder, self.seed, self.sizes = folder, seed, []

    def plan(self, levels: dict[str, dict[str, ShapeSpec]], cells: int) -> None:
        """Choose the levels that all models have, and the number of cells per image and level.

        Args:
            levels: the levels of each model.
            cells: the most cells to draw.
        """
        self.strides, left_out = common_strides(levels)
        for name, unused in left_out.items():
            if unused:
                print(f"{name}: {', '.join(unused)} left out: not every model has such a level")
        self.channels = {name: next(iter(x.values())).channels for name, x in levels.items()}
        widest = max(self.channels.values())
        self.cells = cells_per_image(len(self.dicts), len(self.strides), widest, cells)

    def add(self, name: str, model: Teacher, divisibility: int, label: str = "") -> None:
        """Write the features of one model.

        Args:
            name: the name of its files, as in ``plan``.
            model: the model.
            divisibility: images are padded to a multiple of this at low resolution.
            label: the label of the progress bar; by default the name.
        """
        bar = tqdm(self.dicts, desc=label or name, unit="image")
        inputs = (self.mapper(entry) for entry in bar)
        self.sizes = write_features(
            model,
            inputs,
            self.strides,
            cells=self.cells,
            divisibility=divisibility,
            seed=self.seed,
            folder=self.folder / name,
        )

    def one_width(self) -> bool:
        """Return whether all models have the same number of channels."""
        return len(set(self.channels.values())) == 1

    def rows(self, name: str, stride: int) -> torch.Tensor:
        """Return the features of a model at a level, (r, C)."""
        return read_features(self.folder / name, stride, self.channels[name])

    def counts(self, stride: int) -> torch.Tensor:
        """Return how many of the rows belong to each image, (I,)."""
        return cell_counts(self.sizes, stride, self.cells)

    def costs(self) -> dict[str, dict[str, Cost]]:
        """Return ``costs[a][b]``, C(a->b), for every pair of models; C(a->a) should be 0.

        Raises:
            InputError: if no level has enough rows.
        """
        counts = {stride: self.counts(stride) for stride in self.strides}
        widest = max(self.channels.values())
        used = [stride for stride in self.strides if enough_rows(counts[stride], widest)]
        for stride in self.strides:
            if stride not in used:
                print(
                    f"stride {stride} left out: its {int(counts[stride].sum())} rows are too few "
                    f"for {widest} channels"
                )
        if not used:
            raise InputError(
                f"{len(self.dicts)} images of {self.cells} cells a level are too few for {widest} "
                "channels at every level; raise --images or --cells"
            )
        self.strides = used
        pairs = [(a, b) for a in self.channels for b in self.channels]
        costs = {name: {} for name in self.channels}
        for a, b in tqdm(pairs, desc="costs", unit="pair"):
            levels = {f"stride {x}": (self.rows(a, x), self.rows(b, x), counts[x]) for x in used}
            costs[a][b] = adaptation_cost(levels, seed=derive_seed(self.seed, 1))
        return costs
