"""The transforms of a low-resolution image, for the image k times as large."""

import numpy as np
import pytest
from detectron2.data import transforms as T
from fvcore.transforms import transform as base

from msad_kd.data.transforms import scale_transform, scale_transforms
from msad_kd.utils.errors import InputError

SCALABLE = {
    "nothing": T.NoOpTransform(),
    "blend": base.BlendTransform(np.array([10.0, 20.0, 30.0]), 0.3, 0.7),
    "colour": T.ColorTransform(lambda image: 255 - image),
    "horizontal flip": base.HFlipTransform(30),
    "vertical flip": base.VFlipTransform(20),
    "crop": base.CropTransform(3, 5, 17, 11),
    "crop of known size": base.CropTransform(3, 5, 17, 11, 30, 20),
    "pad": base.PadTransform(1, 2, 3, 4, 30, 20),
    "resize": T.ResizeTransform(20, 30, 13, 26),
    "nested": base.TransformList([base.HFlipTransform(30), base.CropTransform(3, 5, 17, 11)]),
}


@pytest.mark.parametrize("kind", SCALABLE)
@pytest.mark.parametrize("scale", [2, 4])
def test_scaled_transforms_move_points_k_times_as_far(kind, scale):
    low = base.TransformList([T.ResizeTransform(55, 77, 20, 30), SCALABLE[kind]])
    high = scale_transforms(low, scale)
    points = np.random.default_rng(0).uniform((0, 0), (77, 55), (50, 2))
    expected = scale * low.apply_coords(points.copy())
    np.testing.assert_allclose(high.apply_coords(points.copy()), expected, atol=1e-9)
    image = np.random.default_rng(0).integers(0, 256, (55, 77, 3), np.uint8)
    height, width, _ = low.apply_image(image).shape
    assert high.apply_image(image).shape == (scale * height, scale * width, 3)


def test_what_precedes_the_last_resize_stays():
    first = [base.CropTransform(5, 5, 60, 40), T.ResizeTransform(40, 60, 30, 45)]
    low = base.TransformList([*first, T.ResizeTransform(30, 45, 20, 30), base.HFlipTransform(30)])
    high = scale_transforms(low, 2).transforms
    assert high[:2] == first
    assert (high[2].h, high[2].w, high[2].new_h, high[2].new_w) == (30, 45, 40, 60)
    assert high[3].width == 60


def test_another_kind_can_be_registered():
    class Swap(base.HFlipTransform):
        """Known through its base class."""

    class Shift(base.Transform):
        def __init__(self, by):
            super().__init__()
            self.by = by

        def apply_image(self, image):
            return np.roll(image, self.by, axis=1)

        def apply_coords(self, coords):
            return coords + [self.by, 0]

    swap = scale_transform(Swap(10), 2)
    assert isinstance(swap, Swap) and swap.width == 20
    pad = base.PadTransform(1, 1, 1, 1, pad_value=9)
    assert scale_transform(pad, 2).pad_value == 9 and (pad.x0, pad.orig_w) == (1, None)
    with pytest.raises(InputError, match="Shift"):
        scale_transform(Shift(3), 2)
    scale_transform.register(Shift, lambda transform, scale: Shift(transform.by * scale))
    assert scale_transform(Shift(3), 2).by == 6
