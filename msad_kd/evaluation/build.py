"""The evaluator for a data set, and checks of what TEST asks of a model."""

import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.modeling import GeneralizedRCNN

from msad_kd.data.classes import align_classes, model_classes
from msad_kd.evaluation.cityscapes import CityscapesCOCOEvaluator, CityscapesEvaluator
from msad_kd.evaluation.coco import AnyCOCOEvaluator
from msad_kd.modeling.classes import has_masks, is_a
from msad_kd.modeling.multi_resolution import MultiResolutionMixin
from msad_kd.utils.errors import InputError


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: str | None = None
) -> DatasetEvaluator:
    """Build the evaluator that a data set's metadata ask for.

    Its results are "bbox" (COCO's AP) and, if the model has them, "segm" (masks: COCO's AP or
    Cityscapes' own) and "keypoints" (COCO's AP). With TEST.CITYSCAPES_COCO, Cityscapes has
    "segm_coco" as well. It writes to ``output_folder``, by default OUTPUT_DIR/inference.

    Raises:
        InputError: if this kind of data set is not supported, or if its classes do not fit.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    if kind not in ("coco", "cityscapes_instance"):
        raise InputError(
            f"data set '{dataset_name}' needs the evaluator '{kind}'; only coco and "
            "cityscapes_instance are supported"
        )
    align_classes(cfg, (dataset_name,))
    options = {
        "output_dir": output_folder or os.path.join(cfg.OUTPUT_DIR, "inference"),
        "implementation": cfg.TEST.COCO_EVALUATOR,
        "masks": has_masks(cfg),
        "keypoints": cfg.MODEL.KEYPOINT_ON,
        "invalid": cfg.DATASETS.INVALID_ANNOTATIONS,
        "classes": model_classes(cfg)[0],
        "kpt_oks_sigmas": cfg.TEST.KEYPOINT_OKS_SIGMAS,
        # COCO's 100, unless the model may keep more: an image may have more objects than that.
        "max_dets_per_image": max(100, cfg.TEST.DETECTIONS_PER_IMAGE),
    }
    if kind == "coco":
        return AnyCOCOEvaluator(dataset_name, **options)
    folder = options["output_dir"]
    evaluators = [CityscapesEvaluator(dataset_name, folder)] if has_masks(cfg) else []
    if cfg.TEST.CITYSCAPES_COCO or not evaluators:  # cityscapesScripts computes no box AP
        evaluators.append(CityscapesCOCOEvaluator(dataset_name, **options))
    return DatasetEvaluators(evaluators)


def metric_names(evaluator: DatasetEvaluator) -> list[str] | None:
    """Return the names of all that an evaluator computes; None if it is not of this project."""
    parts = evaluator._evaluators if isinstance(evaluator, DatasetEvaluators) else [evaluator]
    if not all(type(part).__module__.startswith("msad_kd.") for part in parts):
        return None
    return [name for part in parts for name in part.metric_names()]


def check_augmentation(cfg: CfgNode) -> None:
    """Raise an InputError if TEST.AUG is enabled and Detectron2 does not have it for the model.

    A multi-resolution teacher is such a model: it would run at one resolution only.
    """
    supported = is_a(cfg, GeneralizedRCNN) and not is_a(cfg, MultiResolutionMixin)
    supported &= not (cfg.MODEL.KEYPOINT_ON or cfg.MODEL.LOAD_PROPOSALS)
    if cfg.TEST.AUG.ENABLED and not supported:
        raise InputError(
            f"TEST.AUG.ENABLED is True, but a {cfg.MODEL.META_ARCHITECTURE} cannot be run "
            "with test-time augmentation, only Faster and Mask R-CNN of one resolution without "
            "keypoints and precomputed proposals; set it to False"
        )


def check_precise_bn(cfg: CfgNode) -> None:
    """Raise an InputError if TEST.PRECISE_BN is enabled for a teacher, which fvcore refuses."""
    if cfg.TEST.PRECISE_BN.ENABLED and is_a(cfg, MultiResolutionMixin):
        raise InputError(
            f"TEST.PRECISE_BN.ENABLED is True, but a {cfg.MODEL.META_ARCHITECTURE} has statistics "
            "of two resolutions; set it to False and use tools/analysis/precise_statistics.py later"
        )
