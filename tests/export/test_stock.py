"""Configs that stock Detectron2 reads, and what it predicts with them."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    GeneralizedRCNN,
    PanopticFPN,
    StandardROIHeads,
)
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from helpers import NO_TEST, ROOT, input_sizes, load_tool, tiny_model, train
from timm_networks import options

from msad_kd import DistilledMixin, InputError, build_config
from msad_kd.export.stock import lazy_config, stock_config

tool = load_tool("export_model")

# A program in which this project cannot be imported; it reads what was exported to each folder.
STOCK_PROGRAM = """
import sys
from pathlib import Path

sys.modules["msad_kd"] = None

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.engine import DefaultPredictor

torch.set_num_threads(1)
image = torch.load("image.pth")
for folder in map(Path, sys.argv[1:]):
    if (folder / "config.py").exists():
        cfg = LazyConfig.load(str(folder / "config.py"))
        model = instantiate(cfg.model).eval()
        DetectionCheckpointer(model).load(cfg.train.init_checkpoint)
    else:
        cfg = get_cfg()
        cfg.merge_from_file(str(folder / "config.yaml"))
        model = DefaultPredictor(cfg).model
    with torch.no_grad():
        fields = model([{"image": image}])[0]["instances"].get_fields()
    torch.save({**fields, "pred_boxes": fields["pred_boxes"].tensor}, folder / "found.pth")
"""


def shapes(cfg):
    with torch.device("meta"):
        model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


@pytest.mark.parametrize("role", ["student", "LR", "HR"])
@pytest.mark.parametrize("detector", ["mask_rcnn", "faster_rcnn", "retinanet"])
def test_coco_configs_become_stock(detector, role, tmp_path):
    cfg = build_config(str(ROOT / f"configs/COCO/{detector}_R_50_FPN_{role}_1x.yaml"), [])
    (tmp_path / "config.yaml").write_text(stock_config(cfg, "model.pth").dump())
    stock = get_cfg()
    stock.merge_from_file(str(tmp_path / "config.yaml"))
    name = "RetinaNet" if detector == "retinanet" else "GeneralizedRCNN"
    assert stock.MODEL.META_ARCHITECTURE == name and stock.MODEL.WEIGHTS == "model.pth"
    assert not stock.MODEL.BACKBONE.NAME.startswith("build_five")
    assert stock.DATASETS.TRAIN == cfg.DATASETS.TRAIN  # which stock Detectron2 knows
    assert stock.INPUT == {key: cfg.INPUT[key] for key in stock.INPUT}
    assert shapes(stock) == shapes(cfg)


def test_data_sets_of_ones_own_are_not_named(config):
    stock = stock_config(config("lr"), "model.pth")
    assert stock.DATASETS.TRAIN == stock.DATASETS.TEST == ()


@pytest.fixture(scope="module")
def weights(build, tmp_path_factory):
    """weights(detector, ...): a checkpoint of random weights with the names of the classes."""

    def make(detector, *opts):
        path = tmp_path_factory.mktemp("weights") / "model.pth"
        model = build(detector, *opts)[1]
        extra = {"distiller.x": torch.zeros(1)}
        torch.save({"model": {**model.state_dict(), **extra}, "classes": [*"abcdefgh"]}, path)
        return path

    return make


def test_stock_detectron2_gives_identical_predictions(
    build, weights, files_of, student_config, tmp_path
):
    conv = "conv_p5", "MODEL.BACKBONE.NAME", "build_five_level_resnet_fpn_backbone"
    three = ["res3", "res4", "res5"]
    coarse = ["p3", "p4", "p5", "p6", "p7"]
    variants = {
        "mask_rcnn": [],
        "faster_rcnn": [],
        "retinanet": [],
        "fcos": [],
        "fcos conv": [
            *("MODEL.FPN.TOP_BLOCK", *conv, "MODEL.FPN.IN_FEATURES", three),
            *("MODEL.RESNETS.OUT_FEATURES", three, "MODEL.FCOS.IN_FEATURES", coarse),
            *("MODEL.FCOS.NORM", "", "KD.LOSSES", []),
        ],
    }
    image = torch.rand(3, 70, 50, generator=torch.manual_seed(0)) * 255
    torch.save(image, tmp_path / "image.pth")
    folders, expected = [], []
    for name, opts in variants.items():
        detector = name.split()[0]
        folders.append(tmp_path / name.replace(" ", "_"))
        arguments = ["--config-file", files_of(detector)["student"], "--format", "detectron2"]
        arguments += ["--weights", weights(detector, *opts), "--output", folders[-1]]
        tool.main([*map(str, arguments), *map(str, opts)])
        with torch.no_grad():
            expected.append(build(detector, *opts)[1]([{"image": image}])[0]["instances"])
        assert json.loads((folders[-1] / "metadata.json").read_text())["classes"] == [*"abcdefgh"]
        state = torch.load(folders[-1] / "model.pth")["model"]
        assert not [key for key in state if key.startswith("distiller")]
    # What a training has saved, by a config of Detectron2's keys alone.
    losses = [{"name": "l1", "weight": 0.6, "adapter": True}]
    trained = train(student_config("SOLVER.MAX_ITER", 1, "KD.LOSSES", losses, *NO_TEST))
    plain = {"_BASE_": str(ROOT / "configs/Base-RCNN-FPN-LR.yaml"), "INPUT": input_sizes(32)}
    plain["MODEL"] = tiny_model(4, 8, 16, 32, 64)
    plain["MODEL"]["WEIGHTS"] = f"{trained.cfg.OUTPUT_DIR}/model_final.pth"
    plain["TEST"] = {"DETECTIONS_PER_IMAGE": 20}
    folders.append(tmp_path / "trained")
    folders[-1].mkdir()
    (folders[-1] / "config.yaml").write_text(yaml.safe_dump(plain))
    with torch.no_grad():
        expected.append(trained.model.eval()([{"image": image}])[0]["instances"])
    done = subprocess.run(
        [sys.executable, "-c", STOCK_PROGRAM, *map(str, folders)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for folder, instances in zip(folders, expected, strict=True):
        fields = torch.load(folder / "found.pth")
        assert len(instances) > 2 and fields.keys() == instances.get_fields().keys()
        assert torch.equal(fields.pop("pred_boxes"), instances.pred_boxes.tensor)
        assert all(torch.equal(fields[name], instances.get(name)) for name in fields)


NORMED = ["MODEL.BACKBONE.NAME", "build_five_level_resnet_fpn_backbone", "MODEL.FPN.NORM", "BN"]


class OwnRCNN(GeneralizedRCNN):
    pass


class OwnHeads(StandardROIHeads):
    pass


class OwnBoxHead(FastRCNNConvFCHead):
    pass


class DistilledPanopticFPN(DistilledMixin, PanopticFPN):
    pass


@pytest.mark.parametrize(
    ("key", "registry", "part"),
    [
        ("MODEL.META_ARCHITECTURE", META_ARCH_REGISTRY, OwnRCNN),
        ("MODEL.ROI_HEADS.NAME", ROI_HEADS_REGISTRY, OwnHeads),
        ("MODEL.ROI_BOX_HEAD.NAME", ROI_BOX_HEAD_REGISTRY, OwnBoxHead),
    ],
)
def test_ones_own_parts_are_unknown_to_stock_detectron2(build, monkeypatch, key, registry, part):
    monkeypatch.setitem(registry._obj_map, part.__name__, part)
    cfg = build("mask_rcnn")[0].clone()
    cfg.defrost()
    cfg.merge_from_list([key, part.__name__])
    with pytest.raises(InputError, match=f"{key}: stock .* your own {part.__name__}; export it by"):
        stock_config(cfg, "x")


def test_a_student_of_a_stock_detector_is_that_detector(build, monkeypatch):
    monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, "DistilledPanopticFPN", DistilledPanopticFPN)
    cfg = build("mask_rcnn")[0].clone()
    cfg.defrost()
    cfg.MODEL.META_ARCHITECTURE = "DistilledPanopticFPN"
    assert stock_config(cfg, "x").MODEL.META_ARCHITECTURE == "PanopticFPN"


@pytest.mark.parametrize(
    ("make", "detector", "opts", "words"),
    [
        (stock_config, "mask_rcnn", options(), "build_timm_fpn_backbone .* onnx or torchscript"),
        (stock_config, "mask_rcnn", [*NORMED, "MODEL.FPN.TOP_BLOCK", "conv_p5"], "block conv_p5"),
        (stock_config, "fcos", [], "cannot build a DistilledFCOS from a YAML config"),
        (lazy_config, "fcos", options(), "build_timm_fpn_backbone .* onnx or torchscript"),
    ],
)
def test_what_stock_detectron2_cannot_build(build, make, detector, opts, words):
    cfg, model = build(detector, *opts)
    with pytest.raises(InputError, match=words):
        make(cfg, "x") if make is stock_config else make(cfg, model, "x")
