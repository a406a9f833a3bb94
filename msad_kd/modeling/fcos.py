"""Detectron2's FCOS, built from a yacs config and trained on images without boxes, too."""

import math

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.box_regression import Box2BoxTransformLinear
from detectron2.modeling.meta_arch import fcos
from detectron2.structures import Boxes, Instances
from torch import nn


def group_norm(channels: int) -> nn.GroupNorm:
    """Return Detectron2's "GN", 32 groups, or fewer so that each has at least two channels.

    To learn its type, Detectron2 0.6 builds a head's normalisation for one channel, too, which 32
    groups cannot share.
    """
    groups = math.gcd(32, channels)
    return nn.GroupNorm(max(channels // 2, 1) if groups == channels else groups, channels)


class _Box2BoxTransform(Box2BoxTransformLinear):
    """FCOS's transform, which computes boxes in fp32, as those of other detectors do.

    A corner at 1,200 px would be up to half a pixel off in fp16, 4 px in bf16, and fvcore's GIoU
    fails on mixed types.
    """

    def apply_deltas(self, deltas: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        return super().apply_deltas(deltas.float(), boxes)


@META_ARCH_REGISTRY.register()
class FCOS(fcos.FCOS):
    """Detectron2's FCOS, by the keys under ``MODEL.FCOS``; its parameters have the same names.

    Built from a config, its box head starts with distances of one stride to each side of a box;
    Detectron2's with distances around 0.
    """

    @configurable
    def __init__(self, **kwargs):
        """Take the arguments of Detectron2's FCOS."""
        super().__init__(**{"box2box_transform": _Box2BoxTransform(), **kwargs})

    @classmethod
    def from_config(cls, cfg):
        """Return the constructor's arguments."""
        keys = cfg.MODEL.FCOS
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        head = fcos.FCOSHead(
            input_shape=[shapes[name] for name in keys.IN_FEATURES],
            num_classes=keys.NUM_CLASSES,
            conv_dims=[shapes[keys.IN_FEATURES[0]].channels] * keys.NUM_CONVS,
            norm=group_norm if keys.NORM == "GN" else keys.NORM,
            prior_prob=keys.PRIOR_PROB,
        )
        # Distances to the sides are cut at 0, and a negative one has no gradient. Detectron2 starts
        # them around 0, where all can become negative in the first steps and stay so.
        nn.init.constant_(head.bbox_pred.bias, 1.0)  # the stride of the level
        return {
            "backbone": backbone,
            "head": head,
            "head_in_features": keys.IN_FEATURES,
            "num_classes": keys.NUM_CLASSES,
            "center_sampling_radius": keys.CENTER_SAMPLING_RADIUS,
            "focal_loss_alpha": keys.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": keys.FOCAL_LOSS_GAMMA,
            "test_score_thresh": keys.SCORE_THRESH_TEST,
            "test_topk_candidates": keys.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": keys.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    @torch.no_grad()
    def label_anchors(self, anchors: list[Boxes], gt_instances: list[Instances]):
        """Match anchors with boxes, as Detectron2 does, also in images without boxes."""
        # Detectron2 0.6 crashes on an image without boxes. A background box without area matches no
        # location, so it stands for none.
        box = {
            "gt_boxes": Boxes(anchors[0].tensor.new_zeros(1, 4)),
            "gt_classes": torch.full((1,), self.num_classes, device=anchors[0].device),
        }
        truth = [x if len(x) else Instances(x.image_size, **box) for x in gt_instances]
        return super().label_anchors(anchors, truth)

    def losses(self, anchors, pred_logits, gt_labels, *others):
        """Compute Detectron2's losses, from which locations with the label -1 are left out."""
        ignored = torch.stack(gt_labels) < 0  # (N, locations)
        if ignored.any():
            # As background that is predicted with certainty, they have neither loss nor gradient.
            flags = ignored.split([len(level) for level in anchors], dim=1)
            pred_logits = [
                logits.masked_fill(level[..., None], -1e4)  # which fp16 can hold
                for logits, level in zip(pred_logits, flags)
            ]
            gt_labels = [labels.masked_fill(labels < 0, self.num_classes) for labels in gt_labels]
        return super().losses(anchors, pred_logits, gt_labels, *others)
