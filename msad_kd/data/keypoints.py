"""Check what a model with keypoints has to know of its data."""

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from msad_kd.utils.errors import InputError

_COCO_KEYPOINTS = 17  # for which pycocotools has its own OKS sigmas


def check_keypoints(cfg: CfgNode) -> None:
    """Check that the keypoints of DATASETS.TRAIN have names, if the model predicts keypoints.

    A file in COCO format does not say which keypoints a horizontal flip exchanges, so the metadata
    of Detectron2 have to.

    Raises:
        InputError: if names or pairs are missing or differ, or if NUM_KEYPOINTS or the sigmas of
            the evaluation do not fit them.
    """
    if not cfg.MODEL.KEYPOINT_ON:
        return
    if not cfg.DATASETS.TRAIN:
        raise InputError(
            "MODEL.KEYPOINT_ON is True, but DATASETS.TRAIN, whose metadata name the keypoints, is "
            "empty; name the data set that the model is trained on"
        )
    first, *others = cfg.DATASETS.TRAIN
    for data_set in (first, *others):
        for key in ("keypoint_names", "keypoint_flip_map"):
            value = MetadataCatalog.get(data_set).get(key)
            if value is None:
                raise InputError(
                    f"MODEL.KEYPOINT_ON is True, but data set '{data_set}' has no {key}; run "
                    f"MetadataCatalog.get('{data_set}').set(keypoint_names=['left eye', ...], "
                    "keypoint_flip_map=[('left eye', 'right eye'), ...]) in a module given to "
                    "--import"
                )
            if value != MetadataCatalog.get(first).get(key):
                raise InputError(
                    f"the data sets '{first}' and '{data_set}' of DATASETS.TRAIN have different "
                    f"{key}; let them agree"
                )
    names = MetadataCatalog.get(first).keypoint_names
    pairs = MetadataCatalog.get(first).keypoint_flip_map
    if unknown := sorted({name for pair in pairs for name in pair} - set(names)):
        raise InputError(
            f"data set '{first}' has '{unknown[0]}' in its keypoint_flip_map, but not in its "
            "keypoint_names"
        )
    count = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    if count != len(names):
        raise InputError(
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {count}, but data set '{first}' has "
            f"{len(names)} keypoint_names; set it to {len(names)}"
        )
    sigmas = len(cfg.TEST.KEYPOINT_OKS_SIGMAS) or _COCO_KEYPOINTS
    if cfg.DATASETS.TEST and sigmas != count:
        raise InputError(
            f"TEST.KEYPOINT_OKS_SIGMAS has {len(cfg.TEST.KEYPOINT_OKS_SIGMAS)} numbers (if none, "
            f"COCO's {_COCO_KEYPOINTS} are taken), but the model has {count} keypoints; give "
            f"{count}, for instance {count} times 0.05"
        )
