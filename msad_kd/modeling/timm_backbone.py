"""Classifiers of timm as the bottom-up path of an FPN.

N: images, C: channels of a feature map, H, W: height and width of the images.
"""

import logging
import os

import timm
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from timm.layers import LayerNorm2d, convert_sync_batchnorm, freeze_batch_norm_2d
from timm.models import load_state_dict
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_hook

from msad_kd.utils.errors import InputError, nearest
from msad_kd.utils.hashes import check_hash, split_hash
from msad_kd.utils.unpickle import check_torch_format, trusted

_STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
_NORMS = {"BN": lambda x: x, "SyncBN": convert_sync_batchnorm, "FrozenBN": freeze_batch_norm_2d}
_PROBE_SIZE = (64, 96)  # pixels; unequal, so that maps that are not (N, C, H, W) are noticed


class TimmBackbone(Backbone):
    """Feature maps res2..res5 (strides 4..32) of a timm classifier, those of ``features_only``.

    ``body`` is the classifier without the layers that no feature map needs; its parameters have
    timm's names. A network without batch normalisation but with layer normalisation (Swin,
    ConvNeXt) leaves its stages unnormalised, so each map gets a layer normalisation over its
    channels, ``norms.<name>``, as in its authors' detectors.
    """

    @configurable
    def __init__(
        self,
        *,
        name: str,
        arguments: dict | list,
        norm: str,
        freeze_at: int,
        out_features: list[str],
        in_channels: int = 3,
        pretrained: bool = False,
        checkpoint: str = "",
        bgr: bool = False,
    ):
        """Build the classifier, load its weights, and cut and freeze its layers.

        Args:
            name: a classifier's name in timm, with or without a tag of weights.
            arguments: further arguments of ``timm.create_model``, a dict or [name, value] pairs.
            norm: what its batch normalisation becomes: "BN", "SyncBN" or "FrozenBN".
            freeze_at: the layers that lead to strides up to 2^freeze_at are frozen; 0 freezes none.
            out_features: the feature maps to return, of "res2".."res5".
            in_channels: channels of the images.
            pretrained: whether to start from timm's weights on its hub.
            checkpoint: a file with the classifier's weights to start from instead, as
                ``path#sha256=...`` if its hash is to be checked; "" for none.
            bgr: whether images are BGR, for which the first convolution's weights are reversed.

        Raises:
            InputError: if the network, its arguments, its feature maps or its weights do not fit.
        """
        super().__init__()
        if not timm.is_model(name):
            hint = nearest(name, timm.list_models())
            raise InputError(f"MODEL.TIMM.NAME: timm has no model '{name}'{hint}")
        if norm not in _NORMS:
            raise InputError(f"MODEL.TIMM.NORM is '{norm}'; use one of {[*_NORMS]}")
        if not out_features or set(out_features) - _STRIDES.keys():
            raise InputError(f"MODEL.FPN.IN_FEATURES is {out_features}; use some of {[*_STRIDES]}")
        body = _create(name, arguments, in_channels, pretrained and not checkpoint)
        strides = {f: stride for f, stride in _STRIDES.items() if f in out_features}
        index_of = {info["reduction"]: i for i, info in enumerate(body.feature_info)}
        if absent := set(strides.values()) - index_of.keys():
            raise InputError(
                f"MODEL.TIMM.NAME: '{name}' has feature maps of strides {sorted(index_of)}, but "
                f"MODEL.FPN.IN_FEATURES {list(strides)} needs {sorted(absent)}, too"
            )
        if checkpoint:
            _load(body, name, checkpoint)
        if bgr and (pretrained or checkpoint):
            layers = body.pretrained_cfg["first_conv"]
            for layer in [layers] if isinstance(layers, str) else layers:
                weight = body.get_parameter(f"{layer}.weight")
                weight.data = weight.data.flip(1)
        kinds = (_BatchNorm, nn.LayerNorm)
        has_bn, has_ln = (any(isinstance(m, kind) for m in body.modules()) for kind in kinds)
        self.body = body = _NORMS[norm](body)
        self._indices = [index_of[stride] for stride in strides.values()]
        body.prune_intermediate_layers(self._indices, prune_norm=True)
        channels = {f: body.feature_info[i]["num_chs"] for f, i in zip(strides, self._indices)}
        self._out_features = list(strides)
        self._out_feature_strides = strides
        self._out_feature_channels = channels
        norms = {f: LayerNorm2d(width) for f, width in channels.items()}
        self.norms = nn.ModuleDict(norms if has_ln and not has_bn else {})
        self._frozen: tuple[nn.Module, ...] = ()
        self.eval()
        probe = torch.zeros(1, in_channels, *_PROBE_SIZE)
        self._freeze_unused(name, probe)
        self._freeze_up_to(2**freeze_at, probe)
        self.train()

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        """Return the constructor's arguments."""
        keys = cfg.MODEL.TIMM
        starts = not cfg.MODEL.WEIGHTS
        if not starts and (keys.PRETRAINED or keys.CHECKPOINT):
            message = "MODEL.WEIGHTS is '%s', so the weights of MODEL.TIMM are not read"
            logging.getLogger(__name__).warning(message, cfg.MODEL.WEIGHTS)
        return {
            "name": keys.NAME,
            "arguments": keys.ARGUMENTS,
            "norm": keys.NORM,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
            "out_features": cfg.MODEL.FPN.IN_FEATURES,
            "in_channels": input_shape.channels,
            "pretrained": keys.PRETRAINED and starts,
            "checkpoint": keys.CHECKPOINT if starts else "",
            "bgr": cfg.INPUT.FORMAT == "BGR",
        }

    def train(self, mode: bool = True):
        """Set the mode, except of frozen layers: they keep statistics and skip no block."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the maps of images (N, 3, H, W): (N, C, ceil(H / stride), ceil(W / stride))."""
        # Some networks drop the last rows and columns of an image unless it is padded.
        height, width = x.shape[-2:]
        multiple = max(self._out_feature_strides.values())
        x = F.pad(x, (0, -width % multiple, 0, -height % multiple))
        features = {}
        for feature, value in zip(self._out_features, self._maps(x, self._indices)):
            stride = self._out_feature_strides[feature]
            value = value[..., : -(-height // stride), : -(-width // stride)]
            features[feature] = self.norms[feature](value) if self.norms else value
        return features

    def _maps(self, x: torch.Tensor, indices: list[int]) -> list[torch.Tensor]:
        return self.body.forward_intermediates(
            x, indices=indices, output_fmt="NCHW", stop_early=True, intermediates_only=True
        )

    @torch.enable_grad()
    def _freeze_unused(self, name: str, probe: torch.Tensor) -> None:
        """Check the maps' shapes, and freeze parameters without a gradient, which DDP forbids."""
        expected = [
            (1, shape.channels, *(side // shape.stride for side in _PROBE_SIZE))
            for shape in self.output_shape().values()
        ]
        try:
            maps = self._maps(probe, self._indices)
            shapes = [tuple(value.shape) for value in maps]
            if shapes != expected:
                raise ValueError(f"its feature maps are {shapes} instead of {expected}")
        except Exception as error:  # whatever the network's own code raises
            raise InputError(
                f"MODEL.TIMM.NAME: '{name}' cannot be used for images of any size, such as "
                f"{_PROBE_SIZE} px ({error})"
            ) from error
        parameters = [p for p in self.body.parameters() if p.requires_grad]
        total = sum(value.sum() for value in maps)
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients):
            parameter.requires_grad_(gradient is not None)

    def _freeze_up_to(self, stride: int, probe: torch.Tensor) -> None:
        """Freeze the layers that lead to feature maps of strides 2 to ``stride``."""
        infos = self.body.feature_info[: max(self._indices) + 1]
        below = [i for i, info in enumerate(infos) if 1 < info["reduction"] <= stride]
        if not below:
            return
        frozen = [norm for name, norm in self.norms.items() if _STRIDES[name] <= stride]
        with register_module_forward_hook(lambda module, *_: frozen.append(module)):
            self._maps(probe, below[-1:])  # calls the layers that lead to it, and no other
        for module in frozen:
            module.requires_grad_(False)
        self._frozen = tuple(frozen)  # a tuple, so that they are not registered twice


def _create(name: str, arguments: dict | list, in_channels: int, pretrained: bool) -> nn.Module:
    # Any image size, and windows that shift on small maps, too, as in the authors' detectors.
    swin = {"strict_img_size": False, "always_partition": True} if name.startswith("swin") else {}
    try:
        options = {**swin, **dict(arguments)}
        return timm.create_model(name, pretrained=pretrained, in_chans=in_channels, **options)
    except Exception as error:  # whatever the network's own code or the hub's client raises
        hint = "; without a network, replace MODEL.TIMM.PRETRAINED by CHECKPOINT"
        raise InputError(
            f"MODEL.TIMM.ARGUMENTS: '{name}' cannot be built with the [name, value] pairs "
            f"{arguments} ({error}){hint if pretrained else ''}"
        ) from error


def _load(body: nn.Module, name: str, path: str) -> None:
    """Load a classifier's file; its head may differ, and so may all names if the shapes agree."""
    file, _ = split_hash(path)
    try:
        if os.path.isfile(file):
            check_hash(file, path)
            if not file.endswith(".safetensors"):
                check_torch_format(file)
        state = load_state_dict(file, weights_only=not trusted())
        shapes = {key: value.shape for key, value in state.items()}
        if bad := [key for key, value in state.items() if not torch.isfinite(value).all()]:
            raise ValueError(f"'{bad[0]}' has numbers that are not finite")
    except InputError as error:
        raise InputError(f"MODEL.TIMM.CHECKPOINT: {error}") from error
    except Exception as error:  # whatever timm, torch and safetensors raise
        raise InputError(
            f"MODEL.TIMM.CHECKPOINT: '{path}' cannot be read as a model's weights ({error!r})"
        ) from error
    target = {key: value.shape for key, value in body.state_dict().items()}
    if shapes.keys() != target.keys() and [*shapes.values()] == [*target.values()]:
        state = dict(zip(target, state.values()))  # the same network by other names
    else:
        heads = body.pretrained_cfg.get("classifier") or ()
        heads = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
        state = {key: value for key, value in state.items() if not key.startswith(heads)}
        keys = state.keys() | {key for key in target if not key.startswith(heads)}
        if wrong := sorted(key for key in keys if shapes.get(key) != target.get(key)):
            raise InputError(
                f"MODEL.TIMM.CHECKPOINT: '{path}' does not fit '{name}': {len(wrong)} keys are in "
                f"one of them only or differ in shape, e.g. {', '.join(wrong[:3])}"
            )
    body.load_state_dict(state, strict=False)
