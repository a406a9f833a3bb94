"""The teacher: a frozen detector that gives feature pyramids and detections.

N: images, C: channels, H, W: the student's padded height and width,
k: high-resolution side / low-resolution side.
"""

from contextlib import nullcontext

import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import ImageList, Instances
from torch import nn

from msad_kd.modeling.capture import answering, computing, scoring_above
from msad_kd.modeling.inference import for_inference
from msad_kd.modeling.multi_resolution import BRANCHES, MultiResolutionMixin
from msad_kd.modeling.pyramid import (
    Pyramid,
    aligned_levels,
    check_images,
    in_high_resolution,
    normalized_batch,
)
from msad_kd.utils.errors import InputError
from msad_kd.utils.replaced import replaced

DTYPES = {"": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_branch(meta_architecture: type, branch: str) -> None:
    """Raise an InputError if a detector has no such pyramid to give."""
    plain = not issubclass(meta_architecture, MultiResolutionMixin)
    branches = ("hr", "lr") if plain else BRANCHES
    if branch not in branches:
        raise InputError(
            f"KD.TEACHER.BRANCH is '{branch}', but a {meta_architecture.__name__} teacher has "
            f"{', '.join(branches)}"
        )


class Teacher:
    """A frozen detector that gives feature pyramids.

    It is no ``nn.Module``, so none of its weights are in a student's ``state_dict``, optimizer or
    DDP buckets, and ``student.train()`` does not reach it.

    Args:
        model: a detector. It is frozen and put into eval mode.
        branch: the pyramid to give: "fused", "hr" or "lr". A single-resolution detector has "hr",
            read from ``image_hr``, and "lr", read from ``image``.
        scale: k.
        amp: "bf16" or "fp16" to compute pyramids in it; "" does not.

    Raises:
        InputError: if the model has no such branch.
    """

    def __init__(self, model: nn.Module, *, branch: str, scale: int, amp: str = ""):
        check_branch(type(model), branch)
        self.multi_resolution = isinstance(model, MultiResolutionMixin)
        if self.multi_resolution:
            model.test_branch = branch  # evaluate the branch that the student learns from
        self.model = model.eval().requires_grad_(False)
        self.branch = branch
        self.scale = scale
        self.amp = amp
        self._prepared: nn.Module | None = None
        self.needed: set[str] | None = None  # the levels that the student reads; None: all

    @property
    def image_scale(self) -> int:
        """The side of an image in the frame of its heads over the student's image: 1 or k."""
        return self.scale if self.multi_resolution or self.branch == "hr" else 1

    def levels(self) -> dict[str, ShapeSpec]:
        """Return level name to channels and stride, in pixels of the high-resolution image."""
        shapes = self.model.backbone.output_shape()
        if self.multi_resolution:
            return aligned_levels(shapes, self.scale)
        return in_high_resolution(shapes, 1 if self.branch == "hr" else self.scale)

    def prepared(self) -> nn.Module:
        """Return the backbone that computes pyramids: see ``for_inference``.

        It is a copy that is made at the first call, when the weights have to be in place. The model
        itself stays as it was loaded.
        """
        if self._prepared is None:
            self._prepared = for_inference(self.model.backbone)
        return self._prepared

    @torch.no_grad()
    def pyramid(self, batched_inputs: list[dict], padded: tuple[int, int]) -> Pyramid:
        """Compute the pyramid of a student's batch, level name to (N, C, cells, cells).

        With ``amp`` it is in fp32, else in the type in which the student runs. Levels of a
        single-resolution teacher that no loss reads may be None.

        Args:
            batched_inputs: dicts with ``image`` (3, h, w) and ``image_hr`` (3, kh, kw), as
                ``TwoResolutionMapper(frame="lr")`` makes them.
            padded: (H, W) of the student's batch; high-resolution images are padded to k times it.

        Raises:
            InputError: if ``image_hr`` is missing or is not exactly k times its ``image``.
        """
        sizes = [tuple(self.scale * side for side in x["image"].shape[-2:]) for x in batched_inputs]
        high = low = None
        if self.branch != "lr":
            check_images(batched_inputs, "lr", self.scale)
            sides = [side * self.scale for side in padded]
            high = normalized_batch(self.model, [x["image_hr"] for x in batched_inputs], *sides)
        if self.branch != "hr":
            low = normalized_batch(self.model, [x["image"] for x in batched_inputs], *padded)
        backbone, dtype = self.prepared(), DTYPES[self.amp]
        with torch.autocast(self.model.device.type, dtype) if dtype else nullcontext():
            pyramid = self._pyramid(backbone, high, low, sizes)
        return {n: x.float() if dtype and x is not None else x for n, x in pyramid.items()}

    def _pyramid(self, backbone: nn.Module, high, low, sizes) -> Pyramid:
        if self.multi_resolution:
            with replaced(self.model, backbone=backbone):
                return self.model.pyramids(high, low, sizes, (self.branch,))[self.branch]
        with computing(backbone, backbone.output_shape() if self.needed is None else self.needed):
            return backbone(low if high is None else high)

    @torch.no_grad()
    def detect(self, inputs: list[dict], pyramid: Pyramid, above: float = 0.0) -> list[Instances]:
        """Return the detections in a student's batch, in the frame of its ``image``.

        Args:
            inputs: as for ``pyramid``.
            pyramid: what ``pyramid`` returned for them; the backbone is not run again.
            above: what a score has to exceed, if the model's own threshold is lower.
        """
        model, sizes = self.model, [tuple(x["image"].shape[-2:]) for x in inputs]
        mine = [tuple(self.image_scale * side for side in size) for size in sizes]
        images = ImageList(next(x for x in pyramid.values() if x is not None), mine)
        frames = [{"height": height, "width": width} for height, width in sizes]
        # A multi-resolution detector would compute the pyramid itself; the stock one does the rest.
        stock = super(MultiResolutionMixin, model) if self.multi_resolution else model
        # In the precision of the weights: half precision moves keypoints by up to a pixel.
        dtype = next(model.parameters()).dtype
        pyramid = {name: x if x is None else x.to(dtype) for name, x in pyramid.items()}
        with (
            torch.autocast(model.device.type, enabled=False),
            replaced(model, preprocess_image=lambda *_: images),
            answering(model.backbone, pyramid),
            scoring_above(model, above),
        ):
            return [x["instances"] for x in stock.forward(frames)]
