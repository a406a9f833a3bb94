"""Level shift, pairing and padding."""

from types import SimpleNamespace

import pytest
import torch

from msad_kd.modeling.pyramid import (
    level_shift,
    normalized_batch,
    pair_levels,
    shift_levels,
    valid_masks,
)
from msad_kd.utils.errors import InputError


def strides(first, last, factor=1):
    return {f"p{s}": factor * 2**s for s in range(first, last + 1)}


def test_level_shift():
    assert [level_shift(scale) for scale in (1, 2, 4, 8)] == [0, 1, 2, 3]
    for scale in (0, 6, 1.5):
        with pytest.raises(InputError, match=f"KD.SCALE is {scale}.*power of two"):
            level_shift(scale)


def test_shift_levels_renames_and_keeps_the_maps():
    pyramid = {f"p{s}": torch.rand(1, 1, 1, 1) for s in (2, 3, 6)}
    shifted = shift_levels(pyramid, 1)
    assert list(shifted) == ["p3", "p4", "p7"]
    assert shifted["p7"] is pyramid["p6"]


@pytest.mark.parametrize(
    ("student", "teacher", "pairs", "alone"),
    [
        (strides(2, 6, 2), strides(3, 7), {f"p{s}": f"p{s + 1}" for s in range(2, 7)}, []),
        (strides(2, 6, 4), strides(2, 7), {f"p{s}": f"p{s + 2}" for s in range(2, 6)}, ["p6"]),
        (strides(2, 6), strides(2, 6), {f"p{s}": f"p{s}" for s in range(2, 7)}, []),
        # The names do not matter.
        ({"fine": 8, "coarse": 16}, {"a": 16, "b": 8}, {"fine": "b", "coarse": "a"}, []),
    ],
)
def test_levels_are_paired_by_stride(student, teacher, pairs, alone):
    assert pair_levels(student, teacher) == (list(pairs.items()), alone)


def test_no_pair_is_an_error_that_names_the_levels():
    with pytest.raises(InputError, match=r"p2.*p9.*KD.SCALE"):
        pair_levels({"p2": 4}, {"p9": 512})


@pytest.mark.parametrize("dtype", [torch.float, torch.int64])  # a config may have either
def test_images_are_normalised_then_padded_with_zeros(dtype):
    mean = torch.tensor([10, 20, 30], dtype=dtype)[:, None, None]
    std = torch.tensor([1, 2, 4], dtype=dtype)[:, None, None]
    model = SimpleNamespace(pixel_mean=mean, pixel_std=std)
    images = [torch.full(size, 40, dtype=torch.uint8) for size in ((3, 2, 5), (3, 4, 3))]
    batch = normalized_batch(model, images, 4, 6)
    assert batch.shape == (2, 3, 4, 6) and batch.dtype == torch.float
    for image, padded in zip(images, batch):
        _, height, width = image.shape
        assert [x.unique().tolist() for x in padded[:, :height, :width]] == [[30.0], [10.0], [2.5]]
        assert padded.sum() == height * width * 42.5


def test_valid_masks_of_odd_sizes():
    # In cells of 8 px, 61 x 83 px touch 8 x 11; in cells of 64 px 1 x 2.
    pyramid = {"p3": torch.zeros(2, 1, 8, 16), "p6": torch.zeros(2, 1, 1, 2)}
    masks = valid_masks([(61, 83), (64, 64)], (64, 128), pyramid)
    assert masks["p3"].tolist() == [[[[1] * n + [0] * (16 - n)] * 8] for n in (11, 8)]
    assert masks["p6"].tolist() == [[[[1, 1]]], [[[1, 0]]]]
    masks = valid_masks([(64, 96)], (64, 96), {"p2": torch.zeros(1, 4, 16, 24)})
    assert masks["p2"].all() and masks["p2"].shape == (1, 1, 16, 24)  # no padding


def test_the_last_cell_of_a_level_may_reach_beyond_the_padded_image():
    # 320 px have three cells of 128 px, as p7 has. An image of 250 px touches two of them.
    pyramid = {"p6": torch.zeros(2, 1, 1, 5), "p7": torch.zeros(2, 1, 1, 3)}
    masks = valid_masks([(64, 250), (64, 300)], (64, 320), pyramid)
    assert masks["p6"].tolist() == [[[[1, 1, 1, 1, 0]]], [[[1] * 5]]]
    assert masks["p7"].tolist() == [[[[1, 1, 0]]], [[[1, 1, 1]]]]
