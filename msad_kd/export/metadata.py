"""Describe an exported model to the programs that run it."""

import importlib.metadata

from detectron2.config import CfgNode
from detectron2.modeling import RetinaNet
from torch import nn

from msad_kd.data.classes import class_labels, with_classes_of
from msad_kd.export.tracing import OUTPUTS
from msad_kd.modeling.classes import has_masks, is_a
from msad_kd.modeling.fcos import FCOS


def describe_model(cfg: CfgNode, model: nn.Module, format: str, *, resize: bool = False) -> dict:
    """Return a model's metadata, ready for JSON.

    Args:
        cfg: its config.
        model: the model; its "classes" are those of its checkpoint, if there are any. Classes
            without a name are "class 0" and so on.
        format: "detectron2", "torchscript" or "onnx".
        resize: whether the exported model resizes images itself.
    """
    masks = has_masks(cfg)
    kinds = {RetinaNet: cfg.MODEL.RETINANET, FCOS: cfg.MODEL.FCOS}
    keys = next((keys for kind, keys in kinds.items() if is_a(cfg, kind)), cfg.MODEL.ROI_HEADS)
    outputs = ["instances"] if format == "detectron2" else list(OUTPUTS if masks else OUTPUTS[:3])
    try:
        version = importlib.metadata.version("msad_kd")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"  # run from its folder without being installed
    return {
        "msad_kd_version": version,
        "format": format,
        "meta_architecture": cfg.MODEL.META_ARCHITECTURE,
        "classes": class_labels(with_classes_of(cfg, model)),
        "masks": masks,
        "inputs": ["image"],
        "outputs": outputs,
        "input_format": cfg.INPUT.FORMAT,
        # The model subtracts and divides by these itself: its input has values 0..255.
        "pixel_mean": list(cfg.MODEL.PIXEL_MEAN),
        "pixel_std": list(cfg.MODEL.PIXEL_STD),
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
        "resizes": resize,
        "size_divisibility": model.backbone.size_divisibility,
        "score_threshold": keys.SCORE_THRESH_TEST,
        "detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
    }
