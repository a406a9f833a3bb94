"""Where which shapes lie in a scene of the Shapes data set: outlines, sizes, occlusion.

Coordinates are (x, y) in pixels, continuous, (0, 0) the upper left corner of the upper left pixel.

    H, W  height and width of the image, in pixels
    S     SUPERSAMPLING: everything is drawn S times larger and then averaged (anti-aliasing)
    K     vertices of an outline
"""

from dataclasses import dataclass

import cv2
import numpy as np

SUPERSAMPLING = 4
REFERENCE_SIDE = 128

# A shape that cannot be placed is tried elsewhere, and made smaller after this many failures.
ATTEMPTS_PER_RADIUS = 8
MAX_ATTEMPTS = 400
MIN_VISIBLE_PIXELS = 12
MIN_IN_FRAME = 0.75


@dataclass(frozen=True)
class SceneOptions:
    """What a scene depends on besides its seed, split and index.

    Attributes:
        size: (H, W) in pixels.
        difficulty: in [0, 1]; less contrast, more noise, clutter and occlusion as it grows.
        classes: the first so many of `CLASS_NAMES` are drawn.
        min_radius, max_radius: of the circle of the same area as the shape, in pixels of an image
            whose shorter side is 128; scaled with the size. Drawn log-uniformly.
        min_shapes, max_shapes: inclusive bounds of the number of shapes in a scene.
        hue_spread: in (0, 180] degrees; a shape's hue is that far at most from its class's own, the
            classes' being spaced evenly. At 180 the hue tells nothing; a net learns faster from
            scratch when it tells something.
    """

    size: tuple[int, int] = (128, 128)
    difficulty: float = 0.5
    classes: int = 8
    min_radius: float = 4.0
    max_radius: float = 22.0
    min_shapes: int = 4
    max_shapes: int = 12
    hue_spread: float = 180.0

    def __post_init__(self):
        if len(self.size) != 2 or min(self.size) < 16:
            raise ValueError(f"size must be a height and a width of at least 16, not {self.size}")
        if not 0 <= self.difficulty <= 1:
            raise ValueError(f"difficulty must lie in [0, 1], not {self.difficulty}")
        if not 1 <= self.classes <= len(CLASS_NAMES):
            raise ValueError(f"classes must lie in 1..{len(CLASS_NAMES)}, not {self.classes}")
        if not 0 < self.min_radius <= self.max_radius <= REFERENCE_SIDE / 2:
            raise ValueError(
                f"min_radius and max_radius must hold 0 < min <= max <= {REFERENCE_SIDE // 2}, "
                f"not {self.min_radius} and {self.max_radius}"
            )
        if not 0 < self.hue_spread <= 180:
            raise ValueError(f"hue_spread must lie in (0, 180] degrees, not {self.hue_spread}")
        if self.min_radius * self.scale < 1.5:
            raise ValueError(
                f"min_radius {self.min_radius} is below 1.5 pixels in an image of "
                f"{self.size[0]}x{self.size[1]}"
            )
        if not 1 <= self.min_shapes <= self.max_shapes <= 100:
            raise ValueError(
                "min_shapes and max_shapes must hold 1 <= min <= max <= 100, "
                f"not {self.min_shapes} and {self.max_shapes}"
            )

    @property
    def scale(self):
        """Pixels of this size per pixel of the reference size."""
        return min(self.size) / REFERENCE_SIDE


@dataclass(frozen=True)
class Shape:
    """A shape as placed: `label` indexes CLASS_NAMES, `outline` is (K, 2) in pixels and may reach
    beyond the frame, `radius` is in pixels, `box` and `mask` are its pixels on the supersampled
    canvas: slices (y, x) and a boolean array of that box's size, occlusion not considered."""

    label: int
    outline: np.ndarray
    radius: float
    box: tuple[slice, slice]
    mask: np.ndarray


def _ring(count, radii=(1.0,), stretch=1.0, turn=0.0):
    """`count` vertices around the origin, their radii cycling through `radii`; (count, 2)."""
    angles = turn + 2 * np.pi * np.arange(count) / count
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return points * np.resize(radii, count)[:, None] * [stretch, 1.0]


def _cross(arm=0.36):
    """A plus sign in [-1, 1]^2 whose arms are 2 * `arm` wide; (12, 2)."""
    corner = np.array([[1, -arm], [1, arm], [arm, arm]])
    return np.concatenate([corner @ _rotation(k * np.pi / 2).T for k in range(4)])


def _rotation(angle):
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _area(outline):
    x, y = outline.T
    return 0.5 * abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))


# Ordered so that the first few are told apart easily and each later one resembles an earlier one.
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
# Of equal area, so that the size of a shape does not tell its class.
_UNIT_OUTLINES = [points * np.sqrt(np.pi / _area(points)) for points in _OUTLINES.values()]


def _place_centre(rng, radius, shapes, options):
    """A random place in the frame; now and then one where it touches or covers another shape."""
    if shapes and rng.random() < 0.5 * options.difficulty:
        other = shapes[rng.integers(len(shapes))]
        angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 1) * (radius + other.radius)
        return other.outline.mean(axis=0) + distance * np.array([np.cos(angle), np.sin(angle)])
    return rng.uniform(0, 1, 2) * options.size[::-1]


def _place_outline(rng, label, radius, centre):
    """An outline of the class at random orientation, slightly stretched; (K, 2)."""
    stretch = np.exp(rng.uniform(-0.08, 0.08))
    axes = _rotation(rng.uniform(0, np.pi))
    deform = axes @ np.diag([stretch, 1 / stretch]) @ axes.T
    turn = _rotation(rng.uniform(0, 2 * np.pi))
    return _UNIT_OUTLINES[label] @ (deform @ turn).T * radius + centre


def _rasterise(outline, size):
    """The outline's pixels on the supersampled canvas, as a box and the boolean mask in it."""
    points = outline * SUPERSAMPLING - 0.5  # OpenCV has a pixel's centre at whole numbers
    limit = np.array([size[1], size[0]]) * SUPERSAMPLING
    low = np.clip(np.floor(points.min(0)).astype(int), 0, limit - 1)
    high = np.clip(np.ceil(points.max(0)).astype(int) + 1, low + 1, limit)
    mask = np.zeros((high - low)[::-1], np.uint8)
    cv2.fillPoly(mask, [np.rint((points - low) * 16).astype(np.int32)], 1, shift=4)
    return (slice(low[1], high[1]), slice(low[0], high[0])), mask.view(bool)


def place_shapes(rng, options):
    """Places shapes one over the other such that enough of each remains visible.

    Returns:
        the list of `Shape` and the owner map of `Scene`.

    Raises:
        ValueError: the wanted number of shapes found no room.
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
            remains = np.subtract(visible, lost)
            if mask.sum() >= MIN_IN_FRAME * area and np.all(remains >= needed):
                break
            if attempt % ATTEMPTS_PER_RADIUS == 0:
                radius = max(0.85 * radius, options.min_radius)
        else:
            raise ValueError(
                f"no room for {count} shapes of radius {options.min_radius} and more in an image "
                f"of {size[0]}x{size[1]}: ask for fewer or smaller ones"
            )
        shapes.append(Shape(label, outline, scaled, box, mask))
        owner[box][mask] = index
        drawn = mask.sum()
        visible = [*remains, drawn]
        # Of a tiny shape nearly all must remain: less could not be told from noise.
        floor = min(MIN_VISIBLE_PIXELS * SUPERSAMPLING**2, 0.9 * drawn)
        needed.append(max(min_visible * drawn, floor))
    return shapes, owner
