"""Read images as Detectron2 does, and those of 16 bits too; name the file of any that cannot be.

Detectron2 converts by Pillow alone, which makes 255 of almost all 16-bit values, and 0 of the
floating-point numbers from 0 to 1.
"""

import logging
import mmap
import os
import re
from contextlib import suppress

import cv2
import numpy as np
from detectron2.data import detection_utils
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.utils.file_io import PathManager
from PIL import Image

from msad_kd.utils.errors import InputError

# What the message of an ``ImageError`` asks for, after a semicolon.
REMEDY = "restore it or remove it from the data set"
# Pillow's modes whose range of values is not known.
_UNKNOWN_RANGE = {"F": "floating-point numbers", "I": "whole numbers of 32 bits"}
# Detectron2's words for an image of another size: got (width, height), expect (width, height).
_SIDES = re.compile(r"got \((\d+), (\d+)\), expect \((\d+), (\d+)\)")
_ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 exchange height and width
_TIFF_WIDTH, _TIFF_HEIGHT = 256, 257  # the tags of a TIFF, before it is turned
# Whether the scaling of 16 bits was logged; forked workers share this byte with their parent.
_logged = mmap.mmap(-1, 1)


class ImageError(InputError):
    """An image cannot be used; the message names its file."""


def read_image(file_name: str, format: str | None = None, *, labels: bool = False) -> np.ndarray:
    """Return an image, (H, W, C), turned as its EXIF says.

    Images of 8 bits become bit for bit what Detectron2's ``read_image`` returns, except for a TIFF
    with an orientation, which Detectron2 turns twice; of an animation it is the first frame. Of
    16-bit grey the high byte is taken, which is what Pillow and OpenCV do with 16-bit RGB: a
    picture has the same pixels whether it is stored as grey or as RGB. A warning says so once.

    Args:
        file_name: a regular file, or an address that Detectron2's ``PathManager`` knows.
        format: a mode of Pillow's, "BGR" or "YUV-BT.601"; None keeps the file's.
        labels: the pixels are labels (a segmentation map), not light; 16 bits are not scaled.

    Raises:
        ImageError: if the file is missing, no regular file, broken, larger than Pillow's limit, or
            has floating-point or 32-bit pixels.
    """
    try:
        path = PathManager.get_local_path(file_name)
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe would block for ever
            raise ImageError(f"image '{file_name}' is not a regular file; {REMEDY}")
        with open(path, "rb") as file:
            image = Image.open(file)
            of_16_bits = image.mode.startswith("I;16") or (
                image.mode == "I" and image.format in ("PNG", "PPM")  # they have no 32 bits
            )
            if image.mode in _UNKNOWN_RANGE and not of_16_bits:
                raise ImageError(
                    f"image '{file_name}' has pixels that are {_UNKNOWN_RANGE[image.mode]}, whose "
                    "range is not known; save it with 8 or 16 bits a channel"
                )
            image.load()  # Pillow turns a TIFF here, which must not be turned twice
            image = detection_utils._apply_exif_orientation(image)
            if of_16_bits and not labels:
                _log_once(file_name)
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            array = detection_utils.convert_PIL_to_numpy(image, format)
            if format == "BGR":  # a view of RGB from right to left, which is slow to read
                array = cv2.cvtColor(array[:, :, ::-1], cv2.COLOR_RGB2BGR)
            return array
    except InputError:
        raise
    except Exception as error:  # Pillow's plugins raise any kind for a broken file
        raise unreadable(file_name, error) from error


def list_images(folder: str) -> list[str]:
    """Return the files of a folder that have an image's suffix, in the order of their names."""
    suffixes = {key for key, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    with os.scandir(folder) as entries:
        found = [x.path for x in entries if x.is_file() and not x.name.startswith(".")]
    return sorted(x for x in found if os.path.splitext(x)[1].lower() in suffixes)


def image_size(file_name: str) -> tuple[int, int]:
    """Return height and width of an image as ``read_image`` turns it; only its header is read.

    Raises:
        ImageError: if it cannot be opened.
    """
    try:
        with Image.open(PathManager.get_local_path(file_name)) as image:
            width, height = image.size
            if image.format == "TIFF":  # Pillow may have exchanged these two already
                width, height = (image.tag_v2[tag] for tag in (_TIFF_WIDTH, _TIFF_HEIGHT))
            return (width, height) if _is_turned(image) else (height, width)
    except Exception as error:  # Pillow's plugins raise any kind for a broken file
        raise unreadable(file_name, error) from error


def _is_turned(image: Image.Image) -> bool:
    """Return whether height and width are exchanged when an image is read."""
    exif = Image.Image.getexif(image)  # that of PNG images decodes them first
    return exif.get(_ORIENTATION, 1) in (5, 6, 7, 8)


def size_of(entry: dict) -> tuple[int, int]:
    """Return height and width of the image of a dict, which Detectron2 does not need in it.

    Raises:
        ImageError: if they are not there and the image cannot be opened.
    """
    if "height" in entry and "width" in entry:
        return entry["height"], entry["width"]
    return image_size(entry["file_name"])


def is_wide(entry: dict) -> bool:
    """Return whether the image of a dict is wider than high; False if it cannot be opened."""
    with suppress(ImageError):  # the mapper will skip it or say what is wrong
        height, width = size_of(entry)
        return width > height
    return False


def unreadable(file_name: str, error: Exception) -> ImageError:
    """Return the error for an image that cannot be read for another error's reason."""
    reason, turned = str(error), ""
    if isinstance(error, FileNotFoundError):
        reason = "it does not exist"
    elif isinstance(error, Image.UnidentifiedImageError):
        reason = "it is no image"
    elif sides := _SIDES.search(reason) if isinstance(error, SizeMismatchError) else None:
        width, height, *expected = sides.groups()
        with suppress(Exception), Image.open(PathManager.get_local_path(file_name)) as image:
            turned = ", once turned as its EXIF says" * _is_turned(image)
        return ImageError(
            f"image '{file_name}' has {width} x {height} px{turned}, but its entry says "
            f"{' x '.join(expected)}; correct width, height and objects there"
        )
    return ImageError(f"image '{file_name}' cannot be read ({reason}); {REMEDY}")


def _log_once(file_name: str) -> None:
    if not _logged[0]:
        _logged[0] = 1
        logging.getLogger(__name__).warning(
            f"'{file_name}' has 16 bits a pixel: of such images, the higher 8 are taken. One that "
            "uses only some of the 16 bits (12, for example) becomes dark; scale it to 16 bits"
        )
