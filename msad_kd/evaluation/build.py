"""Evaluators, chosen by what a data set's metadata say; what of TEST a model cannot do."""

from __future__ import annotations

import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.modeling import GeneralizedRCNN

from msad_kd.evaluation.cityscapes import CityscapesEvaluator, CityscapesMetricsEvaluator
from msad_kd.evaluation.coco import MetricsEvaluator
from msad_kd.modeling.classes import has_masks, is_a
from msad_kd.modeling.multi_resolution import MultiResolutionMixin
from msad_kd.utils.errors import InputError

__all__ = ["build_evaluator", "check_augmentation", "check_precise_bn"]


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: str | None = None
) -> DatasetEvaluator:
    """The evaluator of a data set, writing to a folder: OUTPUT_DIR/inference unless one is given.

    Results are in "bbox" (COCO's AP) and "segm": COCO's AP, or Cityscapes' own, beside which
    "segm_coco" stands with TEST.CITYSCAPES_COCO. A model without masks has "bbox" alone.

    Raises:
        InputError: if the data set is of a kind that is not evaluated here.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    options = {
        "output_dir": output_folder or os.path.join(cfg.OUTPUT_DIR, "inference"),
        "implementation": cfg.TEST.COCO_EVALUATOR,
        "masks": has_masks(cfg),
        # COCO's 100, unless the model may keep more: an image may have more objects than that.
        "max_dets_per_image": max(100, cfg.TEST.DETECTIONS_PER_IMAGE),
    }
    if kind == "coco":
        return MetricsEvaluator(dataset_name, **options)
    if kind != "cityscapes_instance":
        raise InputError(
            f"data set '{dataset_name}' asks for the evaluator '{kind}'; there are coco and "
            "cityscapes_instance"
        )
    evaluators = [CityscapesEvaluator(dataset_name)] if has_masks(cfg) else []
    if cfg.TEST.CITYSCAPES_COCO or not evaluators:  # cityscapesScripts has no AP of boxes
        evaluators.append(CityscapesMetricsEvaluator(dataset_name, **options))
    return DatasetEvaluators(evaluators)


def check_augmentation(cfg: CfgNode) -> None:
    """Check that TEST.AUG, when it is enabled, can be done with the config's model.

    Raises:
        InputError: if Detectron2 has no test-time augmentation for it. A multi-resolution teacher
            would be run at one resolution only.
    """
    possible = is_a(cfg, GeneralizedRCNN) and not is_a(cfg, MultiResolutionMixin)
    if cfg.TEST.AUG.ENABLED and (not possible or cfg.MODEL.KEYPOINT_ON or cfg.MODEL.LOAD_PROPOSALS):
        raise InputError(
            f"TEST.AUG.ENABLED is True, but a {cfg.MODEL.META_ARCHITECTURE} cannot be evaluated "
            "with test-time augmentation (Faster and Mask R-CNN of one resolution can, without "
            "keypoints and given proposals); set it to False"
        )


def check_precise_bn(cfg: CfgNode) -> None:
    """Check that TEST.PRECISE_BN, when it is enabled, can be done with the config's model.

    Raises:
        InputError: if the model normalises two resolutions in one pass, which fvcore refuses.
    """
    if cfg.TEST.PRECISE_BN.ENABLED and is_a(cfg, MultiResolutionMixin):
        raise InputError(
            f"TEST.PRECISE_BN.ENABLED is True, but the statistics of a "
            f"{cfg.MODEL.META_ARCHITECTURE} are of two resolutions; set it to False, and recompute "
            "them after the training with tools/analysis/precise_statistics.py"
        )
