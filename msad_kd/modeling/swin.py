"""Swin Transformers as Detectron2 backbones with an FPN; the blocks are torchvision's.

Swin (arXiv 2103.14030) attends within windows, which are shifted from block to block. Its stages
have strides 4, 8, 16, 32 and are called res2..res5, so that the configs of a ResNet's FPN fit.

N: images, C: channels of a stage, H, W: height and width of the images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from torch import nn
from torchvision.models.swin_transformer import SwinTransformer

from msad_kd.modeling.fpn import AlignedFPN, build_aligned_fpn, build_five_level_fpn
from msad_kd.utils.errors import InputError

__all__ = [
    "SwinBackbone",
    "build_aligned_swin_fpn_backbone",
    "build_swin_fpn_backbone",
    "convert_torchvision",
]

STAGES = ("res2", "res3", "res4", "res5")
PATCH = 4  # side of the patches that become the first stage's cells


class SwinBackbone(Backbone):
    """Torchvision's Swin without its classifier, each stage that is read out normalised.

    Its parameters have torchvision's names, ``features.*``, and those of ``norms.<stage>``.
    """

    @configurable
    def __init__(
        self,
        *,
        embed_dim: int,
        depths: list[int],
        num_heads: list[int],
        window_size: int,
        stochastic_depth_prob: float = 0.0,
        out_features: list[str] = STAGES,
        freeze_at: int = 0,
    ):
        """
        Args:
            embed_dim: channels of the first stage; every next one has twice as many.
            depths: blocks of each of the four stages.
            num_heads: attention heads of each stage; they share its channels out.
            window_size: side of a window, in cells.
            stochastic_depth_prob: probability that the last block is skipped in training; it rises
                linearly from 0 at the first block.
            out_features: the stages to read out, of "res2".."res5".
            freeze_at: 0 trains everything, 1 freezes the patches' embedding, 2 the first stage,
                too, and so on; a frozen stage skips no block.

        Raises:
            InputError: if there are not four stages, if heads cannot share the channels out, or if
                there is no such stage to read out.
        """
        super().__init__()
        for key, value in (("DEPTHS", depths), ("NUM_HEADS", num_heads)):
            if len(value) != len(STAGES):
                raise InputError(
                    f"MODEL.SWIN.{key} is {list(value)}; give one number for each of the "
                    f"{len(STAGES)} stages"
                )
        channels = {stage: embed_dim * 2**i for i, stage in enumerate(STAGES)}
        for (stage, width), heads in zip(channels.items(), num_heads):
            if width % heads:
                raise InputError(
                    f"MODEL.SWIN.NUM_HEADS: {heads} heads cannot share out the {width} channels of "
                    f"{stage}; change it or MODEL.SWIN.EMBED_DIM"
                )
        unknown = [stage for stage in out_features if stage not in STAGES]
        if unknown or not out_features:
            raise InputError(
                f"MODEL.FPN.IN_FEATURES is {list(out_features)}; use one or more of "
                f"{', '.join(STAGES)}"
            )
        swin = SwinTransformer(
            patch_size=[PATCH, PATCH],
            embed_dim=embed_dim,
            depths=list(depths),
            num_heads=list(num_heads),
            window_size=[window_size, window_size],
            stochastic_depth_prob=stochastic_depth_prob,
            num_classes=1,  # the classifier is left behind
        )
        # Patches, stage, merging, stage, merging, stage, merging, stage. After the last one that is
        # read out there would be parameters without a gradient, which DDP does not forgive.
        last = max(STAGES.index(stage) for stage in out_features)
        self.features = swin.features[: 2 * last + 2]
        self._out_features = [stage for stage in STAGES if stage in out_features]
        self._out_feature_channels = channels
        self._out_feature_strides = {stage: PATCH * 2**i for i, stage in enumerate(STAGES)}
        self.norms = nn.ModuleDict({s: nn.LayerNorm(channels[s]) for s in self._out_features})
        # The embedding; the first stage; then each stage with the merging before it.
        self._frozen_layers = max(min(freeze_at, 1), 2 * freeze_at - 2)
        self.features[: self._frozen_layers].requires_grad_(False)
        for stage in self._out_features:
            if STAGES.index(stage) < freeze_at - 1:
                self.norms[stage].requires_grad_(False)

    @classmethod
    def from_config(cls, cfg, input_shape: ShapeSpec):
        if input_shape.channels != 3:
            raise InputError(
                f"MODEL.PIXEL_MEAN has {input_shape.channels} values, but a Swin reads images of 3 "
                "channels"
            )
        keys = cfg.MODEL.SWIN
        return {
            "embed_dim": keys.EMBED_DIM,
            "depths": keys.DEPTHS,
            "num_heads": keys.NUM_HEADS,
            "window_size": keys.WINDOW_SIZE,
            "stochastic_depth_prob": keys.STOCHASTIC_DEPTH_PROB,
            "out_features": cfg.MODEL.FPN.IN_FEATURES,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
        }

    def train(self, mode: bool = True):
        super().train(mode)
        self.features[: self._frozen_layers].eval()
        return self

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            x: images (N, 3, H, W) of any size; torchvision pads the windows, and each merging.

        Returns:
            stage to (N, C, ceil(H / 4), ceil(W / 4)), ceil(H / 8), ...
        """
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % PATCH, 0, -height % PATCH))
        features = {}
        for i, layer in enumerate(self.features):
            x = layer(x)  # N, H / stride, W / stride, C
            stage = STAGES[i // 2]
            if i % 2 and stage in self.norms:
                features[stage] = self.norms[stage](x).permute(0, 3, 1, 2).contiguous()
        return features


@BACKBONE_REGISTRY.register()
def build_swin_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """A Swin FPN: p2..p6, or p3..p7 when FPN.IN_FEATURES lacks res2."""
    return build_five_level_fpn(cfg, SwinBackbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_aligned_swin_fpn_backbone(cfg, input_shape: ShapeSpec) -> AlignedFPN:
    """A Swin FPN for a multi-resolution teacher: m = log2 k levels more."""
    return build_aligned_fpn(cfg, SwinBackbone(cfg, input_shape))


def convert_torchvision(state: dict[str, torch.Tensor], image_format: str) -> dict:
    """Torchvision's weights of a Swin (ImageNet, RGB) as those of a detector's backbone.

    The stages' normalisations have no counterpart and start anew, as in the authors' detectors.

    Args:
        state: the state dict of ``torchvision.models.swin_t``, ``swin_s`` or ``swin_b``.
        image_format: INPUT.FORMAT of the detector, "BGR" or "RGB"; for the first, the first
            convolution's input channels are reversed.

    Returns:
        names of the detector's, ``backbone.bottom_up.features.*``, to weights.

    Raises:
        InputError: if the weights are not a Swin's of torchvision.
    """
    block, first = "features.1.0.attn.", "features.0.0.weight"
    if f"{block}logit_scale" in state:
        raise InputError("these are weights of a Swin V2; the backbone is Swin's first version")
    if f"{block}relative_position_bias_table" not in state:
        raise InputError(
            f"these are no weights of torchvision's Swin: {block}relative_position_bias_table is "
            "absent"
        )
    converted = {k: v for k, v in state.items() if k.startswith("features.")}
    if image_format == "BGR":
        converted[first] = converted[first].flip(1)
    return {f"backbone.bottom_up.{name}": value for name, value in converted.items()}
