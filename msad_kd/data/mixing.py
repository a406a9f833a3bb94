"""Mixup for detection: a sample becomes a blend of two, with the objects of both.

Zhang et al. 2019, "Bag of Freebies for Training Object Detection Neural Networks", section 3.1,
without weights of the losses. H, W: height and width of the larger of both images.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.utils.data as torchdata
from detectron2.config import CfgNode
from detectron2.structures import BitMasks, Instances

from msad_kd.utils.errors import InputError
from msad_kd.utils.seed import derive_seed

_IMAGES = ("image", "image_hr", "image_lr")
# A sample's seed also gives seeds to the attempts of mapping it, which are numbered from 0.
_DRAW, _PARTNER = 1000, 1001


def mix(one: dict, other: dict, weight: float, mean: Sequence[float]) -> dict:
    """Return a mapped sample blended with another, whose file becomes "mixed_with".

    What is neither pixel nor object stays. Images are padded at the right and the bottom; if those
    of two resolutions differ by a factor k, so do the mixed ones.

    Args:
        one: a sample with "image" (C, H1, W1), and with "image_hr" or "image_lr" if the other has.
        other: another sample.
        weight: of the first one's pixels, from 0 to 1.
        mean: C pixel values to pad with.

    Raises:
        InputError: if the samples have segmentation maps.
    """
    if "sem_seg" in one:
        raise InputError("INPUT.MIXUP cannot mix segmentation maps; set INPUT.MIXUP.PROB to 0")
    mixed = {key: _blend(one[key], other[key], weight, mean) for key in _IMAGES if key in one}
    size = tuple(mixed["image"].shape[1:])
    for key, value in one.items():
        if isinstance(value, Instances):  # ground truth, and proposals if they are loaded
            mixed[key] = _union([value, other[key]], size)
    return {**one, **mixed, "mixed_with": other.get("file_name")}


def _blend(
    one: torch.Tensor, other: torch.Tensor, weight: float, mean: Sequence[float]
) -> torch.Tensor:
    height, width = map(max, one.shape[1:], other.shape[1:])
    colour = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
    first, second = (colour.repeat(1, height, width) for _ in range(2))
    for canvas, image in ((first, one), (second, other)):
        canvas[:, : image.shape[1], : image.shape[2]] = image
    mixed = second.lerp(first, weight)
    return mixed if one.is_floating_point() else mixed.round().to(one.dtype)


def _union(parts: list[Instances], size: tuple[int, int]) -> Instances:
    """Return the objects of both images in one of the size (H, W)."""
    padded = []
    for part in parts:
        new = Instances(size, **part.get_fields())
        if isinstance(part.get_fields().get("gt_masks"), BitMasks):
            height, width = part.image_size
            margins = (0, size[1] - width, 0, size[0] - height)
            new.gt_masks = BitMasks(torch.nn.functional.pad(part.gt_masks.tensor, margins))
        padded.append(new)
    # An image without objects has no gt_masks, which Instances.cat would miss.
    return Instances.cat([part for part in padded if len(part)] or padded[:1])


@dataclass
class MixedDataset(torchdata.Dataset):
    """Maps (index, seed) to a sample, which is mixed or not as the seed decides."""

    dataset: torchdata.Dataset  # maps (index, seed) to a sample
    partners: np.ndarray  # the images to mix with
    groups: np.ndarray  # the group of each image; a partner is of the same one
    prob: float  # the share of the samples that are mixed
    alpha: float  # the weights are drawn from Beta(alpha, alpha)
    mean: Sequence[float]  # to pad with

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        index, seed = key
        sample = self.dataset[key]
        generator = np.random.default_rng(derive_seed(seed, _DRAW))
        if generator.random() >= self.prob:
            return sample
        weight = generator.beta(self.alpha, self.alpha)
        partners = self.partners[self.groups[self.partners] == self.groups[index]]
        partner = int(generator.choice(partners))
        return mix(sample, self.dataset[partner, derive_seed(seed, _PARTNER)], weight, self.mean)


def add_mixup(
    dataset: torchdata.Dataset, cfg: CfgNode, partners: Sequence[int], groups: Sequence[int]
) -> torchdata.Dataset:
    """Return a data set with the mixup of INPUT.MIXUP; the same one if it is off.

    Raises:
        InputError: if images are not resized, so that a pair of them could be huge.
    """
    inputs = cfg.INPUT
    if inputs.MIXUP.PROB == 0:
        return dataset
    if not (inputs.JITTER.SIZE or any(inputs.MIN_SIZE_TRAIN)):
        raise InputError(
            f"INPUT.MIXUP.PROB is {inputs.MIXUP.PROB}, but no image is resized to be mixed; set "
            "INPUT.MIN_SIZE_TRAIN or INPUT.JITTER.SIZE above 0"
        )
    drawn, mean = (inputs.MIXUP.PROB, inputs.MIXUP.ALPHA), cfg.MODEL.PIXEL_MEAN
    return MixedDataset(dataset, np.asarray(partners), np.asarray(groups), *drawn, mean)
