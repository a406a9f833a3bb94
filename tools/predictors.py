"""What finds the objects of an image: a model of a config, or an exported ONNX file.

H, W: height and width of the image as it is; R detections; M: side of a mask, 28 px.
"""

import json
import os

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances

from msad_kd import InputError, KDTrainer
from msad_kd.data.classes import model_classes, with_classes_of
from msad_kd.data.images import ImageError
from msad_kd.data.mapper import TwoResolutionMapper, build_mapper


def read_metadata(weights: str) -> dict:
    """Return what metadata.json beside a file of weights says; {} if there is none.

    Raises:
        InputError: if it is no JSON.
    """
    path = os.path.join(os.path.dirname(weights), "metadata.json")
    if not os.path.isfile(path):
        return {}
    try:
        with open(path) as file:
            return dict(json.load(file))
    except (ValueError, TypeError) as error:
        raise InputError(f"'{path}' is not a JSON of the export ({error}); export again") from error


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
        self.input_format = cfg.INPUT.FORMAT
        with_names = with_classes_of(cfg, self.model)
        named = with_names.DATASETS.CLASSES or read_metadata(weights).get("classes")
        self.classes = list(named or model_classes(with_names)[0])

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
            return self.model([sample])[0]["instances"].to("cpu")


def _as_tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


class OnnxPredictor:
    """Runs a file that tools/export_model.py wrote, by onnxruntime."""

    def __init__(self, path: str, device: str | None = None):
        """Open the file.

        Args:
            path: the .onnx file.
            device: "cuda" and the like, or "cpu"; None takes what is there.

        Raises:
            InputError: if it cannot be opened, or was exported by another program.
        """
        try:
            import onnxruntime
        except ImportError as error:
            words = (
                "an .onnx file needs onnxruntime, which is not installed: pip install onnxruntime"
            )
            raise InputError(f"--weights: {words}") from error
        if not os.path.isfile(path):
            raise InputError(f"--weights: '{path}' does not exist")
        wanted = ["CUDAExecutionProvider"] * (device != "cpu") + ["CPUExecutionProvider"]
        providers = [x for x in wanted if x in onnxruntime.get_available_providers()]
        if device not in (None, "cpu") and len(providers) < 2:
            words = "onnxruntime has no GPU here; install onnxruntime-gpu, or leave --device out"
            raise InputError(f"--device {device}: {words}")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it warns of shapes that branches of the model leave open
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers)
        except Exception as error:  # onnxruntime's errors have no common class
            raise InputError(f"--weights: '{path}' cannot be read as ONNX ({error})") from error
        stored = self.session.get_modelmeta().custom_metadata_map.get("msad_kd")
        self.settings = json.loads(stored) if stored else read_metadata(path)
        if "input_format" not in self.settings:
            raise InputError(f"--weights: '{path}' was not written by tools/export_model.py")
        self.input_format = self.settings["input_format"]
        self.classes = list(self.settings.get("classes") or ())

    def __call__(self, image: np.ndarray) -> Instances:
        """Return the detections in an image (H, W, C) of ``input_format``.

        Raises:
            ImageError: if resizing would leave no pixel of it.
        """
        height, width = image.shape[:2]
        if self.settings.get("min_size") and not self.settings.get("resizes"):
            sizes = self.settings["min_size"], self.settings["max_size"]
            resize = T.ResizeShortestEdge([sizes[0], sizes[0]], sizes[1]).get_transform(image)
            if min(resize.new_h, resize.new_w) < 1:
                raise ImageError(f"resized, its {width} x {height} px would be less than a pixel")
            image = resize.apply_image(image)
        (source,) = self.session.get_inputs()
        dtype = np.uint8 if "uint8" in source.type else np.float32
        fed = {source.name: np.ascontiguousarray(image.transpose(2, 0, 1)).astype(dtype)}
        names = [output.name for output in self.session.get_outputs()]
        outputs = dict(zip(names, map(torch.from_numpy, self.session.run(None, fed))))
        return to_instances(outputs, image.shape[:2], (height, width))


def to_instances(
    outputs: dict[str, torch.Tensor], seen: tuple[int, int], size: tuple[int, int]
) -> Instances:
    """Return raw outputs as ``Instances`` of the original image.

    Args:
        outputs: "boxes" (R, 4) in pixels of the resized image, "scores" (R,), "classes" (R,) and
            perhaps "masks" (R, 1, M, M) or (R, M, M), probabilities within the boxes.
        seen: height and width of the resized image.
        size: height and width of the original image.
    """
    raw = Instances(seen, pred_boxes=Boxes(outputs["boxes"].float()), scores=outputs["scores"])
    raw.pred_classes = outputs["classes"].long()
    if "masks" in outputs:
        masks = outputs["masks"].float()
        raw.pred_masks = masks[:, None] if masks.dim() == 3 else masks
    return detector_postprocess(raw, *size)
