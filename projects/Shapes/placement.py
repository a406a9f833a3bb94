"""Place the shapes of a Shapes scene: outlines, sizes, occlusion.

Coordinates are (x, y) in pixels, continuous, with (0, 0) at the upper left corner of the image.

    H, W  height and width of the image, in pixels
    S     SUPERSAMPLING: everything is drawn S times larger and then averaged (anti-aliasing)
    K     vertices of an outline
"""

from dataclasses import dataclass

import cv2
import numpy as np

SUPERSAMPLING = 4
REFERENCE_SIDE = 128

# A shape that does not fit is tried elsewhere, and made smaller after this many failures.
ATTEMPTS_PER_RADIUS = 8
MAX_ATTEMPTS = 400
MIN_VISIBLE_PIXELS = 12
MIN_IN_FRAME = 0.75


@dataclass(frozen=True)
class SceneOptions:
    """Everything a scene depends on besides its seed, split and index."""

    size: tuple[int, int] = (128, 128)  # (H, W) in pixels
    # In [0, 1]; contrast falls with it, and noise, clutter and occlusion grow.
    difficulty: float = 0.5
    classes: int = 8  # the first so many of CLASS_NAMES are drawn
    # Of the circle with the area of the shape, in pixels of an image whose shorter side is 128; the
    # radius scales with the image and is drawn log-uniformly.
    min_radius: float = 4.0
    max_radius: float = 22.0
    min_shapes: int = 4
    max_shapes: int = 12
    # In (0, 180] degrees: the largest distance of a shape's hue from that of its class. At 180 the
    # hue tells nothing; a detector learns faster from scratch when it tells something.
    hue_spread: float = 180.0

    def __post_init__(self):
        """Check the ranges."""
        largest, classes = REFERENCE_SIDE // 2, len(CLASS_NAMES)
        rules = {
            "size must be two sides of 16 px or more": len(self.size) == 2 and min(self.size) >= 16,
            "difficulty must lie in [0, 1]": 0 <= self.difficulty <= 1,
            f"classes must lie in 1..{classes}": 1 <= self.classes <= classes,
            "min_radius must not be above max_radius": self.min_radius <= self.max_radius,
            f"max_radius must be at most {largest}": self.max_radius <= largest,
            "min_radius must be at least 1.5 px in the image": self.min_radius * self.scale >= 1.5,
            "min_shapes must be at least 1": self.min_shapes >= 1,
            "min_shapes must not be above max_shapes": self.min_shapes <= self.max_shapes,
            "max_shapes must be at most 100": self.max_shapes <= 100,
            "hue_spread must lie in (0, 180] degrees": 0 < self.hue_spread <= 180,
        }
        for rule, holds in rules.items():
            if not holds:
                raise ValueError(f"{rule}, not as in {self}")

    @property
    def scale(self):
        """Pixels of this size per pixel of the reference size."""
        return min(self.size) / REFERENCE_SIDE


@dataclass(frozen=True)
class Shape:
    """A shape and its place; occlusion is not considered."""

    label: int  # index into CLASS_NAMES
    outline: np.ndarray  # (K, 2) in pixels; it may reach beyond the frame
    radius: float  # in pixels
    box: tuple[slice, slice]  # (y, x) on the supersampled canvas
    mask: np.ndarray  # boolean, of the size of the box


def _ring(count, radii=(1.0,), stretch=1.0, turn=0.0):
    """Return vertices around the origin, (count, 2); their radii cycle through `radii`."""
    angles = turn + 2 * np.pi * np.arange(count) / count
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return points * np.resize(radii, count)[:, None] * [stretch, 1.0]


def _cross(arm=0.36):
    """Return a plus sign in [-1, 1]^2 with arms 2 * `arm` wide, (12, 2)."""
    corner = np.array([[1, -arm], [1, arm], [arm, arm]])
    return np.concatenate([corner @ _rotation(k * np.pi / 2).T for k in range(4)])


def _rotation(angle):
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _area(outline):
    x, y = outline.T
    return 0.5 * abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))


# The first few are easy to tell apart; each later one resembles an earlier one.
_OUTLINES = {
    "circle": _ring(48),
    "triangle": _ring(3),
    "square": _ring(4, turn=np.pi / 4),
    "star": _ring(10, radii=(1.0, 0.45)),
    "cross": _cross(),
    "ellipse": _ring(48, stretch=1.9),
    "rectangle": _ring(4, stretch=1.9, turn=np.pi / 4),
    "pentagon": _ring(5),
}
CLASS_NAMES = tuple(_OUTLINES)
# All have one area, so that the size of a shape does not tell its class.
_UNIT_OUTLINES = [points * np.sqrt(np.pi / _area(points)) for points in _OUTLINES.values()]


def _place_centre(rng, radius, shapes, options):
    """Return a random point in the frame, sometimes one at which two shapes touch or overlap."""
    if shapes and rng.random() < 0.5 * options.difficulty:
        other = shapes[rng.integers(len(shapes))]
        angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 1) * (radius + other.radius)
        return other.outline.mean(axis=0) + distance * np.array([np.cos(angle), np.sin(angle)])
    return rng.uniform(0, 1, 2) * options.size[::-1]


def _place_outline(rng, label, radius, centre):
    """Return an outline of the class, randomly turned and slightly stretched, (K, 2)."""
    stretch = np.exp(rng.uniform(-0.08, 0.08))
    axes = _rotation(rng.uniform(0, np.pi))
    deform = axes @ np.diag([stretch, 1 / stretch]) @ axes.T
    turn = _rotation(rng.uniform(0, 2 * np.pi))
    return _UNIT_OUTLINES[label] @ (deform @ turn).T * radius + centre


def _rasterise(outline, size):
    """Return the box of an outline on the supersampled canvas and the boolean mask in it."""
    points = outline * SUPERSAMPLING - 0.5  # OpenCV has the centre of a pixel at whole numbers
    limit = np.array([size[1], size[0]]) * SUPERSAMPLING
    low = np.clip(np.floor(points.min(0)).astype(int), 0, limit - 1)
    high = np.clip(np.ceil(points.max(0)).astype(int) + 1, low + 1, limit)
    mask = np.zeros((high - low)[::-1], np.uint8)
    cv2.fillPoly(mask, [np.rint((points - low) * 16).astype(np.int32)], 1, shift=4)
    return (slice(low[1], high[1]), slice(low[0], high[0])), mask.view(bool)


def place_shapes(rng, options):
    """Place shapes one over the other so that enough of each stays visible.

    Returns:
        the list of `Shape` and the `owner` map of `Scene`.

    Raises:
        ValueError: there was no room for so many shapes.
    """
    size = options.size
    min_visible = 0.9 - 0.45 * options.difficulty
    owner = np.full((size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING), -1, np.int16)
    shapes, visible, needed = [], [], []
    count = rng.integers(options.min_shapes, options.max_shapes, endpoint=True)
    for index in range(count):
        label = int(rng.integers(options.classes))
        radius = np.exp(rng.uniform(np.log(options.min_radius), np.log(options.max_radius)))
        for attempt in range(1, MAX_ATTEMPTS + 1):
            scaled = radius * options.scale
            centre = _place_centre(rng, scaled, shapes, options)
            outline = _place_outline(rng, label, scaled, centre)
            area = _area(outline) * SUPERSAMPLING**2
            box, mask = _rasterise(outline, size)
            lost = np.bincount(owner[box][mask] + 1, minlength=index + 1)[1:]
            remaining = np.subtract(visible, lost)
            if mask.sum() >= MIN_IN_FRAME * area and np.all(remaining >= needed):
                break
            if attempt % ATTEMPTS_PER_RADIUS == 0:
                radius = max(0.85 * radius, options.min_radius)
        else:
            raise ValueError(
                f"no room for {count} shapes of radius {options.min_radius} and more in an image "
                f"of {size[0]}x{size[1]}; ask for fewer or smaller ones"
            )
        shapes.append(Shape(label, outline, scaled, box, mask))
        owner[box][mask] = index
        drawn = mask.sum()
        visible = [*remaining, drawn]
        # Nearly all of a tiny shape must stay visible: less looks like noise.
        floor = min(MIN_VISIBLE_PIXELS * SUPERSAMPLING**2, 0.9 * drawn)
        needed.append(max(min_visible * drawn, floor))
    return shapes, owner
