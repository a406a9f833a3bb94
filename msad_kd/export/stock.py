"""Configs that stock Detectron2 reads: YAML, or Python where it has no YAML (FCOS)."""

import copy

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    RPN_HEAD_REGISTRY,
)
from torch import nn

from msad_kd.modeling.classes import is_a
from msad_kd.modeling.fcos import FCOS
from msad_kd.utils.errors import InputError

_ELSE = "export it by --format onnx or torchscript"
_PLAIN, _RETINANET = "build_resnet_fpn_backbone", "build_retinanet_resnet_fpn_backbone"


def stock_config(cfg: CfgNode, weights: str) -> CfgNode:
    """Return the config of the same detector with the keys of stock Detectron2 only.

    Args:
        cfg: the config of a student or a single-resolution detector.
        weights: its MODEL.WEIGHTS.

    Raises:
        InputError: if stock Detectron2 cannot build the model from a YAML config.
    """
    kinds = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE).__mro__
    _check_own_parts(cfg)
    names = [
        kind.__name__ for kind in kinds if _is_stock(kind) and kind.__name__ in META_ARCH_REGISTRY
    ]
    if is_a(cfg, FCOS) or not names:
        raise InputError(
            "MODEL.META_ARCHITECTURE: stock Detectron2 cannot build a "
            f"{cfg.MODEL.META_ARCHITECTURE} from a YAML config; {_ELSE}"
        )
    backbone, block = cfg.MODEL.BACKBONE.NAME, _top_block(cfg)
    if not _is_stock(BACKBONE_REGISTRY.get(backbone)):
        if block == "p5":
            raise InputError(f"MODEL.FPN.TOP_BLOCK: {_no_builder(cfg)}")
        backbone = _RETINANET if block else _PLAIN
    stock = _stock_keys(cfg)
    stock.MODEL.META_ARCHITECTURE = names[0]
    stock.MODEL.BACKBONE.NAME = backbone
    stock.MODEL.WEIGHTS = weights
    return stock


def _is_stock(part) -> bool:
    return part.__module__.startswith("detectron2.")


def _check_own_parts(cfg: CfgNode) -> None:
    """Raise an InputError if a part of the model is a class of the user's."""
    keys = cfg.MODEL
    parts = {
        "META_ARCHITECTURE": (META_ARCH_REGISTRY, keys.META_ARCHITECTURE),
        "PROPOSAL_GENERATOR.NAME": (PROPOSAL_GENERATOR_REGISTRY, keys.PROPOSAL_GENERATOR.NAME),
        "RPN.HEAD_NAME": (RPN_HEAD_REGISTRY, keys.RPN.HEAD_NAME),
        "ANCHOR_GENERATOR.NAME": (ANCHOR_GENERATOR_REGISTRY, keys.ANCHOR_GENERATOR.NAME),
        "ROI_HEADS.NAME": (ROI_HEADS_REGISTRY, keys.ROI_HEADS.NAME),
        "ROI_BOX_HEAD.NAME": (ROI_BOX_HEAD_REGISTRY, keys.ROI_BOX_HEAD.NAME),
        "ROI_MASK_HEAD.NAME": (ROI_MASK_HEAD_REGISTRY, keys.ROI_MASK_HEAD.NAME),
        "ROI_KEYPOINT_HEAD.NAME": (ROI_KEYPOINT_HEAD_REGISTRY, keys.ROI_KEYPOINT_HEAD.NAME),
    }
    for key, (registry, name) in parts.items():
        for kind in registry.get(name).__mro__ if name in registry else ():
            if not _is_known(kind):
                words = f"stock Detectron2 does not know your own {kind.__name__}"
                raise InputError(f"MODEL.{key}: {words}; {_ELSE}")


def _is_known(kind: type) -> bool:
    if any(base.__name__ == "DistilledMixin" for base in kind.__bases__):
        return True  # the same as a student, of which the next class says what it predicts
    return kind.__module__.split(".")[0] in ("detectron2", "msad_kd", "torch", "builtins")


def _stock_keys(cfg: CfgNode) -> CfgNode:
    def take(target: CfgNode, source: CfgNode) -> None:
        for key, value in target.items():
            if isinstance(value, CfgNode):
                take(value, source[key])
            else:
                target[key] = copy.deepcopy(source[key])

    stock = get_cfg()
    take(stock, cfg)
    ours = {entry["name"] for entry in cfg.DATASETS.COCO_FORMAT}  # which stock Detectron2 lacks
    for key in ("TRAIN", "TEST"):
        stock.DATASETS[key] = tuple(x for x in stock.DATASETS[key] or () if x not in ours)
    return stock


def _no_builder(cfg: CfgNode) -> str:
    name, block = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.FPN.TOP_BLOCK
    return f"stock Detectron2 cannot build {name} with the top block {block}; {_ELSE}"


def _top_block(cfg: CfgNode) -> str:
    """Return what p6 and p7 are convolutions of, "res5" or "p5"; "" for p6 by max-pooling.

    Raises:
        InputError: if stock Detectron2 has no such backbone.
    """
    name, keys = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.FPN
    levels, source = len(keys.IN_FEATURES), keys.TOP_BLOCK.removeprefix("conv_")
    if name == _PLAIN:
        return ""
    if name == _RETINANET:
        return "res5"
    if name == "build_five_level_resnet_fpn_backbone":
        if source == "maxpool" and levels == 4:
            return ""
        if source in ("p5", "res5") and levels == 3 and not keys.NORM:
            return source
    elif _is_stock(BACKBONE_REGISTRY.get(name)) and not is_a(cfg, FCOS):
        return ""
    raise InputError(f"MODEL.BACKBONE.NAME: {_no_builder(cfg)}")


_LAZY = '''"""FCOS for stock Detectron2, which has no YAML config of it.

    cfg = LazyConfig.load("config.py")
    model = instantiate(cfg.model).eval()
    DetectionCheckpointer(model).load(cfg.train.init_checkpoint)

Images are {format}, resized as metadata.json says.
"""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from torch import nn


def group_norm(channels):
    return nn.GroupNorm({groups} if channels % {groups} == 0 else 1, channels)


resnet = dict(
{resnet}
)
model = L(FCOS)(
    backbone=L(FPN)(
        bottom_up=L(build_resnet_backbone)(
            cfg=dict(MODEL=dict(BACKBONE=dict(FREEZE_AT={freeze_at}), RESNETS=resnet)),
            input_shape=L(ShapeSpec)(channels={channels}),
        ),
        top_block={top_block},
{fpn}
    ),
    head=L(FCOSHead)(
        input_shape=[L(ShapeSpec)(channels=c, stride=s) for c, s in {shapes}],
{head}
        norm={norm},
    ),
{options}
)
train = dict(init_checkpoint={weights!r}, device={device!r})
'''


def _keywords(values: dict, indent: int) -> str:
    return "\n".join(f"{' ' * indent}{key}={value!r}," for key, value in values.items())


def lazy_config(cfg: CfgNode, model: nn.Module, weights: str) -> str:
    """Return the text of a LazyConfig file that builds an FCOS in stock Detectron2.

    Args:
        cfg: the config of an FCOS.
        model: the model.
        weights: its checkpoint.

    Raises:
        InputError: if stock Detectron2 lacks the backbone or another part.
    """
    _check_own_parts(cfg)
    source, keys, fpn = _top_block(cfg), cfg.MODEL.FCOS, cfg.MODEL.FPN
    stock, shapes = _stock_keys(cfg).MODEL, model.backbone.output_shape()
    top_block = "L(LastLevelMaxPool)()"
    if source:
        below = model.backbone.bottom_up.output_shape()
        channels = below[source].channels if source in below else fpn.OUT_CHANNELS
        sizes = f"in_channels={channels}, out_channels={fpn.OUT_CHANNELS}"
        top_block = f"L(LastLevelP6P7)({sizes}, in_feature={source!r})"
    pyramid = ("in_features", "out_channels", "norm", "fuse_type")
    towers = [fpn.OUT_CHANNELS] * keys.NUM_CONVS
    groups = [m.num_groups for m in model.head.modules() if isinstance(m, nn.GroupNorm)]
    options = FCOS.from_config(cfg)
    del options["backbone"], options["head"]
    return _LAZY.format(
        format=cfg.INPUT.FORMAT,
        groups=groups[0] if groups else 1,
        resnet=_keywords(stock.RESNETS, 4),
        freeze_at=stock.BACKBONE.FREEZE_AT,
        channels=len(cfg.MODEL.PIXEL_MEAN),
        top_block=top_block,
        fpn=_keywords({name: fpn[name.upper()] for name in pyramid}, 8),
        shapes=[(shapes[name].channels, shapes[name].stride) for name in keys.IN_FEATURES],
        head=_keywords(
            {"num_classes": keys.NUM_CLASSES, "conv_dims": towers, "prior_prob": keys.PRIOR_PROB}, 8
        ),
        norm="group_norm" if keys.NORM == "GN" else repr(keys.NORM),
        options=_keywords(options, 4),
        weights=weights,
        device=cfg.MODEL.DEVICE,
    )
