"""Fixtures: exported detectors with random weights, which find as much as they may."""

import functools

import pytest
import torch
from detectors import DENSE
from timm_networks import options

from msad_kd import KDTrainer, build_config
from msad_kd.export.metadata import describe_model
from msad_kd.export.onnx import OnnxDetector, export_onnx
from msad_kd.export.tracing import ExportableDetector, export_torchscript

MANY = ["TEST.DETECTIONS_PER_IMAGE", 1000]


@pytest.fixture(scope="session")
def build(files_of):
    """build(detector, KEY, VALUE, ...): the config of a student and its model; the same weights."""

    def make(detector, *opts):
        name, _, network = detector.partition(" on ")
        opts = [*(options(network) if network else ()), *opts]
        cfg = build_config(str(files_of(name)["student"]), opts)
        torch.manual_seed(0)
        model = KDTrainer.load_model(cfg, None, "the config")
        if name == "fcos":  # boxes that are not empty
            torch.nn.init.constant_(model.head.bbox_pred.bias, 1.0)
        return cfg, model

    return make


@pytest.fixture(scope="session")
def exported(build, tmp_path_factory):
    """exported(detector, ...): its model, and what runs its ONNX and its TorchScript file."""

    @functools.cache
    def make(detector, *opts):
        folder = tmp_path_factory.mktemp("exported")
        if (name := detector.split()[0]) in DENSE:
            # Fewer than the coarsest level of large images has, and more than that of this has.
            key = f"MODEL.{name.upper()}.TOPK_CANDIDATES_TEST"
            opts = [key, 75 if name == "retinanet" else 10, *MANY, *opts]
        cfg, model = build(detector, *opts)
        image = torch.rand(3, 32, 48) * 255
        detector = ExportableDetector(model).eval()
        export_onnx(detector, image, folder / "x.onnx", describe_model(cfg, model, "onnx"))
        export_torchscript(detector, image, folder / "x.ts", describe_model(cfg, model, "ts"))
        onnx = OnnxDetector(folder / "x.onnx", 1)
        traced = torch.jit.load(folder / "x.ts")
        return model, lambda image: [torch.as_tensor(x) for x in onnx(image.numpy())], traced

    return make
