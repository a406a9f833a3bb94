"""Draw the scenes of the Shapes data set.

A scene is a textured background with a few overlapping shapes. Textures, sizes and orientations
follow the same distribution for all classes, and the hue is a hint whose strength `hue_spread`
sets. Only the outline tells the class for certain, and low resolution blurs it in small shapes
first.

H, W and S (SUPERSAMPLING) are those of `placement.py`.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from projects.Shapes.placement import SUPERSAMPLING, Shape, place_shapes

SPLITS = ("train", "val")


@dataclass(frozen=True)
class Scene:
    """A drawn scene."""

    image: np.ndarray  # (H, W, 3) uint8 RGB
    shapes: list[Shape]  # in drawing order, the last on top
    owner: np.ndarray  # (H*S, W*S) int16: index of the visible shape, -1 for the background

    def visible_mask(self, index):
        """Return (H*S, W*S) uint8, 1 where shape `index` is visible."""
        return (self.owner == index).view(np.uint8)

    def full_mask(self, index):
        """Return (H*S, W*S) uint8, 1 where shape `index` is, visible or occluded."""
        mask = np.zeros(self.owner.shape, np.uint8)
        mask[self.shapes[index].box] = self.shapes[index].mask
        return mask


def _background(rng, options):
    """Return a colour gradient with smooth noise and strokes, (H*S, W*S, 3) uint8."""
    height, width = options.size
    colours = rng.uniform(30, 225, (2, 3))
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[-0.5 : 0.5 : height * 1j, -0.5 : 0.5 : width * 1j]
    ramp = np.clip(0.5 + 0.7 * (np.cos(angle) * x + np.sin(angle) * y), 0, 1)[..., None]
    image = (colours[0] * ramp + colours[1] * (1 - ramp)).astype(np.float32)
    amplitude = 6 + 18 * options.difficulty
    for cells in (6, 24):
        grid = rng.standard_normal((cells, cells, 3), dtype=np.float32) * amplitude
        image += cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
    image = np.clip(image, 0, 255).astype(np.uint8)
    canvas = cv2.resize(image, (width * SUPERSAMPLING, height * SUPERSAMPLING))
    for _ in range(rng.poisson(2 + 10 * options.difficulty)):
        _stroke(rng, canvas, options)
    return canvas


def _stroke(rng, canvas, options):
    """Draw an open arc: edges and corners that belong to no class."""
    centre = rng.uniform(0, 1, 2) * canvas.shape[1::-1]
    axes = rng.uniform(5, 40, 2) * options.scale * SUPERSAMPLING
    start, turn = rng.uniform(0, 360, 2)
    end, colour = start + rng.uniform(20, 140), rng.uniform(0, 255, 3).tolist()
    thickness = max(1, int(rng.uniform(0.5, 2.0) * options.scale * SUPERSAMPLING))
    centre, axes = centre.astype(int).tolist(), axes.astype(int).tolist()
    cv2.ellipse(canvas, centre, axes, turn, start, end, colour, thickness)


def _contrasting_colour(rng, against, distance, hue, spread):
    """Return a random RGB colour within `spread` degrees of `hue` that differs from `against`.

    Its distance from `against` is one to three times `distance`, or the largest of 16 tries.
    """
    hsv = np.empty((16, 1, 3), np.float32)
    hsv[..., 0] = (hue + rng.uniform(-spread, spread, (16, 1))) % 360
    hsv[..., 1:] = rng.uniform(0.45, 1, (16, 1, 2))
    candidates = 255 * cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[:, 0]
    distances = np.linalg.norm(candidates - against, axis=1)
    enough = np.flatnonzero(distances >= distance)
    chosen = enough[0] if len(enough) else np.argmax(distances)
    return against + min(1, 3 * distance / distances[chosen]) * (candidates[chosen] - against)


def _texture(rng, shape):
    """Return where in its box a shape has its second colour: nowhere, stripes, checker or dots."""
    kind = rng.integers(4)
    period = rng.uniform(0.35, 0.9) * shape.radius * SUPERSAMPLING
    angle = rng.uniform(0, np.pi)
    if kind == 0:
        return np.zeros(shape.mask.shape, bool)
    y, x = np.ogrid[: shape.mask.shape[0], : shape.mask.shape[1]]
    x, y = np.float32(x / period), np.float32(y / period)
    u = (np.cos(angle) * x + np.sin(angle) * y) % 1
    v = (np.cos(angle) * y - np.sin(angle) * x) % 1
    if kind == 1:
        return u < 0.5
    if kind == 2:
        return (u < 0.5) ^ (v < 0.5)
    return (u - 0.5) ** 2 + (v - 0.5) ** 2 < 0.1


def _paint(rng, canvas, shape, options):
    """Paint a shape on the canvas."""
    region = canvas[shape.box]
    distance = 140 - 100 * options.difficulty
    behind = region[shape.mask].mean(axis=0)
    hue = 360 * shape.label / options.classes
    first = _contrasting_colour(rng, behind, distance, hue, options.hue_spread)
    second = first + rng.uniform(0.25, 0.6) * (rng.uniform(0, 255, 3) - first)
    if np.linalg.norm(second - behind) < distance:
        # Mirror it at the first colour: else a spot at the edge would look like a dent.
        second = np.clip(2 * first - second, 0, 255)
    texture = _texture(rng, shape)
    region[shape.mask & ~texture] = first
    region[shape.mask & texture] = second


def draw_scene(seed, split, index, options):
    """Return a `Scene`, a pure function of seed, split (of SPLITS), index and `SceneOptions`."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    shapes, owner = place_shapes(rng, options)
    canvas = _background(rng, options)
    for shape in shapes:
        _paint(rng, canvas, shape, options)
    height, width = options.size
    image = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32)
    y, x = np.mgrid[-0.5 : 0.5 : height * 1j, -0.5 : 0.5 : width * 1j]
    angle = rng.uniform(0, 2 * np.pi)
    strength = rng.uniform(0, 0.2 + 0.6 * options.difficulty)
    image *= (1 + strength * (np.cos(angle) * x + np.sin(angle) * y))[..., None]
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    image += (2 + 12 * options.difficulty) * noise
    return Scene(np.rint(np.clip(image, 0, 255)).astype(np.uint8), shapes, owner)
