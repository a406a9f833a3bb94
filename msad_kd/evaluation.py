"""Evaluators, chosen by what a data set's metadata say."""

from __future__ import annotations

import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    COCOEvaluator,
    DatasetEvaluator,
)

from msad_kd.errors import InputError

__all__ = ["build_evaluator"]


def build_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """The evaluator of a data set, writing to OUTPUT_DIR/inference.

    Raises:
        InputError: if the data set is of a kind that is not evaluated here.
    """
    folder = os.path.join(cfg.OUTPUT_DIR, "inference")
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    if kind == "coco":
        # pycocotools: the C++ evaluator is not in every Detectron2 build.
        return COCOEvaluator(dataset_name, output_dir=folder, use_fast_impl=False)
    if kind == "cityscapes_instance":
        return CityscapesInstanceEvaluator(dataset_name)
    raise InputError(
        f"data set '{dataset_name}' asks for the evaluator '{kind}'; there are coco and "
        "cityscapes_instance"
    )
