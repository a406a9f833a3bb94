"""Export of a trained detector: files for stock Detectron2, TorchScript and ONNX."""

from msad_kd.export.metadata import describe_model
from msad_kd.export.onnx import OnnxDetector, export_onnx
from msad_kd.export.stock import lazy_config, stock_config
from msad_kd.export.tracing import ExportableDetector, export_torchscript
