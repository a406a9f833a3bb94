"""Draws a few scenes: the ground truth and what models detect, side by side."""

import cv2
import numpy as np
import torch
from detectron2.data import get_detection_dataset_dicts
from detectron2.structures import BoxMode
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from pycocotools import mask as coco_mask

from msad_kd.data.images import read_image

SCENES, FIRST_SCENES = 3, 50
SCORE_THRESHOLD = 0.5
SIDE = 320  # pixels of a drawn image's shorter side
# One per class, told apart on any background; of equal rank, so that none looks like an error.
COLOURS = ("#ff4d4d", "#33b1ff", "#ffd23f", "#4ee06d", "#c77dff", "#ff8fd0", "#00e0d0", "#ff9a3c")


def choose_scenes(counts, scenes=SCENES, first=FIRST_SCENES):
    """Return the indices of the scenes with the most objects among the first few.

    No result has a say in what is shown. `counts` has the number of objects in each scene.
    """
    indices = range(min(first, len(counts)))
    return sorted(sorted(indices, key=lambda index: (-counts[index], index))[:scenes])


def paint(image, masks, classes):
    """Return a grey copy of an (H, W, 3) image with (N, H, W) masks, the first on top."""
    grey = np.repeat(image.mean(2, keepdims=True), 3, 2)
    painted = grey.copy()
    for mask, label in reversed([*zip(masks, classes)]):
        colour = 255 * np.array(to_rgb(COLOURS[label % len(COLOURS)]))
        painted[mask] = 0.4 * grey[mask] + 0.6 * colour
        outline = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)[0]
        cv2.drawContours(painted, outline, -1, colour.tolist())
    return painted.astype(np.uint8)


def ground_truth(scene, height, width, with_masks):
    """Return masks, or boxes as such, classes, and labelled keypoints (N, 2) of a scene."""
    objects = [each for each in scene.get("annotations", ()) if not each.get("iscrowd")]
    masks, points = [], np.zeros((0, 2))
    for each in objects:
        labelled = np.reshape(each.get("keypoints") or [], (-1, 3))
        points = np.concatenate([points, labelled[labelled[:, 2] > 0, :2]])
        rle = each.get("segmentation")
        if not (rle and with_masks):
            box = BoxMode.convert(list(each["bbox"]), each["bbox_mode"], BoxMode.XYWH_ABS)
            (rle,) = coco_mask.frPyObjects(np.float64([box]), scene["height"], scene["width"])
        elif isinstance(rle, list):  # of polygons
            rle = coco_mask.merge(coco_mask.frPyObjects(rle, scene["height"], scene["width"]))
        mask = coco_mask.decode(rle)
        masks.append(cv2.resize(mask, (width, height), interpolation=cv2.INTER_LINEAR) > 0)
    points = points * [width / scene["width"], height / scene["height"]]
    return masks, [each["category_id"] for each in objects], points


def _detections(scene, height, width, model, mapper):
    inputs = {**mapper(scene), "height": height, "width": width}
    with torch.no_grad():
        found = model([inputs])[0]["instances"].to("cpu")
    found = found[found.scores >= SCORE_THRESHOLD]
    found = found[found.scores.argsort(descending=True)]
    if found.has("pred_masks"):
        masks = found.pred_masks.numpy()
    else:  # their boxes
        masks = np.zeros((len(found), height, width), bool)
        for mask, (x, y, right, bottom) in zip(masks, found.pred_boxes.tensor.int().tolist()):
            mask[y:bottom, x:right] = True
    points = found.pred_keypoints.numpy() if found.has("pred_keypoints") else np.zeros((0, 2))
    return masks, found.pred_classes.tolist(), points[..., :2].reshape(-1, 2)


def draw_scenes(path, data_set, columns):
    """Draw scenes as a PNG, one in a row: the ground truth, and what each model detects.

    `columns` has (title, model, mapper) of each model. Models without masks, and beside them the
    ground truth, are drawn as boxes.
    """
    heads = [getattr(model, "roi_heads", None) for _, model, _ in columns]
    with_masks = any(getattr(head, "mask_on", False) for head in heads)
    dicts = get_detection_dataset_dicts(data_set, filter_empty=False)
    chosen = choose_scenes([len(scene.get("annotations", ())) for scene in dicts])
    size = (2.5 * (len(columns) + 1), 2.5 * len(chosen) + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(chosen), len(columns) + 1, squeeze=False)
    for row, index in zip(axes, chosen):
        image = read_image(dicts[index]["file_name"], "BGR")
        zoom = SIDE / min(image.shape[:2])
        image = cv2.resize(image, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC)
        shown = [ground_truth(dicts[index], *image.shape[:2], with_masks)]
        shown += [_detections(dicts[index], *image.shape[:2], *pair) for _, *pair in columns]
        for axis, (*objects, points) in zip(row, shown):
            axis.imshow(paint(image, *objects))
            axis.autoscale(False)
            axis.plot(*points.T, "w.", ms=3, mec="black", mew=0.4)
            axis.set_axis_off()
    for axis, title in zip(axes[0], ["ground truth", *(title for title, *_ in columns)]):
        axis.set_title(title, fontsize=11)
    figure.savefig(path, dpi=100)
