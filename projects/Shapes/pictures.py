"""The demo's two pictures: scenes side by side, and accuracy against cost."""

import copy

import matplotlib

matplotlib.use("Agg")

import cv2
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch
from matplotlib.text import Text

SCENES = 4
FIRST_SCENES = 50
SCORE_THRESHOLD = 0.5
ZOOM = 4
# One a class, told apart on any background; of equal rank, so that none looks like an error.
CLASS_COLOURS = (
    "#ff4d4d", "#33b1ff", "#ffd23f", "#4ee06d", "#c77dff", "#ff8fd0", "#00e0d0", "#ff9a3c",
)  # fmt: skip
# Distances of a label from its point, in points; the nearest that is free is taken.
LABEL_OFFSETS = [
    (dx, dy) for reach in (9, 18, 30, 44, 60) for dy in (0, reach, -reach) for dx in (reach, -reach)
] + [(0, dy) for dy in (12, -12, 24, -24)]


def choose_scenes(counts, scenes=SCENES, first=FIRST_SCENES):
    """The indices of the scenes with the most objects among the first few, so that no result has a
    say in what is shown; of equals the earlier ones.

    Args:
        counts: the number of objects in each scene.
    """
    indices = range(min(first, len(counts)))
    return sorted(sorted(indices, key=lambda index: (-counts[index], index))[:scenes])


def _read(scene):
    """The image of a data set dict, RGB, `ZOOM` times as large."""
    image = cv2.imread(scene["file_name"])[..., ::-1]
    return cv2.resize(
        np.ascontiguousarray(image), None, fx=ZOOM, fy=ZOOM, interpolation=cv2.INTER_CUBIC
    )


def _ground_truth(scene):
    """Masks, as polygons in the enlarged image, and classes of a data set dict."""
    objects = scene.get("annotations", [])
    masks = [[ZOOM * np.asarray(p) for p in each["segmentation"]] for each in objects]
    return masks, [each["category_id"] for each in objects]


def _predictions(scene, model, mapper):
    """The same as a model sees it: masks pasted into the enlarged image, the surer on top."""
    import torch

    inputs = mapper(copy.deepcopy(scene))
    inputs["height"], inputs["width"] = ZOOM * scene["height"], ZOOM * scene["width"]
    with torch.no_grad():
        found = model([inputs])[0]["instances"].to("cpu")
    found = found[found.scores >= SCORE_THRESHOLD]
    found = found[found.scores.argsort(descending=True)]
    return _uncovered(found.pred_masks.numpy(), found.pred_classes.tolist())


def _uncovered(masks, classes):
    """What is left of each mask below those before it, so that no colours mix.

    Args:
        masks: (N, H, W) boolean.
        classes: N labels.

    Returns:
        lists of the masks of which something is left, and of their labels.
    """
    left, labels = [], []
    covered = np.zeros(masks.shape[1:], bool)
    for mask, label in zip(masks, classes):
        if (mask & ~covered).any():
            left.append(mask & ~covered)
            labels.append(label)
        covered |= mask
    return left, labels


def _overlay(image, masks, classes, metadata):
    from detectron2.utils.visualizer import Visualizer

    colours = [CLASS_COLOURS[label % len(CLASS_COLOURS)] for label in classes]
    # In grey, so that a colour is that of a class and not of the object.
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    canvas = Visualizer(grey, metadata)
    drawn = canvas.overlay_instances(masks=masks, assigned_colors=colours, alpha=0.6)
    return drawn.get_image()


def draw_scenes(path, dicts, columns, metadata):
    """Draws a few scenes, their ground truth and each model's predictions side by side.

    Args:
        path: the PNG to write.
        dicts: Detectron2's dicts of the validation set, annotations included.
        columns: (title, model, mapper) of each model.
        metadata: of the data set.
    """
    chosen = choose_scenes([len(scene.get("annotations", [])) for scene in dicts])
    titles = ["scene", "ground truth", *(title for title, _, _ in columns)]
    figure, axes = plt.subplots(
        len(chosen),
        len(titles),
        figsize=(3.4 * len(titles), 3.4 * len(chosen) + 1.3),
        squeeze=False,
        layout="constrained",
    )
    for row, index in zip(axes, chosen):
        scene = dicts[index]
        image = _read(scene)
        shown = [_ground_truth(scene)]
        shown += [_predictions(scene, model, mapper) for _, model, mapper in columns]
        tiles = [image, *(_overlay(image, *objects, metadata) for objects in shown)]
        for axis, tile in zip(row, tiles):
            axis.imshow(tile)
            axis.set_axis_off()
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=15)
    figure.suptitle(
        f"Those of the first {FIRST_SCENES} validation scenes with the most objects. Detections of "
        f"score {SCORE_THRESHOLD} and more, the surer on top.",
        fontsize=12,
    )
    legend = [
        Patch(color=CLASS_COLOURS[label % len(CLASS_COLOURS)], label=name)
        for label, name in enumerate(metadata.thing_classes)
    ]
    figure.legend(
        handles=legend, loc="outside lower center", ncols=len(legend), frameon=False, fontsize=11
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _colour(key):
    if key.startswith("teacher"):
        return "#8a63d2"
    colours = {"hr": "#444444", "lr": "#e07a1f", "student": "#1a9850"}
    return colours.get(key, "#2b7bba")


def _place_labels(figure, axis, points, labels, colours):
    """Writes a label beside each point such that labels cover neither points nor one another."""
    renderer = figure.canvas.get_renderer()
    pixels = axis.transData.transform(points)
    frame = axis.get_window_extent(renderer)
    taken = []
    for point, pixel, text, colour in zip(points, pixels, labels, colours):
        for dx, dy in LABEL_OFFSETS:
            line = 0 if (dx, dy) in LABEL_OFFSETS[:2] else 0.7
            label = axis.annotate(
                text,
                point,
                xytext=(dx, dy),
                textcoords="offset points",
                ha="left" if dx > 0 else "right" if dx < 0 else "center",
                va="center",
                fontsize=10,
                color=colour,
                arrowprops={"arrowstyle": "-", "color": colour, "lw": line, "shrinkB": 4},
            )
            label.update_positions(renderer)
            box = Text.get_window_extent(label, renderer).expanded(1.02, 1.1)  # without its line
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1
            inside = inside and frame.y0 <= box.y0 and box.y1 <= frame.y1
            free = not any(box.overlaps(other) for other in taken)
            free = free and not any(
                box.x0 - 4 < x < box.x1 + 4 and box.y0 - 4 < y < box.y1 + 4
                for x, y in pixels
                if (x, y) != tuple(pixel)
            )
            if inside and free:
                break
            label.remove()
        else:
            axis.annotate(text, point, xytext=(9, 0), textcoords="offset points")
        taken.append(box)


def draw_ap_cost(path, rows):
    """Draws box and mask AP of each row against its GMACs.

    Args:
        path: the PNG to write.
        rows: with `key`, `model`, `gmacs`, `box` and `mask` as in `table.json`.
    """
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharex=True)
    colours = [_colour(row["key"]) for row in rows]
    for axis, kind in zip(axes, ("box", "mask")):
        points = np.array([(row["gmacs"], row[kind]["AP"]) for row in rows])
        axis.scatter(*points.T, s=60, c=colours, zorder=3, edgecolors="white")
        (left, low), (right, high) = points.min(0), points.max(0)
        across, up = max(right - left, 0.1), max(high - low, 1)
        axis.set_xlim(max(0, left - 0.45 * across), right + 0.55 * across)
        axis.set_ylim(low - 0.2 * up, high + 0.2 * up)
        axis.set_xlabel("GMACs per image (whole model)")
        axis.set_ylabel(f"{kind} AP")
        axis.grid(color="#dddddd", lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Shapes: accuracy against cost")
    figure.tight_layout()
    figure.canvas.draw()
    for axis, kind in zip(axes, ("box", "mask")):
        points = [(row["gmacs"], row[kind]["AP"]) for row in rows]
        _place_labels(figure, axis, points, [row["model"] for row in rows], colours)
    figure.savefig(path, dpi=120)
    plt.close(figure)
