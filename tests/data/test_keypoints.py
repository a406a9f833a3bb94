"""Keypoints: those of annotations, and what a model has to know of them before its training."""

import pytest
from annotation_files import valid_content
from detectron2.data import Metadata, MetadataCatalog

from msad_kd.data.annotations import read_annotations
from msad_kd.data.mapper import build_mapper
from msad_kd.utils.errors import InputError

NAMES, PAIRS = ["nose", "left eye", "right eye"], [("left eye", "right eye")]
KNOWN = {"keypoint_names": NAMES, "keypoint_flip_map": PAIRS}
ONE, TWO = ("one_train",), ("one_train", "two_train")
COUNT = ["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 3]
SIGMAS = ["TEST.KEYPOINT_OKS_SIGMAS", [0.05] * 3]


@pytest.mark.parametrize(
    ("train", "metadata", "options", "words"),
    [
        ((), [], [], "DATASETS.TRAIN, .* is empty; name the data set"),
        (ONE, [{}], [], r"'one_train' has no keypoint_names; run .*\('one_train'\).set\("),
        (ONE, [{"keypoint_names": NAMES}], [], "'one_train' has no keypoint_flip_map"),
        (TWO, [KNOWN, {}], [], "'two_train' has no keypoint_names"),
        (TWO, [KNOWN, {**KNOWN, "keypoint_names": NAMES[::-1]}], [], "'two_train' .* different"),
        (ONE, [{**KNOWN, "keypoint_names": NAMES[:2]}], [], "'right eye' in its keypoint_flip_map"),
        (ONE, [KNOWN], [], "NUM_KEYPOINTS is 17, but data set 'one_train' has 3 .*set it to 3"),
        (ONE, [KNOWN], COUNT, "TEST.KEYPOINT_OKS_SIGMAS has 0 .* 3 keypoints; give 3"),
        (ONE, [KNOWN], [*COUNT, *SIGMAS], None),
        (ONE, [KNOWN], [*COUNT, "DATASETS.TEST", ()], None),
        (TWO, [KNOWN, KNOWN], [*COUNT, *SIGMAS], None),
    ],
)
@pytest.mark.parametrize("is_train", [True, False])
def test_keypoints_have_names(config, monkeypatch, train, metadata, options, words, is_train):
    for name, values in zip(train, metadata):
        monkeypatch.setitem(MetadataCatalog.data, name, Metadata(name=name, **values))
    cfg = config("lr", "MODEL.KEYPOINT_ON", True, *options)
    cfg.DATASETS.TRAIN = train
    if words is None:
        indices = build_mapper(cfg, is_train).keypoint_hflip_indices
        assert list(indices) == [0, 2, 1]
    else:
        with pytest.raises(InputError, match=words):
            build_mapper(cfg, is_train)


UNUSABLE = [[1, 2, 2], [1, 2, 2, 3, 4], "text", [1, 2, 2, float("nan"), 4, 2], [1, 2, 2, 3, 4, 5]]


@pytest.mark.parametrize("value", UNUSABLE)
def test_keypoints_of_an_annotation_that_cannot_be_used(value, files):
    content = valid_content(keypoints=True)
    content["annotations"][1]["keypoints"] = value
    with pytest.raises(InputError, match=r"annotation 12 \(image 7\): keypoints should be"):
        read_annotations(files(content)[0], "mine")


def test_keypoints_that_are_missing(files):
    content = valid_content(keypoints=True)
    del content["annotations"][0]["keypoints"], content["annotations"][2]["num_keypoints"]
    content["annotations"][1]["num_keypoints"] = "two"
    content["annotations"][3]["num_keypoints"] = [1, 2]
    read = read_annotations(files(content)[0], "mine")["annotations"]
    assert read[0]["keypoints"] == [0] * 6 and [x["num_keypoints"] for x in read] == [0, 2, 1, 2]
