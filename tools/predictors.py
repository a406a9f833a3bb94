"""What finds the objects of an image (H, W, C): a model of a config, or an exported ONNX file."""

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import Metadata
from detectron2.data import transforms as T
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances

from msad_kd import InputError, KDTrainer
from msad_kd.data.classes import class_labels, with_classes_of
from msad_kd.data.images import ImageError
from msad_kd.data.keypoints import read_keypoints
from msad_kd.data.mapper import TwoResolutionMapper, build_mapper


class ConfigPredictor:
    """Runs the model of a config; a student without its teacher, a teacher by its TEST_BRANCH."""

    def __init__(self, cfg: CfgNode, weights: str):
        """Build the model and load its weights.

        Raises:
            InputError: if they do not fit, or if the model needs more than an image.
        """
        if cfg.MODEL.LOAD_PROPOSALS:
            raise InputError("MODEL.LOAD_PROPOSALS is True, but images alone have no proposals")
        self.model = KDTrainer.load_model(cfg, weights, "the config")
        self.mapper = build_mapper(cfg, is_train=False)
        self.input_format, self.keypoints = cfg.INPUT.FORMAT, Metadata(**read_keypoints(cfg))
        self.classes = class_labels(with_classes_of(cfg, self.model))

    def __call__(self, image: np.ndarray) -> Instances:
        """Return the detections in an image (H, W, C) of ``input_format``, on the CPU.

        Raises:
            ImageError: if resizing would leave no pixel of it.
        """
        height, width = image.shape[:2]
        resized = T.AugInput(image)
        augmentations = self.mapper.augmentations
        try:
            augmentations(resized)
        except ValueError as error:
            raise ImageError(str(error)) from error
        sample = {"image": _as_tensor(resized.image), "height": height, "width": width}
        if isinstance(self.mapper, TwoResolutionMapper):  # a teacher, in the frame of HR
            sample["image_lr"] = _as_tensor(augmentations.other_image)
        with torch.no_grad():
            (found,) = self.model([sample])
        if "instances" not in found:
            kind = type(self.model).__name__
            raise InputError(f"MODEL.META_ARCHITECTURE: a {kind} finds no objects, {[*found]} only")
        return found["instances"].to("cpu")


def _as_tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


class OnnxPredictor:
    """Runs a file that tools/export_model.py wrote, on the CPU."""

    keypoints = None

    def __init__(self, path: str):
        """Open the file.

        Raises:
            InputError: if it cannot be read, or was exported by another program.
        """
        from msad_kd.export.onnx import OnnxDetector  # needs packages that nothing else needs

        self.detector = OnnxDetector(path)
        self.metadata = self.detector.metadata
        self.input_format, self.classes = self.metadata["input_format"], self.metadata["classes"]

    def __call__(self, image: np.ndarray) -> Instances:
        """Return the detections in an image (H, W, C) of ``input_format``.

        Raises:
            ImageError: if resizing would leave no pixel of it.
        """
        height, width = image.shape[:2]
        short, longest = self.metadata["min_size"], self.metadata["max_size"]
        if short:
            resize = T.ResizeShortestEdge([short, short], longest).get_transform(image)
            if min(resize.new_h, resize.new_w) < 1:
                raise ImageError(f"resized, its {width} x {height} px would be less than a pixel")
            image = image if self.metadata["resizes"] else resize.apply_image(image)
        outputs = self.detector(np.ascontiguousarray(image.transpose(2, 0, 1)))
        boxes, scores, classes, *masks = map(torch.from_numpy, outputs)
        found = Instances(image.shape[:2], pred_boxes=Boxes(boxes), scores=scores)
        found.pred_classes = classes
        if masks:
            found.pred_masks = masks[0][:, None]
        return detector_postprocess(found, height, width)
