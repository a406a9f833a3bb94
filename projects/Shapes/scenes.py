"""Draws the scenes of the Shapes data set.

A scene is a textured background with a few overlapping shapes. Textures, sizes and orientations are
drawn alike for all classes. The hue is a hint, as vague as `hue_spread` makes it; for certain, the
outline alone tells the class, and a lower resolution takes that away from small shapes first.

H, W and S (SUPERSAMPLING) are those of `placement.py`.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from projects.Shapes.placement import SUPERSAMPLING, Shape, place_shapes

SPLITS = ("train", "val")


@dataclass(frozen=True)
class Scene:
    """`image` is (H, W, 3) uint8 RGB; `shapes` are in drawing order, the last on top; `owner` is
    (H*S, W*S) int16: the index of the shape seen there, -1 for the background."""

    image: np.ndarray
    shapes: list[Shape]
    owner: np.ndarray

    def visible_mask(self, index):
        """(H*S, W*S) uint8, 1 where shape `index` is seen."""
        return (self.owner == index).view(np.uint8)

    def full_mask(self, index):
        """(H*S, W*S) uint8, 1 where shape `index` is, seen or occluded."""
        mask = np.zeros(self.owner.shape, np.uint8)
        mask[self.shapes[index].box] = self.shapes[index].mask
        return mask


def _background(rng, options):
    """A colour gradient with smooth noise and distractor strokes; (H*S, W*S, 3) uint8."""
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
    canvas = cv2.resize(
        np.clip(image, 0, 255).astype(np.uint8),
        (width * SUPERSAMPLING, height * SUPERSAMPLING),
        interpolation=cv2.INTER_LINEAR,
    )
    for _ in range(rng.poisson(2 + 10 * options.difficulty)):
        _stroke(rng, canvas, options)
    return canvas


def _stroke(rng, canvas, options):
    """Draws an open arc: edges and corners that belong to no class."""
    centre = rng.uniform(0, 1, 2) * canvas.shape[1::-1]
    axes = rng.uniform(5, 40, 2) * options.scale * SUPERSAMPLING
    start, turn = rng.uniform(0, 360, 2)
    cv2.ellipse(
        canvas,
        tuple(int(v) for v in centre),
        tuple(int(v) for v in axes),
        turn,
        start,
        start + rng.uniform(20, 140),
        rng.uniform(0, 255, 3).tolist(),
        max(1, int(rng.uniform(0.5, 2.0) * options.scale * SUPERSAMPLING)),
    )


def _contrasting_colour(rng, against, distance, hue, spread):
    """A random RGB colour whose hue is within `spread` degrees of `hue`, one to three times
    `distance` away from the colour `against`: less only where none of 16 tries is so far away;
    one that is further away is mixed with `against`."""
    hsv = np.empty((16, 1, 3), np.float32)
    hsv[..., 0] = (hue + rng.uniform(-spread, spread, (16, 1))) % 360
    hsv[..., 1:] = rng.uniform(0.45, 1, (16, 1, 2))
    candidates = 255 * cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[:, 0]
    distances = np.linalg.norm(candidates - against, axis=1)
    enough = np.flatnonzero(distances >= distance)
    chosen = enough[0] if len(enough) else np.argmax(distances)
    return against + min(1, 3 * distance / distances[chosen]) * (candidates[chosen] - against)


def _texture(rng, shape):
    """Where on the shape's box its second colour goes: plain, stripes, checker or dots; boolean."""
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
    """Paints a shape over what the canvas shows so far."""
    region = canvas[shape.box]
    distance = 140 - 100 * options.difficulty
    behind = region[shape.mask].mean(axis=0)
    hue = 360 * shape.label / options.classes
    first = _contrasting_colour(rng, behind, distance, hue, options.hue_spread)
    second = first + rng.uniform(0.25, 0.6) * (rng.uniform(0, 255, 3) - first)
    if np.linalg.norm(second - behind) < distance:
        # Mirrored at the first colour, so that a spot at the edge does not look like a dent.
        second = np.clip(2 * first - second, 0, 255)
    texture = _texture(rng, shape)
    region[shape.mask & ~texture] = first
    region[shape.mask & texture] = second


def draw_scene(seed, split, index, options):
    """Draws one scene: a pure function of its arguments.

    Args:
        seed: non-negative integer.
        split: one of SPLITS.
        index: of the scene in its split, from 0; the total number of scenes does not matter.
        options: a `SceneOptions`.

    Returns:
        a `Scene`.
    """
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
