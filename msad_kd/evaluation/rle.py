"""Detections as COCO has them; masks become RLE in a fifth of pycocotools' time, to the bit."""

import numpy as np
import pycocotools.mask as mask_util
from detectron2.evaluation.coco_evaluation import instances_to_coco_json as _to_coco_json
from detectron2.structures import Instances


def instances_to_coco_json(found: Instances, image_id: int) -> list[dict]:
    """Return what Detectron2's function of this name does, with masks by ``encode``.

    Args:
        found: the detections of an image, on the CPU.
        image_id: the image's id.
    """
    fields = dict(found.get_fields())
    masks = fields.pop("pred_masks", None)
    others = Instances(found.image_size, **fields)
    results = _to_coco_json(others, image_id)
    if results and masks is not None:
        rles = encode(masks.numpy(), found.pred_boxes.tensor.numpy())
        results = [{**result, "segmentation": rle} for result, rle in zip(results, rles)]
    return results


def coco_annotations(found: Instances, image_id: int) -> list[dict]:
    """Return detections as annotations of COCO format, without ids.

    Classes begin at 1. There is no segmentation where a mask has no pixel. All keypoints count as
    visible; their scores are in "keypoint_scores".

    Args:
        found: the detections of an image, on the CPU; their keypoints are changed in place.
        image_id: the image's id.
    """
    annotations = []
    for entry in instances_to_coco_json(found, image_id):
        area = entry["bbox"][2] * entry["bbox"][3]
        if (mask := entry.pop("segmentation", None)) and (pixels := float(mask_util.area(mask))):
            entry["segmentation"], area = mask, pixels
        if points := entry.get("keypoints"):
            entry["keypoint_scores"], entry["num_keypoints"] = points[2::3], len(points) // 3
            points[2::3] = [2] * entry["num_keypoints"]
        entry["category_id"] += 1
        annotations.append({**entry, "area": area, "iscrowd": 0})
    return annotations


def encode(masks: np.ndarray, boxes: np.ndarray) -> list[dict]:
    """Return what ``pycocotools.mask.encode`` would, with texts as counts, as JSON needs.

    A predicted mask is empty outside its box, so only the box's pixels are compared with their
    neighbours. A count of all pixels tells whether the mask has more; then all are compared.

    Args:
        masks: (N, H, W), bool or uint8.
        boxes: (N, 4), x0, y0, x1, y1 in pixels.
    """
    height, width = masks.shape[1:]
    corners = np.nan_to_num(np.concatenate([boxes[:, :2] - 1, boxes[:, 2:] + 2], axis=1))
    corners = corners.clip(0, [width, height] * 2).astype(int)
    found = []
    for mask, box in zip(masks, corners.tolist()):
        runs = _runs(mask, *box)
        if runs[1::2].sum() != np.count_nonzero(mask):
            runs = _runs(mask, 0, 0, width, height)
        found.append({"size": [height, width], "counts": runs})
    encoded = mask_util.frPyObjects(found, height, width) if found else []
    return [{**rle, "counts": rle["counts"].decode()} for rle in encoded]


def _runs(mask: np.ndarray, x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    """Return how long a mask's runs down the columns are, of 0s and 1s in turn.

    They are right if all its 1s are within the box.
    """
    height, rows, columns = len(mask), max(y1 - y0, 0), max(x1 - x0, 0)
    step = rows + (rows < height)  # a 0 below ends a run; in whole columns it goes on in the next
    flat = np.zeros(columns * step + 2, mask.dtype)  # 0s in front and behind end the outer runs
    flat[1:-1].reshape(columns, step)[:, :rows] = mask[y0:y1, x0:x1].T
    column, row = np.divmod(np.flatnonzero(flat[1:] != flat[:-1]), step)
    runs = np.diff((x0 + column) * height + y0 + row, prepend=0, append=mask.size)
    return runs if runs[-1] else runs[:-1]
