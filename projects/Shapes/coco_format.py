"""Write Shapes scenes as a COCO-format data set."""

import json

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as mask_util

from projects.Shapes.placement import CLASS_NAMES, SUPERSAMPLING

# Largest distance of a polygon from the drawn edge and least area of a part, supersampled pixels.
TOLERANCE = 0.75
MIN_PART_AREA = SUPERSAMPLING**2 / 4


def polygons_of(mask):
    """Return the outlines of a supersampled mask as COCO polygons.

    COCO polygons have no holes, so a mask with a hole is cut in two through the hole.

    Args:
        mask: (H*S, W*S) uint8 of 0 and 1, S being SUPERSAMPLING.

    Returns:
        a list of flat lists [x0, y0, x1, y1, ...] in pixels, without parts of less than a quarter
        of a pixel.
    """
    # OpenCV's contour runs through the centres of the border pixels. Growing the mask by one pixel
    # to the right and below makes it run around the pixels, shifted by half a supersampled pixel.
    grown = cv2.copyMakeBorder(mask, 0, 1, 0, 1, cv2.BORDER_CONSTANT)
    grown = cv2.dilate(grown, np.ones((2, 2), np.uint8), anchor=(1, 1))
    contours, hierarchy = cv2.findContours(grown, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    polygons = []
    for index, contour in enumerate(contours):
        if cv2.contourArea(contour) < MIN_PART_AREA:
            continue
        is_hole = hierarchy[0, index, 3] >= 0
        if is_hole:
            cut = int(contour[:, 0, 0].mean())
            left, right = mask.copy(), mask.copy()
            left[:, cut:] = 0
            right[:, :cut] = 0
            return polygons_of(left) + polygons_of(right)
        polygon = cv2.approxPolyDP(contour, TOLERANCE, True)[:, 0]
        if len(polygon) >= 3:
            polygons.append((polygon / SUPERSAMPLING).ravel().tolist())
    return polygons


class CocoWriter:
    """Writes the images and annotations of one split below a folder, a pathlib.Path."""

    def __init__(self, folder, split, options):
        self.images = folder / split
        self.json = folder / "annotations" / f"instances_{split}.json"
        self.images.mkdir(parents=True)
        self.json.parent.mkdir(exist_ok=True)
        self.content = {
            "info": {"description": f"Shapes, {split}", "version": "1.0"},
            "licenses": [],
            "images": [],
            "annotations": [],
            "categories": [
                {"id": label + 1, "name": name, "supercategory": "shape"}
                for label, name in enumerate(CLASS_NAMES[: options.classes])
            ],
        }

    def add(self, index, scene):
        """Write the image of scene `index` and collect its annotations.

        They hold the visible part of each shape. As in COCO, `bbox` is the extent of the polygons
        and `area` that of the mask they rasterise to.
        """
        name = f"{index:06d}.png"
        height, width = scene.image.shape[:2]
        Image.fromarray(scene.image).save(self.images / name, compress_level=1)
        self.content["images"].append(
            {"id": index, "file_name": name, "width": width, "height": height}
        )
        annotations = self.content["annotations"]
        for order, shape in enumerate(scene.shapes):
            polygons = polygons_of(scene.visible_mask(order))
            points = np.concatenate(polygons).reshape(-1, 2)
            low, high = points.min(axis=0), points.max(axis=0)
            mask = mask_util.merge(mask_util.frPyObjects(polygons, height, width))
            annotations.append(
                {
                    "id": len(annotations) + 1,  # to pycocotools an id of 0 means "no match"
                    "image_id": index,
                    "category_id": shape.label + 1,
                    "bbox": [*low.tolist(), *(high - low).tolist()],
                    "area": int(mask_util.area(mask)),
                    "iscrowd": 0,
                    "segmentation": polygons,
                }
            )

    def close(self):
        """Write the annotations."""
        self.json.write_text(json.dumps(self.content))
