"""Writing a detector as ONNX, and running it by onnxruntime."""

import io
import json
import os
import sys

import numpy as np
import torch
from detectron2.export import TracingAdapter
from torch._C import TensorType
from torch.onnx import symbolic_helper

from msad_kd.checkpoint.files import replacing
from msad_kd.export.tracing import METADATA_KEY, ExportableDetector, traceable
from msad_kd.utils.errors import InputError

OPSET = 17


def import_onnx():
    """Return the modules onnx and onnxruntime, which nothing else of this library needs.

    Raises:
        InputError: if one is not installed.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise InputError(
            f"ONNX needs a package that is not installed ({error}); pip install onnx onnxruntime"
        ) from error
    return onnx, onnxruntime


def _nms(g, boxes, scores, iou_threshold):
    """Write torchvision's nms; its own exporter gives the result no type in a scripted branch."""

    def constant(value, dtype=torch.int64):
        return g.op("Constant", value_t=torch.tensor(value, dtype=dtype))

    threshold = symbolic_helper._maybe_get_const(iou_threshold, "f")
    found = g.op(  # (kept, 3): batch, class, box
        "NonMaxSuppression",
        g.op("Unsqueeze", boxes, constant([0])),
        g.op("Unsqueeze", scores, constant([0, 1])),
        constant([sys.maxsize]),
        constant([threshold], torch.float32),
    )
    column = g.op("Slice", found, constant([2]), constant([3]), constant([1]))
    kept = g.op("Squeeze", column, constant([1]))
    kept.setType(TensorType.get().with_dtype(torch.int64).with_sizes([None]))
    return kept


def export_onnx(
    detector: ExportableDetector, image: torch.Tensor, path: str | os.PathLike, metadata: dict
) -> None:
    """Write a detector as ONNX for images of any size.

    Args:
        detector: the detector.
        image: (C, H, W), any image.
        path: the file to write.
        metadata: what ``describe_model`` returns; it becomes the property METADATA_KEY.

    Raises:
        InputError: if onnx or onnxruntime is missing.
    """
    onnx, _ = import_onnx()
    names, buffer = metadata["outputs"], io.BytesIO()
    torch.onnx.register_custom_op_symbolic("torchvision::nms", _nms, OPSET)
    try:
        with traceable():
            torch.onnx.export(
                TracingAdapter(detector, image).eval(),
                (image,),
                buffer,
                dynamo=False,  # the newer exporter takes no Mask R-CNN
                opset_version=OPSET,
                input_names=["image"],
                output_names=names,
                dynamic_axes={"image": {1: "H", 2: "W"}, **{name: {0: "R"} for name in names}},
            )
    finally:
        torch.onnx.unregister_custom_op_symbolic("torchvision::nms", OPSET)
    model = onnx.load_from_string(buffer.getvalue())
    model.metadata_props.add(key=METADATA_KEY, value=json.dumps(metadata))
    onnx.checker.check_model(model)
    with replacing(path) as part:
        onnx.save(model, part)


class OnnxDetector:
    """An exported detector, run by onnxruntime on the CPU."""

    def __init__(self, path: str | os.PathLike, threads: int = 0):
        """Load a file.

        Args:
            path: what ``export_onnx`` wrote.
            threads: how many threads an operator may use; 0: as many as there are cores.

        Raises:
            InputError: if onnxruntime is missing or the file is no detector of this library.
        """
        _, runtime = import_onnx()
        if not os.path.isfile(path):
            raise InputError(f"'{path}' does not exist")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # it warns of shapes that branches leave open
        try:
            providers = ["CPUExecutionProvider"]
            self._session = runtime.InferenceSession(os.fspath(path), options, providers)
            properties = self._session.get_modelmeta().custom_metadata_map
        except Exception as error:  # whatever onnxruntime raises for a damaged file
            raise InputError(f"'{path}' cannot be read as an ONNX model ({error})") from error
        if METADATA_KEY not in properties:
            raise InputError(
                f"'{path}' has no '{METADATA_KEY}' in its metadata; write it by "
                "tools/export_model.py"
            )
        self.metadata = json.loads(properties[METADATA_KEY])

    def __call__(self, image: np.ndarray) -> list[np.ndarray]:
        """Return the outputs for an image (C, H, W), values 0..255."""
        return self._session.run(self.metadata["outputs"], {"image": image.astype(np.float32)})
