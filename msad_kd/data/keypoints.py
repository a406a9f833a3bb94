"""The keypoints of data sets: their names, which of them a flip exchanges, and the skeleton."""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from msad_kd.data.classes import file_categories
from msad_kd.data.coco_format import KEYPOINT_NAMES
from msad_kd.utils.errors import InputError
from msad_kd.utils.replaced import replaced
from msad_kd.utils.schema import check_value

_COCO_KEYPOINTS = 17  # for which pycocotools has its own OKS sigmas
_BONE_COLOUR = (102, 204, 255)  # RGB, of lines in pictures
_ENTRY = "its entry of DATASETS.COCO_FORMAT"


def read_keypoints(cfg: CfgNode, flips: bool = False) -> dict[str, Sequence]:
    """Return what Detectron2's metadata call the keypoints that a model predicts; {} if none.

    They come from the metadata of DATASETS.TRAIN (an entry of DATASETS.COCO_FORMAT, or the user's
    code) or, what these lack, from the categories in the annotation file.

    Args:
        cfg: the config.
        flips: whether images may be flipped, for which a flip map has to be known.

    Returns:
        "keypoint_names", "keypoint_flip_map" (pairs of names that a horizontal flip exchanges) and
        "keypoint_connection_rules" (the skeleton, perhaps empty).

    Raises:
        InputError: if names or pairs are missing or differ, or if NUM_KEYPOINTS or the sigmas of
            the evaluation do not fit them.
    """
    if not cfg.MODEL.KEYPOINT_ON:
        return {}
    if not cfg.DATASETS.TRAIN:
        raise InputError(
            "MODEL.KEYPOINT_ON is True, but DATASETS.TRAIN, whose data name the keypoints, is "
            "empty; name the data set that the model is trained on"
        )
    first, *others = cfg.DATASETS.TRAIN
    known = _keypoints_of(first, flips)
    for data_set in others:
        other = _keypoints_of(data_set, flips)
        for key in ("keypoint_names", "keypoint_flip_map"):
            if other[key] != known[key]:
                raise InputError(
                    f"the data sets '{first}' and '{data_set}' of DATASETS.TRAIN have different "
                    f"{key}; let them agree"
                )
    names, count = known["keypoint_names"], cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
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
    return known


@contextmanager
def naming_keypoints(cfg: CfgNode, is_train: bool) -> Iterator[None]:
    """Give the metadata of DATASETS.TRAIN what ``read_keypoints`` returns, for Detectron2."""
    known = read_keypoints(cfg, flips=is_train and cfg.INPUT.RANDOM_FLIP == "horizontal")
    with ExitStack() as stack:
        for data_set in cfg.DATASETS.TRAIN if known else ():
            stack.enter_context(replaced(MetadataCatalog.get(data_set), **known))
        yield


def _keypoints_of(data_set: str, flips: bool) -> dict[str, Sequence]:
    metadata, source = MetadataCatalog.get(data_set), f"data set '{data_set}'"
    categories = [x for x in file_categories(data_set) if x.get("keypoints")]
    category = categories[0] if categories else {"keypoints": ()}
    if any(x["keypoints"] != category["keypoints"] for x in categories):
        raise InputError(f"{source}: its categories have different keypoints; a model has one list")
    names = metadata.get("keypoint_names") or category["keypoints"]
    if not names:
        raise InputError(
            f"MODEL.KEYPOINT_ON is True, but {source} has no keypoint_names; give them in {_ENTRY},"
            " in the categories of its file, or, for data that your code registers, by "
            f"MetadataCatalog.get('{data_set}').set(keypoint_names=['left eye', ...])"
        )
    check_value(names, KEYPOINT_NAMES, f"{source}: keypoint_names")
    pairs, rules = metadata.get("keypoint_flip_map"), metadata.get("keypoint_connection_rules")
    if pairs is None:
        pairs = _guess_pairs(names, source, flips)
    bones = metadata.get("skeleton")
    if bones is None:  # the file's, if it has these names
        bones = _bones(category, source) if [*names] == category["keypoints"] else []
    for key, rows in (("keypoint_flip_map", pairs), ("skeleton", bones)):
        if unknown := sorted({name for row in rows for name in row} - set(names)):
            raise InputError(f"{source} has '{unknown[0]}' in its {key}, not in its keypoint_names")
    return {
        "keypoint_names": tuple(names),
        "keypoint_flip_map": tuple(map(tuple, pairs)),
        "keypoint_connection_rules": rules or [(*bone, _BONE_COLOUR) for bone in bones],
    }


def _guess_pairs(names: list[str], source: str, flips: bool) -> list[tuple[str, str]]:
    """Pair names with left in them with those with right in its place."""
    mirrored = {x: x.replace("left", "right").replace("Left", "Right") for x in names}
    pairs = [(x, other) for x, other in mirrored.items() if x != other and other in names]
    paired = {name for pair in pairs for name in pair}
    # A bright spot or an upright mark has no side.
    sides = {x: re.sub(r"(?<![a-z])(cleft|bright|upright)", "", x.lower()) for x in names}
    single = [x for x in names if re.search("left|right", sides[x]) and x not in paired]
    if flips and (single or not pairs):
        raise InputError(
            f"{source}: which of the keypoints ({', '.join(single or names)}) a horizontal flip "
            "exchanges cannot be told by left and right in their names; give keypoint_flip_map in "
            f"{_ENTRY} ([] if none), or set INPUT.RANDOM_FLIP none"
        )
    return pairs


def _bones(category: dict, source: str) -> list[tuple[str, str]]:
    """Return the skeleton of a category, pairs of numbers from 1, as pairs of names."""
    names = dict(enumerate(category["keypoints"], start=1))
    try:
        return [(names[a], names[b]) for a, b in category.get("skeleton") or ()]
    except (TypeError, ValueError, KeyError):
        words = f"the skeleton of its categories should be pairs of numbers from 1 to {len(names)}"
        raise InputError(f"{source}: {words}") from None
