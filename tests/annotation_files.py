"""A valid file in COCO format with every kind of mask, to be spoiled by tests."""

import copy

import numpy as np
from pycocotools import mask as mask_util

HEIGHT, WIDTH = 40, 60


def _square(x, y, side):
    return [x, y, x + side, y, x + side, y + side, x, y + side]


def _rle(rows, columns):
    pixels = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    pixels[rows, columns] = 1
    return mask_util.encode(pixels)


def _runs(rle):
    pixels = mask_util.decode(rle).ravel(order="F")
    ends = np.flatnonzero(np.diff(pixels, prepend=0, append=1 - pixels[-1]))
    return np.diff(ends, prepend=0).tolist()


def valid_content(keypoints=False):
    """Two images; a polygon, a polygon in two parts, a compressed RLE, and a crowd."""
    compressed, crowd = _rle(slice(5, 15), slice(20, 40)), _rle(slice(0, 10), slice(0, 10))
    masks = [
        [_square(10.0, 5.0, 20.0)],
        [_square(0, 0, 10), _square(30.5, 20.5, 9)],
        {"size": [HEIGHT, WIDTH], "counts": compressed["counts"].decode()},
        {"size": [HEIGHT, WIDTH], "counts": _runs(crowd)},
    ]
    boxes = [[10.0, 5.0, 20.0, 20.0], [0, 0, 39.5, 29.5], [20, 5, 20, 10], [0, 0, 10, 10]]
    areas = [400.0, 181.0, 200, 100]
    annotations = [
        {
            "id": 11 + i,
            "image_id": (7, 7, 9, 9)[i],
            "category_id": (3, 5, 5, 3)[i],
            "bbox": boxes[i],
            "area": areas[i],
            "iscrowd": int(i == 3),
            "segmentation": masks[i],
        }
        for i in range(4)
    ]
    categories = [{"id": 5, "name": "dog"}, {"id": 3, "name": "cat"}]
    if keypoints:
        for i, annotation in enumerate(annotations):
            annotation |= {"keypoints": [12, 7, 2, 15, 9, i % 2], "num_keypoints": 1 + i % 2}
        for category in categories:
            category |= {"keypoints": ["nose", "tail"], "skeleton": [[1, 2]]}
    images = [{"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in (7, 9)]
    return copy.deepcopy({"images": images, "annotations": annotations, "categories": categories})
