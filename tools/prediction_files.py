"""The files that predict.py reads and writes: images, videos, pictures, and COCO-format JSON."""

import glob
import os
from collections.abc import Callable, Iterator

import cv2
import numpy as np
from detectron2.data import Metadata
from detectron2.structures import Instances
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import VisImage, Visualizer
from PIL import Image

from msad_kd import InputError
from msad_kd.checkpoint.files import write_json
from msad_kd.data.images import list_images
from msad_kd.evaluation.rle import coco_annotations

VIDEOS = (".mp4", ".avi", ".mov", ".mkv")
READABLE = 400  # px; smaller pictures are enlarged, so that the names on them can be read


def is_video(path: str) -> bool:
    """Return whether a file's name is that of a video."""
    return path.lower().endswith(VIDEOS)


def find_inputs(words: list[str]) -> tuple[list[str], list[str]]:
    """Return the files that the words name, each once, and the words that match nothing.

    Args:
        words: files, folders (the images and videos directly in them) and patterns ("**" for
            folders in folders).
    """
    files, unmatched = {}, []  # by their absolute paths, as a file has several names
    for word in words:
        if os.path.isdir(word):
            found = [x.path for x in os.scandir(word) if x.is_file() and is_video(x.name)]
            found = [x for x in found if not os.path.basename(x).startswith(".")]
            found = sorted([*list_images(word), *found])
        elif os.path.exists(word):
            found = [word]
        else:
            found = [x for x in sorted(glob.glob(word, recursive=True)) if os.path.isfile(x)]
        for file in found:
            files.setdefault(os.path.abspath(file), file)
        unmatched += [] if found else [word]
    return list(files.values()), unmatched


def targets_of(files: list[str], output: str) -> tuple[dict[str, str], str]:
    """Return the picture or video to write for each file, and the folder that all are in.

    Files keep their place below the folder that they have in common. Pictures are JPEG and PNG,
    videos have VIDEOS' formats; a file of another format gets ".png" after its name.

    Raises:
        InputError: if a target is one of the files, or that of two.
    """
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
    targets = {}
    for file in files:
        target = os.path.join(output, os.path.relpath(os.path.abspath(file), folder))
        keeps = target.lower().endswith((".jpg", ".jpeg", ".png", *VIDEOS))
        targets[file] = target if keeps else f"{target}.png"
    sources = set(map(os.path.realpath, files))
    if same := [target for target in targets.values() if os.path.realpath(target) in sources]:
        words = "is one of the inputs and would be overwritten; name another folder"
        raise InputError(f"--output: '{same[0]}' {words}")
    if len({*targets.values()}) < len(targets):  # photo.bmp and photo.bmp.png
        twice = next(x for x in targets.values() if [*targets.values()].count(x) > 1)
        raise InputError(f"two inputs would be drawn as '{twice}'; rename one of them")
    return targets, folder


def draw(
    image: np.ndarray,
    instances: Instances,
    names: Callable[[int], str],
    keypoints: Metadata | None = None,
) -> np.ndarray:
    """Return an RGB image with boxes, names, scores, masks, keypoints; a class has one colour.

    Args:
        image: (H, W, 3) uint8, RGB.
        instances: the detections, in pixels of the image.
        names: class to name.
        keypoints: has the names and the skeleton of keypoints, if there are any.

    Returns:
        (kH, kW, 3) uint8; k is a whole number, above 1 for images smaller than READABLE.
    """
    scale = max(1, round(READABLE / min(image.shape[:2])))
    visualizer = Visualizer(image, keypoints, scale=scale)
    colours, classes = colormap(rgb=True, maximum=1), instances.pred_classes.tolist()
    labels = [f"{names(x)} {score:.0%}" for x, score in zip(classes, instances.scores.tolist())]
    visualizer.overlay_instances(
        boxes=instances.pred_boxes.tensor.numpy(),
        labels=labels,
        masks=list(instances.pred_masks.numpy()) if instances.has("pred_masks") else None,
        keypoints=instances.pred_keypoints if instances.has("pred_keypoints") else None,
        assigned_colors=[colours[index % len(colours)] for index in classes],
        alpha=0.4,
    )
    output = visualizer.get_output()
    _keep_names_inside(output)
    return np.ascontiguousarray(output.get_image())


def _keep_names_inside(output: VisImage) -> None:
    """Move the names that an edge of the picture would cut."""
    renderer, transform = output.canvas.get_renderer(), output.ax.transData
    for text in output.ax.texts:
        box = text.get_window_extent(renderer).padded(2)  # px, for the background
        shift = max(-box.x0, min(0, output.ax.bbox.x1 - box.x1)), max(0, -box.y0)
        position = transform.transform(text.get_position()) + shift
        text.set_position(transform.inverted().transform(position))


def write_picture(path: str, picture: np.ndarray) -> None:
    """Write an RGB picture; the folder is made."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Image.fromarray(picture).save(
        path, **({} if path.lower().endswith(".png") else {"quality": 95})
    )


class VideoFile:
    """The frames of a video, and the video of pictures that is written for it."""

    def __init__(self, path: str, target: str):
        """Read the header; ``frames`` is how many it names, 0 if it cannot be read."""
        self.path, self.target = path, target
        capture = cv2.VideoCapture(path)
        self.frames = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        self.rate = capture.get(cv2.CAP_PROP_FPS) or 25.0
        capture.release()  # there may be more videos than files that can be open
        self.writer: cv2.VideoWriter | None = None

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield frames (H, W, 3), RGB."""
        capture = cv2.VideoCapture(self.path)
        while (read := capture.read())[0]:
            yield np.ascontiguousarray(read[1][:, :, ::-1])
        capture.release()

    def write(self, picture: np.ndarray) -> None:
        """Append an RGB picture, in MPEG-4.

        Raises:
            InputError: if the video cannot be written.
        """
        if self.writer is None:
            os.makedirs(os.path.dirname(self.target), exist_ok=True)
            code = cv2.VideoWriter_fourcc(*"mp4v")
            size = picture.shape[1::-1]
            self.writer = cv2.VideoWriter(self.target, code, self.rate, size)
            if not self.writer.isOpened():
                raise InputError(f"'{self.target}' cannot be written as a video by OpenCV")
        self.writer.write(picture[:, :, ::-1])

    def close(self) -> None:
        """Finish the file."""
        if self.writer is not None:
            self.writer.release()


class CocoFile:
    """Collects detections, and writes them in COCO format, as DATASETS.COCO_FORMAT reads it."""

    def __init__(self, folder: str, classes: list[str], name: Callable[[int], str]):
        """Begin a file.

        Args:
            folder: the folder of the images.
            classes: the names of the classes that are known.
            name: class to name, of the others too.
        """
        info = {"description": "detections of predict.py", "images": folder}
        self.content = {"info": info, "images": [], "annotations": [], "categories": []}
        self.name, self.classes = name, len(classes)

    def add(self, file_name: str, instances: Instances) -> None:
        """Add an image and its detections; the ``Instances``' keypoints are changed in place."""
        images, annotations = self.content["images"], self.content["annotations"]
        height, width = instances.image_size
        image_id = len(images) + 1
        # First all that takes time, as a run may be stopped meanwhile.
        detections = [*coco_annotations(instances, image_id)]
        images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        for found in detections:
            self.classes = max(self.classes, found["category_id"])
            annotations.append({"id": len(annotations) + 1, **found})

    def write(self, path: str) -> None:
        """Write the file."""
        names = map(self.name, range(max(1, self.classes)))
        self.content["categories"] = [{"id": i, "name": name} for i, name in enumerate(names, 1)]
        write_json(path, self.content, indent=None)
