"""Sampled features: the same cells for every model, whatever its resolution; sizes worked out."""

import pytest
import torch
from detectron2.layers import ShapeSpec

from msad_kd.ladder.feature_sampling import (
    cell_counts,
    cells_per_image,
    common_strides,
    read_features,
    sample_cells,
    write_features,
)
from msad_kd.utils.errors import InputError


def levels(*strides, channels=2):
    return {f"p{i}": ShapeSpec(channels=channels, stride=s) for i, s in enumerate(strides, 2)}


class Coordinates:
    """A model whose features are where the cell's corner lies in the high-resolution image."""

    scale = 2

    def __init__(self, reads, strides):
        self.reads, self.strides = reads, strides

    def levels(self):
        return levels(*self.strides)

    def pyramid(self, inputs, padded):
        (entry,) = inputs
        factor = 2 if self.reads == "image" else 1
        assert entry[self.reads].shape[-1] * factor == 2 * entry["image"].shape[-1]
        pyramid = {}
        for name, shape in self.levels().items():
            axes = [torch.arange(-(-2 * side // shape.stride)) * shape.stride for side in padded]
            pyramid[name] = torch.stack(torch.meshgrid(*axes, indexing="ij"))[None].float()
        return pyramid


def images(*sizes):
    return [
        {"image": torch.zeros(3, h, w), "image_hr": torch.zeros(3, 2 * h, 2 * w)} for h, w in sizes
    ]


def test_all_models_are_read_at_the_same_cells(tmp_path):
    inputs, strides = images((30, 45), (32, 20)), [8, 16, 64]
    found = {}
    for name, model in {
        "low": Coordinates("image", [8, 16, 32, 64]),
        "high": Coordinates("image_hr", [4, 8, 16, 64]),
    }.items():
        sizes = write_features(
            model, inputs, strides, cells=10, divisibility=32, seed=0, folder=tmp_path / name
        )
        assert sizes == [(60, 90), (64, 40)]
        found[name] = {s: read_features(tmp_path / name, s, 2) for s in strides}
    for stride in strides:
        assert torch.equal(found["low"][stride], found["high"][stride])
        counts = cell_counts(sizes, stride, 10)
        assert len(found["low"][stride]) == counts.sum()
        for rows, size in zip(found["low"][stride].split(counts.tolist()), sizes):
            assert (rows % stride == 0).all()
            assert (rows < torch.tensor(size)).all()  # inside the image, not in its padding
            assert len(rows.unique(dim=0)) == len(rows)
    assert cell_counts(sizes, 8, 10).tolist() == [10, 10]
    assert cell_counts(sizes, 64, 10).tolist() == [2, 1]


def test_other_images_and_seeds_have_other_cells(tmp_path):
    drawn = {tuple(sample_cells((640, 640), 8, 5, seed).flatten().tolist()) for seed in range(4)}
    assert len(drawn) == 4
    same, other = (sample_cells((640, 640), 8, 5, 0) for _ in range(2))
    assert torch.equal(same, other)
    model, inputs = Coordinates("image", [8]), images((320, 320), (320, 320))
    write_features(model, inputs, [8], cells=5, divisibility=32, seed=0, folder=tmp_path)
    first, second = read_features(tmp_path, 8, 2).split(5)
    assert not torch.equal(first, second)


def test_all_cells_where_there_are_few():
    drawn = sample_cells((30, 70), 32, 64, 0)
    assert sorted(map(tuple, drawn.tolist())) == [(0, 0), (0, 1), (0, 2)]


def test_strides_that_all_have():
    common, left_out = common_strides(
        {"student": levels(8, 16, 32, 64, 128), "plain": levels(4, 8, 16, 32, 64)}
    )
    assert common == [8, 16, 32, 64]
    assert left_out == {"student": ["p6"], "plain": ["p2"]}
    with pytest.raises(InputError, match=r"no stride is common.*one: \[4, 8\]; other: \[16\]"):
        common_strides({"one": levels(4, 8), "other": levels(16)})


def test_a_gigabyte_a_model():
    assert cells_per_image(2000, 5, 256, 64) == 64
    assert 2000 * 5 * 256 * 64 * 4 == 655_360_000
    assert cells_per_image(2000, 5, 256, 1000) == 97
    assert 2000 * 5 * 256 * 97 * 4 <= 10**9 < 2000 * 5 * 256 * 98 * 4
    with pytest.raises(InputError, match="more than 1 GB; use fewer images"):
        cells_per_image(1_000_000, 5, 256, 64)
