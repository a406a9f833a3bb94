"""Tracing a detector to TorchScript or ONNX, so that it takes images of any size.

R: detections of an image, H, W: height and width of the image in pixels.
"""

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from detectron2.export import TracingAdapter
from detectron2.layers import shapes_to_tensor
from detectron2.modeling import GeneralizedRCNN, detector_postprocess
from detectron2.modeling.meta_arch import dense_detector
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.roi_heads import cascade_rcnn
from torch import Tensor, nn
from torchvision.ops import boxes as torchvision_boxes
from torchvision.ops import nms

from msad_kd.checkpoint.files import replacing
from msad_kd.utils.errors import InputError
from msad_kd.utils.replaced import replaced

OUTPUTS = ("boxes", "scores", "classes", "masks")
METADATA_KEY = "msad_kd"  # under which an exported file holds its metadata


class ExportableDetector(nn.Module):
    """A detector of one image whose inputs and outputs are plain tensors."""

    def __init__(self, model: nn.Module, resize_to: tuple[int, int] | None = None):
        """Wrap a detector in eval mode.

        Args:
            model: an R-CNN, RetinaNet or FCOS.
            resize_to: INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST, to which images are resized inside;
                None if they come resized.

        Raises:
            InputError: if the detector is of another kind, or predicts keypoints.
        """
        super().__init__()
        if not isinstance(model, (GeneralizedRCNN, DenseDetector)):
            raise InputError(
                f"MODEL.META_ARCHITECTURE: a {type(model).__name__} cannot be traced; "
                "an R-CNN, RetinaNet or FCOS can"
            )
        if getattr(getattr(model, "roi_heads", None), "keypoint_on", False):
            raise InputError(
                "MODEL.KEYPOINT_ON: a model with keypoints cannot be traced; export it by "
                "--format detectron2"
            )
        self.model = model
        self.resize_to = resize_to

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return what OUTPUTS names; masks only of a model with masks.

        Args:
            image: (C, H, W), values 0..255; C is 3, or 1 of a model of grey images.
        """
        height, width = image.size(-2), image.size(-1)  # from the end also in a trace
        image = image.float().reshape(len(self.model.pixel_mean), height, width)
        if self.resize_to:
            image = resize(image, *self.resize_to)
        inputs = {"image": image, "height": height, "width": width}
        if isinstance(self.model, GeneralizedRCNN):
            found = self.model.inference([inputs], do_postprocess=False)[0]
            if found.has("pred_masks"):  # under a name that is not pasted into the image
                found.masks = found.pred_masks[:, 0]
                found.remove("pred_masks")
            found = detector_postprocess(found, height, width)
        else:
            found = self.model([inputs])[0]["instances"]
        masks = (found.masks,) if found.has("masks") else ()
        return found.pred_boxes.tensor, found.scores, found.pred_classes, *masks


def resize(image: Tensor, min_size: int, max_size: int) -> Tensor:
    """Resize an image (C, H, W) as Detectron2's ResizeShortestEdge does with Pillow.

    Pillow's bilinear filter is wider than a pixel when it shrinks. ONNX has this from opset 18
    only, but the filter of each axis is a product with a matrix, which can be exported.
    """
    size = shapes_to_tensor(image.shape[-2:]).double()
    scaled = size * (min_size / size.min())
    scaled = scaled * (max_size / scaled.max()).clamp(max=1.0)
    new = (scaled + 0.5).floor().long()
    # Pillow does the horizontal axis first, and rounds after each.
    image = _rounded(image @ _filter(size[1], new[1]).T)
    return _rounded(_filter(size[0], new[0]) @ image)


def _rounded(image: Tensor) -> Tensor:
    return (image + 0.5).floor().clamp(0, 255)


def _filter(old: Tensor, new: Tensor) -> Tensor:
    """Return the matrix (new, old) of Pillow's bilinear filter between two lengths."""
    scale = old / new
    centers = (torch.arange(new) + 0.5) * scale
    distances = (torch.arange(old) + 0.5 - centers[:, None]).abs() / scale.clamp(min=1.0)
    weights = (1 - distances).clamp(min=0)
    return (weights / weights.sum(dim=1, keepdim=True)).float()


@torch.jit.script_if_tracing
def _batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    if boxes.numel() == 0:
        return torch.zeros(0, dtype=torch.int64, device=boxes.device)
    if boxes.numel() <= 4000:
        offsets = idxs.to(boxes) * (boxes.max() + 1.0)
        return nms(boxes + offsets[:, None], scores, iou_threshold)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for index in torch.unique(idxs):
        members = (idxs == index).nonzero()[:, 0]
        kept[members[nms(boxes[members], scores[members], iou_threshold)]] = True
    indices = kept.nonzero()[:, 0]
    return indices[scores[indices].sort(descending=True)[1]]


def _clamped(limit: int, size: int | Tensor) -> int | Tensor:
    return size.clamp(max=limit) if isinstance(size, Tensor) else min(limit, size)


@contextmanager
def traceable() -> Iterator[None]:
    """Let Detectron2 and torchvision be traced so that any size and number of boxes is right.

    A trace of torchvision suppresses the boxes of all classes at once, each class shifted by a
    large offset, which rounds them. In a program with more than 1000 boxes, torchvision goes class
    by class on a CPU; with this, a trace does, too. A trace of Detectron2 0.6's dense detectors
    would keep as many candidates as the traced image has, and one of its cascades would contain
    Python code that scales gradients; git main needs neither patch.
    """
    with (
        replaced(torchvision_boxes, _batched_nms_coordinate_trick=_batched_nms),
        replaced(dense_detector, min=_clamped),
        replaced(cascade_rcnn, _ScaleGradient=SimpleNamespace(apply=lambda x, scale: x)),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of constants in the trace, which are meant
        yield


def export_torchscript(
    detector: ExportableDetector, image: Tensor, path: str | os.PathLike, metadata: dict
) -> None:
    """Write a detector as TorchScript, with its metadata as the extra file METADATA_KEY.

    Args:
        detector: the detector.
        image: (C, H, W), any image.
        path: the file to write.
        metadata: what ``describe_model`` returns.
    """
    with traceable():
        adapter = TracingAdapter(detector, image).eval()
        module = torch.jit.trace(adapter, (image,), check_trace=False)
    # Weights become constants, for which no one computes gradients.
    module = torch.jit.freeze(module, optimize_numerics=False)
    with replacing(path) as part:
        module.save(str(part), _extra_files={METADATA_KEY: json.dumps(metadata)})
