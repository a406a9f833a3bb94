"""The multi-resolution teacher: MSAD, arXiv 2109.06875, sec. 3.1 and 3.2.

N: images, C: channels, H, W: height and width of the low-resolution images, k: high-resolution side
/ low-resolution side, m = log2 k.

A teacher works in pixels of the high-resolution image: its heads are a stock detector's that read
p3..p7 (strides 8..128 for k = 2) with high-resolution boxes. The low-resolution pyramid P'2..P'6 is
renamed to p3..p7, and both pyramids are fused level by level.
"""

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, RetinaNet

from msad_kd.modeling.batch_statistics import (
    add_low_resolution_statistics,
    low_resolution_statistics,
)
from msad_kd.modeling.capture import answering, computing
from msad_kd.modeling.fcos import FCOS
from msad_kd.modeling.fusion import CrossingFeatureFusion
from msad_kd.modeling.loss_normalizer import get_normalizer, set_normalizer
from msad_kd.modeling.pyramid import (
    Pyramid,
    aligned_levels,
    check_images,
    level_shift,
    normalized_batch,
    shift_levels,
    valid_masks,
)
from msad_kd.utils.errors import InputError
from msad_kd.utils.replaced import replaced

BRANCHES = ("hr", "lr", "fused")


class MultiResolutionMixin:
    """Make a stock detector a multi-resolution teacher: one backbone, two passes, one head.

    Its training losses are those of three branches, L_HR + L_LR + w L_fused, named ``<loss>_hr``,
    ``<loss>_lr`` and ``<loss>_fused``. In evaluation it predicts with one branch, ``test_branch``.

    Inputs have ``image`` (3, kH, kW) and, except for the "hr" branch, ``image_lr`` (3, H, W), as
    ``TwoResolutionMapper(frame="hr")`` makes them.
    """

    frame = "hr"

    @configurable
    def __init__(
        self,
        *,
        fusion: CrossingFeatureFusion,
        fused_weight: float,
        mask_padding: bool,
        separate_statistics: bool,
        test_branch: str,
        scale: int,
        **kwargs,
    ):
        """Build the stock detector and check its parts.

        Args:
            fusion: the module that fuses the pyramids.
            fused_weight: w.
            mask_padding: whether the fusion leaves padding out of its averages.
            separate_statistics: whether batch normalisation has statistics for each resolution.
            test_branch: "fused", "hr" or "lr".
            scale: k.
            kwargs: arguments of the stock detector.

        Raises:
            InputError: if the branch, the backbone or the levels that the heads read do not fit.
        """
        super().__init__(**kwargs)
        self.fusion = fusion
        self.fused_weight = fused_weight
        self.mask_padding = mask_padding
        self.test_branch = test_branch
        self.scale = scale
        if test_branch not in BRANCHES:
            raise InputError(
                f"MODEL.MULTI_RESOLUTION.TEST_BRANCH is '{test_branch}'; use one of {BRANCHES}"
            )
        if separate_statistics and not add_low_resolution_statistics(self.backbone):
            raise InputError(
                "MODEL.MULTI_RESOLUTION.SEPARATE_STATISTICS is True, but no normalisation of the "
                "backbone updates statistics; set it to False, or RESNETS.NORM (TIMM.NORM) to BN "
                "and BACKBONE.FREEZE_AT lower"
            )
        if getattr(self.backbone, "scale", 1) != scale:
            raise InputError(
                f"MODEL.BACKBONE.NAME: a {type(self.backbone).__name__} pads images for one "
                "resolution; use one of the backbones build_aligned_..."
            )
        levels, heads = self.strides(), getattr(self, "roi_heads", None)
        for part in (self, getattr(self, "proposal_generator", None), heads):
            # A dense detector has head_in_features, the parts of an R-CNN have in_features.
            names = getattr(part, "head_in_features", getattr(part, "in_features", ()))
            if absent := [name for name in names if name not in levels]:
                raise InputError(
                    f"IN_FEATURES: the {type(part).__name__} reads {', '.join(absent)}, but the "
                    f"levels that both resolutions have are {', '.join(levels)}"
                )

    @classmethod
    def from_config(cls, cfg):
        """Return the constructor's arguments."""
        keys = cfg.MODEL.MULTI_RESOLUTION
        return {
            **super().from_config(cfg),
            "fusion": CrossingFeatureFusion(cfg.MODEL.FPN.OUT_CHANNELS, keys.REDUCTION),
            "fused_weight": keys.FUSED_WEIGHT,
            "mask_padding": keys.MASK_PADDING,
            "separate_statistics": keys.SEPARATE_STATISTICS,
            "test_branch": keys.TEST_BRANCH,
            "scale": cfg.KD.SCALE,
        }

    def strides(self) -> dict[str, int]:
        """Return each level's stride in pixels of the high-resolution image, for all branches."""
        levels = aligned_levels(self.backbone.output_shape(), self.scale)
        return {name: shape.stride for name, shape in levels.items()}

    def pyramids(
        self,
        high: torch.Tensor | None,
        low: torch.Tensor | None,
        sizes: list[tuple[int, int]],
        branches: tuple[str, ...],
    ) -> dict[str, Pyramid]:
        """Return branch to aligned pyramid: p3..p7 for k = 2, (N, C, H / 4, W / 4) and coarser.

        Args:
            high: padded, normalised images (N, 3, kH, kW); None if no branch needs them.
            low: the same at low resolution, (N, 3, H, W).
            sizes: (height, width) of each high-resolution image without padding.
            branches: the branches to return.
        """
        # Levels without a partner at the other resolution are not computed. Doing so would change
        # nothing but the batch statistics of a normalised p7.
        backbone, levels, shift = self.backbone, self.strides(), level_shift(self.scale)
        pyramids: dict[str, Pyramid] = {}
        if high is not None:
            with computing(backbone, levels):
                features = backbone(high)
            pyramids["hr"] = {name: features[name] for name in levels}
        if low is not None:
            needed = shift_levels(levels, -shift)
            with low_resolution_statistics(backbone), computing(backbone, needed):
                features = shift_levels(backbone(low), shift)
            pyramids["lr"] = {name: features[name] for name in levels}
        if "fused" in branches:
            hr, lr, padded = pyramids["hr"], pyramids["lr"], tuple(high.shape[-2:])
            masks = valid_masks(sizes, padded, hr) if self.mask_padding else None
            pyramids["fused"] = self.fusion(hr, lr, masks)
        return {branch: pyramids[branch] for branch in branches}

    def low_resolution_batch(self, batched_inputs: list[dict], high: torch.Tensor) -> torch.Tensor:
        """Return the inputs' ``image_lr``, normalised and padded to 1/k of ``high``: (N, 3, H, W).

        Raises:
            InputError: if it is missing, or if an image isn't exactly k times its ``image_lr``.
        """
        check_images(batched_inputs, self.frame, self.scale)
        height, width = (side // self.scale for side in high.shape[-2:])
        return normalized_batch(self, [x["image_lr"] for x in batched_inputs], height, width)

    def forward(self, batched_inputs: list[dict]):
        """Return the losses of all branches in training, else the predictions of one."""
        branches = BRANCHES if self.training else (self.test_branch,)
        images = self.preprocess_image(batched_inputs)
        high = images.tensor
        low = None if branches == ("hr",) else self.low_resolution_batch(batched_inputs, high)
        high = None if branches == ("lr",) else high
        pyramids = self.pyramids(high, low, images.image_sizes, branches)
        # The stock detector works on what is there: the images and, in turn, each pyramid.
        with replaced(self, preprocess_image=lambda *_: images):
            if self.training:
                return self._losses(batched_inputs, pyramids)
            with answering(self.backbone, pyramids[self.test_branch]):
                return super().forward(batched_inputs)

    def _losses(self, batched_inputs: list[dict], pyramids: dict[str, Pyramid]) -> dict:
        losses, normalizer = {}, get_normalizer(self)
        for branch, pyramid in pyramids.items():
            weight = self.fused_weight if branch == "fused" else 1.0
            # All branches see the same boxes, so the same number of positives. Starting each from
            # the same moving average gives it a stock detector's loss and moves it once a step.
            set_normalizer(self, normalizer)
            with answering(self.backbone, pyramid):
                for name, loss in super().forward(batched_inputs).items():
                    losses[f"{name}_{branch}"] = weight * loss
        return losses


@META_ARCH_REGISTRY.register()
class MultiResolutionRCNN(MultiResolutionMixin, GeneralizedRCNN):
    """Mask R-CNN or Faster R-CNN as a multi-resolution teacher."""


@META_ARCH_REGISTRY.register()
class MultiResolutionRetinaNet(MultiResolutionMixin, RetinaNet):
    """RetinaNet as a multi-resolution teacher."""


@META_ARCH_REGISTRY.register()
class MultiResolutionFCOS(MultiResolutionMixin, FCOS):
    """FCOS, the paper's detector, as a multi-resolution teacher."""
