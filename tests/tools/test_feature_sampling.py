"""Sampled features: the same cells for every model, whatever its resolution; sizes worked out."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from feature_sampling import (
    cell_counts,
    cells_per_image,
    common_strides,
    read_features,
    sample_cells,
    write_features,
)

from msad_kd.utils.errors import InputError


def levels(*strides):
    return {f"p{i}": ShapeSpec(channels=2, stride=s) for i, s in enumerate(strides, 2)}


class Coordinates:
    """A model whose features are the position of the cell's corner in the high-resolution image."""

    scale = 2

    def __init__(self, image, strides):
        self.image, self.strides = image, strides

    def levels(self):
        return levels(*self.strides)

    def pyramid(self, inputs, padded):
        (entry,) = inputs
        factor = 2 if self.image == "image" else 1
        assert entry[self.image].shape[-1] * factor == 2 * entry["image"].shape[-1]
        pyramid = {}
        for name, shape in self.levels().items():
            axes = [torch.arange(-(-2 * side // shape.stride)) * shape.stride for side in padded]
            pyramid[name] = torch.stack(torch.meshgrid(*axes, indexing="ij"))[None].float()
        return pyramid


def write(model, folder, sizes, strides, cells):
    images = [(torch.zeros(3, h, w), torch.zeros(3, 2 * h, 2 * w)) for h, w in sizes]
    inputs = [{"image": low, "image_hr": high} for low, high in images]
    options = {"cells": cells, "divisibility": 32, "seed": 0, "folder": folder}
    return write_features(model, inputs, strides, **options)


def test_all_models_are_read_at_the_same_cells(tmp_path):
    strides, features = [8, 16, 64], {}
    low, high = Coordinates("image", [8, 16, 32, 64]), Coordinates("image_hr", [4, 8, 16, 64])
    for name, model in {"low": low, "high": high}.items():
        sizes = write(model, tmp_path / name, [(30, 45), (32, 20)], strides, 10)
        assert sizes == [(60, 90), (64, 40)]
        features[name] = {s: read_features(tmp_path / name, s, 2) for s in strides}
    for stride in strides:
        assert torch.equal(features["low"][stride], features["high"][stride])
        counts = cell_counts(sizes, stride, 10)
        assert len(features["low"][stride]) == counts.sum()
        for rows, size in zip(features["low"][stride].split(counts.tolist()), sizes):
            assert (rows % stride == 0).all()
            assert (rows < torch.tensor(size)).all()  # inside the image, not in its padding
            assert len(rows.unique(dim=0)) == len(rows)
    assert cell_counts(sizes, 8, 10).tolist() == [10, 10]
    assert cell_counts(sizes, 64, 10).tolist() == [2, 1]


def test_other_images_and_seeds_have_other_cells(tmp_path):
    drawn = {tuple(sample_cells((640, 640), 8, 5, seed).flatten().tolist()) for seed in range(4)}
    assert len(drawn) == 4 and torch.equal(*(sample_cells((640, 640), 8, 5, 0) for _ in range(2)))
    write(Coordinates("image", [8]), tmp_path, [(320, 320)] * 2, [8], 5)
    assert not torch.equal(*read_features(tmp_path, 8, 2).split(5))


def test_a_small_level_gives_all_its_cells():
    drawn = sample_cells((30, 70), 32, 64, 0)
    assert sorted(map(tuple, drawn.tolist())) == [(0, 0), (0, 1), (0, 2)]


def test_common_strides():
    models = {"student": levels(8, 16, 32, 64, 128), "plain": levels(4, 8, 16, 32, 64)}
    common, left_out = common_strides(models)
    assert common == [8, 16, 32, 64]
    assert left_out == {"student": ["p6"], "plain": ["p2"]}
    with pytest.raises(InputError, match=r"no stride in common.*one: \[4, 8\]; other: \[16\]"):
        common_strides({"one": levels(4, 8), "other": levels(16)})


def test_a_model_takes_at_most_a_gigabyte():
    assert cells_per_image(2000, 5, 256, 64) == 64  # 655 MB
    assert cells_per_image(2000, 5, 256, 1000) == 97
    assert 2000 * 5 * 256 * 97 * 4 <= 10**9 < 2000 * 5 * 256 * 98 * 4
    with pytest.raises(InputError, match="more than 1 GB.*use fewer images"):
        cells_per_image(1_000_000, 5, 256, 64)
