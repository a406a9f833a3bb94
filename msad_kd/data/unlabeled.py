"""The images of DATASETS.UNLABELED, and the labels that a model has given them.

An annotation whose class is ``IGNORED`` is neither an object nor background: its score is between
KD.UNLABELED.IGNORE_SCORE and KD.UNLABELED.SCORE.
"""

import logging

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from msad_kd.data.classes import align_classes
from msad_kd.data.coco_format import dicts_of, is_folder
from msad_kd.modeling.classes import class_key, frame_of, number_of_classes
from msad_kd.utils.errors import InputError

_logger = logging.getLogger(__name__)

IGNORED = -1
_LABELS = ("annotations", "sem_seg_file_name", "pan_seg_file_name", "segments_info")


def check_unlabeled(cfg: CfgNode) -> None:
    """Check the keys of images without labels, and where data sets without labels are named.

    Raises:
        InputError: if keys do not fit together, or if a folder is to be trained on or evaluated as
            if it had labels.
    """
    names, count, keys = cfg.DATASETS.UNLABELED, cfg.SOLVER.UNLABELED_PER_BATCH, cfg.KD.UNLABELED
    if bool(names) != bool(count):
        raise InputError(
            f"DATASETS.UNLABELED is {list(names or ())} and SOLVER.UNLABELED_PER_BATCH is {count}; "
            "set both, or neither"
        )
    if names and cfg.MODEL.LOAD_PROPOSALS:
        raise InputError(
            "MODEL.LOAD_PROPOSALS is True, and images of DATASETS.UNLABELED have no proposals; "
            "train an RPN, or set DATASETS.UNLABELED []"
        )
    for key in ("TRAIN", "TEST"):
        for name in filter(is_folder, cfg.DATASETS[key] or ()):
            raise InputError(
                f"DATASETS.{key}: '{name}' is a folder of images without labels; give its entry in "
                "DATASETS.COCO_FORMAT a json, or name it in DATASETS.UNLABELED"
            )
    classes = number_of_classes(cfg)
    if len(keys.SCORE) not in (1, classes) and classes is not None:
        raise InputError(
            f"KD.UNLABELED.SCORE has {len(keys.SCORE)} numbers; give one, or one for each of the "
            f"{classes} classes ({class_key(cfg)})"
        )
    if keys.IGNORE_SCORE > min(keys.SCORE):
        raise InputError(
            f"KD.UNLABELED.IGNORE_SCORE is {keys.IGNORE_SCORE}, above {min(keys.SCORE)} of "
            "KD.UNLABELED.SCORE; lower it, or set it to that to ignore nothing"
        )


def takes_unlabeled(cfg: CfgNode) -> bool:
    """Return whether a config's batches have unlabelled images: only those of students have.

    Warns if the config names some and its model is no student, or learns nothing from them.
    """
    if not cfg.DATASETS.UNLABELED:
        return False
    kind = cfg.MODEL.META_ARCHITECTURE
    student = frame_of(cfg) == "lr"
    if not student:
        _logger.warning(
            f"DATASETS.UNLABELED is not used: a {kind} is trained without images that have no "
            "labels (students are DistilledRCNN and the like)"
        )
    elif cfg.KD.UNLABELED.WEIGHT and not (cfg.KD.LOSSES or cfg.KD.UNLABELED.PSEUDO_LABELS):
        _logger.warning(
            "DATASETS.UNLABELED is not used: nothing is learned from it, as KD.LOSSES is empty and "
            "KD.UNLABELED.PSEUDO_LABELS is False"
        )
        return False
    return student


def unlabeled_dicts(cfg: CfgNode) -> list[dict]:
    """Return Detectron2's dicts of DATASETS.UNLABELED.

    With KD.UNLABELED.PSEUDO_LABELS, those of a file whose annotations have scores have
    ``annotations``: ignored ones have the class ``IGNORED``. No others have any, so files of ground
    truth may be of any classes.

    Raises:
        InputError: if a data set or a score cannot be used, or if a label lacks keypoints.
    """
    dicts = []
    for name in cfg.DATASETS.UNLABELED:
        found = dicts_of(name, cfg.DATASETS.INVALID_ANNOTATIONS)
        if not cfg.KD.UNLABELED.PSEUDO_LABELS:
            found = [{k: v for k, v in entry.items() if k != "annotations"} for entry in found]
        if any("score" in label for entry in found for label in entry.get("annotations", ())):
            align_classes(cfg, [name])
            found = DatasetCatalog.get(name)
        labels = [label for entry in found for label in entry.get("annotations", ())]
        scored = [label for label in labels if "score" in label]
        if bare := len(labels) - len(scored):
            _logger.info(
                f"Data set '{name}' of DATASETS.UNLABELED: {bare} annotations are not used, since "
                "they have no score, as the labels of a model have"
            )
        for label in scored:
            score, words = label["score"], ""
            if type(score) not in (int, float) or not 0 <= score <= 1:
                words = f"a score is {score!r}; it should be a number from 0 to 1"
            elif cfg.MODEL.KEYPOINT_ON and "keypoints" not in label:
                words = "a label has no keypoints; make them by a model with MODEL.KEYPOINT_ON True"
            if words:
                raise InputError(f"data set '{name}' of DATASETS.UNLABELED: {words}")
        for entry in found:
            labels = entry.get("annotations", ())
            # A copy, since a catalog may return the same dicts to whoever needs their labels.
            entry = {key: value for key, value in entry.items() if key not in _LABELS}
            if scored:
                kept = (_by_score(label, cfg.KD.UNLABELED) for label in labels if "score" in label)
                entry["annotations"] = [label for label in kept if label is not None]
            dicts.append(entry)
    return dicts


def _by_score(label: dict, keys: CfgNode) -> dict | None:
    """Return a label, with the class ``IGNORED`` if it is doubtful; None if it is background."""
    if label["score"] < keys.IGNORE_SCORE:
        return None
    high = keys.SCORE[label["category_id"] if len(keys.SCORE) > 1 else 0]
    return label if label["score"] >= high else {**label, "category_id": IGNORED}
