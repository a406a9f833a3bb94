"""Write Shapes scenes in the layout of Cityscapes, below `cityscapes/`.

The i-th class of the shapes becomes the i-th thing class of Cityscapes: circles are `person`,
triangles `rider`, and so on to pentagons, `bicycle`. The evaluation of Cityscapes ignores instances
of fewer than 100 pixels, so at 128 px it leaves out the smallest shapes.
"""

import json

import cv2
from cityscapesscripts.helpers.annotation import Annotation
from cityscapesscripts.preparation.json2instanceImg import createInstanceImage
from cityscapesscripts.preparation.json2labelImg import createLabelImage
from PIL import Image

THING_CLASSES = ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
# A label that the evaluation ignores, such as `static`, would forgive false positives on it.
BACKGROUND = "road"
FRAME = 19  # the annotated one of the 30 frames of a Cityscapes snippet


def pixel_outline(mask, size):
    """Return the outline through the border pixels of a (H*S, W*S) uint8 mask, as a list of [x, y].

    It is that of the largest part of the pixels that are at least half covered; `size` is (H, W).
    """
    covered = cv2.resize(255 * mask, size[::-1], interpolation=cv2.INTER_AREA) > 127
    contours, _ = cv2.findContours(
        covered.astype("uint8"), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE
    )
    return max(contours, key=cv2.contourArea)[:, 0].tolist()


class CityscapesWriter:
    """Writes one split: `leftImg8bit/` the images, `gtFine/` the polygons and label images.

    As in Cityscapes a polygon is a whole outline, and a later one hides what is below. Cityscapes'
    own scripts make the label images from them. The only "city" is `shapes{split}`.
    """

    def __init__(self, folder, split, options):
        self.city = f"shapes{split}"
        self.images = folder / "cityscapes" / "leftImg8bit" / split / self.city
        self.labels = folder / "cityscapes" / "gtFine" / split / self.city
        self.images.mkdir(parents=True)
        self.labels.mkdir(parents=True)

    def add(self, index, scene):
        """Write the files of scene `index`."""
        name = f"{self.city}_{index:06d}_{FRAME:06d}"
        height, width = scene.image.shape[:2]
        Image.fromarray(scene.image).save(self.images / f"{name}_leftImg8bit.png", compress_level=1)
        frame = [[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]]
        objects = [{"label": BACKGROUND, "polygon": frame}]
        for order, shape in enumerate(scene.shapes):
            outline = pixel_outline(scene.full_mask(order), (height, width))
            objects.append({"label": THING_CLASSES[shape.label], "polygon": outline})
        text = json.dumps({"imgHeight": height, "imgWidth": width, "objects": objects})
        (self.labels / f"{name}_gtFine_polygons.json").write_text(text)

        annotation = Annotation()
        annotation.fromJsonText(text)
        labels = createLabelImage(annotation, "ids")
        labels.save(self.labels / f"{name}_gtFine_labelIds.png")
        # Pillow 13 cannot write the 32-bit image of the script as a 16-bit PNG.
        instances = createInstanceImage(annotation, "ids").convert("I;16")
        instances.save(self.labels / f"{name}_gtFine_instanceIds.png")

    def close(self):
        """Do nothing: every file is written."""
