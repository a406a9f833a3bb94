"""Any convolutional network of torchvision's as the bottom-up part of an FPN.

Its feature maps are found by tracing it: the last one of each stride. Weights converted by
``tools/convert_torchvision.py`` are loaded by ``MODEL.WEIGHTS``, as a ResNet's are.
"""

from __future__ import annotations

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from torch import nn
from torchvision import models
from torchvision.models import get_model, list_models
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from torchvision.ops import StochasticDepth

from msad_kd.modeling.fpn import AlignedFPN, build_aligned_fpn, build_five_level_fpn
from msad_kd.utils.errors import InputError, nearest
from msad_kd.utils.seed import preserved_rng

__all__ = [
    "TorchvisionBackbone",
    "build_aligned_torchvision_fpn_backbone",
    "build_torchvision_fpn_backbone",
]

_NORMS = ("BN", "SyncBN", "FrozenBN")


class TorchvisionBackbone(Backbone):
    """Feature maps res2..res5 (strides 4..32) of a network of torchvision's.

    Its parameters have torchvision's names, under ``body``; those that no feature map needs, the
    classifier's, are absent.
    """

    @configurable
    def __init__(self, *, name: str, arguments: dict, norm: str, freeze_at: int, out_features):
        """
        Args:
            name: of a classifier in ``torchvision.models``.
            arguments: further arguments of the network's function, such as ``width_mult``.
            norm: its batch normalisation is "BN", "SyncBN" or "FrozenBN".
            freeze_at: what leads to strides up to 2^freeze_at is frozen; 0 freezes nothing.
            out_features: "res2" .. "res5", those wanted.

        Raises:
            InputError: if there is no such network, argument or normalisation, or if a stride has
                no feature map of (N, C, H, W).
        """
        super().__init__()
        known = list_models(module=models)
        if name not in known:
            raise InputError(
                f"MODEL.TORCHVISION.NAME: torchvision has no model '{name}'{nearest(name, known)}"
            )
        if norm not in _NORMS:
            raise InputError(f"MODEL.TORCHVISION.NORM is '{norm}'; use one of {_NORMS}")
        try:
            body = get_model(name, weights=None, **arguments)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"MODEL.TORCHVISION.ARGUMENTS: '{name}' cannot be built with {arguments} ({error})"
            ) from error
        nodes, maps = _feature_maps(body, name)
        if norm == "FrozenBN":
            body = FrozenBatchNorm2d.convert_frozen_batchnorm(body)
        elif norm == "SyncBN":
            body = nn.SyncBatchNorm.convert_sync_batchnorm(body)
        wanted = {feature: 2 ** int(feature[3:]) for feature in out_features}
        for feature, stride in wanted.items():
            if stride not in maps:
                raise InputError(
                    f"MODEL.TORCHVISION.NAME: '{name}' has no feature map (N, C, H, W) of stride "
                    f"{stride} for {feature}"
                )
        frozen = [nodes.index(node) for s, (node, _) in maps.items() if s <= 2**freeze_at]
        if freeze_at > 0 and frozen:
            _freeze(body, nodes[: max(frozen) + 1])
        self.body = create_feature_extractor(
            body,
            {maps[stride][0]: feature for feature, stride in wanted.items()},
            # Frozen normalisation looks at its input, which tracing cannot; so it isn't traced.
            tracer_kwargs={"leaf_modules": [FrozenBatchNorm2d]},
            suppress_diff_warning=True,
        )
        self._out_features = list(out_features)
        self._out_feature_strides = wanted
        self._out_feature_channels = {f: maps[stride][1] for f, stride in wanted.items()}

    @classmethod
    def from_config(cls, cfg):
        keys = cfg.MODEL.TORCHVISION
        arguments = list(keys.ARGUMENTS)
        if len(arguments) % 2:
            raise InputError(
                f"MODEL.TORCHVISION.ARGUMENTS: {arguments} should be names and values in turn"
            )
        return {
            "name": keys.NAME,
            "arguments": dict(zip(arguments[::2], arguments[1::2])),
            "norm": keys.NORM,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
            "out_features": cfg.MODEL.FPN.IN_FEATURES,
        }

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images (N, 3, H, W) to feature name to (N, C, H / stride, W / stride)."""
        return self.body(x)


def _feature_maps(body: nn.Module, name: str) -> tuple[list[str], dict[int, tuple[str, int]]]:
    """Trace a network.

    Returns:
        its nodes in the order they are computed, and stride to (node, channels) of the last feature
        map of that stride which all that follows is computed from: the inside of a residual block
        is not.
    """
    height, width = 128, 192  # unequal, so that other layouts than (N, C, H, W) are told apart
    try:
        train, evaluation = get_graph_node_names(body, suppress_diff_warning=True)
        names = [node for node in evaluation if node in set(train)][1:]  # the first is the input
        probe = create_feature_extractor(body, names, suppress_diff_warning=True).eval()
        with preserved_rng(), torch.no_grad():
            outputs = probe(torch.zeros(1, 3, height, width))
    except Exception as error:  # whatever the network's own code raises
        raise InputError(
            f"MODEL.TORCHVISION.NAME: '{name}' cannot be traced for its feature maps ({error})"
        ) from error
    graph = list(probe.graph.nodes)
    position = {node: i for i, node in enumerate(graph)}
    name_of = {node: name for name, node in graph[-1].args[0].items()}
    maps, needed_until = {}, 0  # the last place where something computed so far is used
    for node in graph[:-1]:
        output = outputs.get(name_of.get(node))
        if (
            isinstance(output, torch.Tensor)
            and output.dim() == 4
            and needed_until <= position[node]
        ):
            stride = height // output.shape[2]
            if tuple(output.shape[2:]) == (height // stride, width // stride):
                maps[stride] = name_of[node], output.shape[1]
        uses = [position[user] for user in node.users if user.op != "output"]
        needed_until = max([needed_until, *uses])
    return names, maps


def _freeze(body: nn.Module, nodes: list[str]) -> None:
    """Freeze parameters and normalisation of the modules that nodes stand for; none is skipped."""
    modules, parameters = dict(body.named_modules()), dict(body.named_parameters())
    for node in nodes:
        if node in parameters:
            parameters[node].requires_grad_(False)
        elif node in modules:
            modules[node].requires_grad_(False)
            if isinstance(modules[node], StochasticDepth):
                modules[node].p = 0.0
            frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(modules[node])
            if frozen is not modules[node]:
                parent, _, child = node.rpartition(".")
                setattr(body.get_submodule(parent), child, frozen)


@BACKBONE_REGISTRY.register()
def build_torchvision_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """An FPN on ``MODEL.TORCHVISION``: p2..p6, or p3..p7 when FPN.IN_FEATURES lacks res2."""
    return build_five_level_fpn(cfg, TorchvisionBackbone(cfg))


@BACKBONE_REGISTRY.register()
def build_aligned_torchvision_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> AlignedFPN:
    """The same for a multi-resolution teacher: m = log2 k levels more."""
    return build_aligned_fpn(cfg, TorchvisionBackbone(cfg))
