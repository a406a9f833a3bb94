"""Evaluators, chosen by what a data set's metadata say."""

from __future__ import annotations

import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators

from msad_kd.cityscapes import CityscapesEvaluator, CityscapesMetricsEvaluator
from msad_kd.classes import has_masks
from msad_kd.coco_evaluation import MetricsEvaluator
from msad_kd.errors import InputError

__all__ = ["build_evaluator"]


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
