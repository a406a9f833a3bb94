"""Keypoints: those of annotations, and what a model has to know of them before its training."""

import pytest
from annotation_files import valid_content
from detectron2.data import Metadata, MetadataCatalog

from msad_kd.config.build import build_config
from msad_kd.data.annotations import read_annotations
from msad_kd.data.coco_format import load_checked
from msad_kd.data.dict_checks import check_keypoint_counts
from msad_kd.data.keypoints import read_keypoints
from msad_kd.data.mapper import build_mapper
from msad_kd.utils.errors import InputError

NAMES, PAIRS = ["nose", "left eye", "right eye"], [("left eye", "right eye")]
KNOWN = {"keypoint_names": NAMES, "keypoint_flip_map": PAIRS}
OTHERS = ["nose", "tail", "ear"]  # of which nothing is known
ONE, TWO = ("one_train",), ("one_train", "two_train")
COUNT = ["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 3]
SIGMAS = ["TEST.KEYPOINT_OKS_SIGMAS", [0.05] * 3]


@pytest.mark.parametrize(
    ("train", "metadata", "options", "words"),
    [
        ((), [], [], "DATASETS.TRAIN, .* is empty; name the data set"),
        (ONE, [{}], [], r"'one_train' has no keypoint_names; give them .*\('one_train'\).set\("),
        (TWO, [KNOWN, {}], [], "'two_train' has no keypoint_names"),
        (TWO, [KNOWN, {**KNOWN, "keypoint_names": NAMES[::-1]}], [], "'two_train' .* different"),
        (ONE, [{**KNOWN, "keypoint_names": NAMES[:2]}], [], "'right eye' in its keypoint_flip_map"),
        (ONE, [{"keypoint_names": ["nose", "nose"]}], [], "keypoint_names is .* different names"),
        (ONE, [KNOWN], [], "NUM_KEYPOINTS is 17, but data set 'one_train' has 3 .*set it to 3"),
        (ONE, [KNOWN], COUNT, "TEST.KEYPOINT_OKS_SIGMAS has 0 .* 3 keypoints; give 3"),
        (ONE, [KNOWN], [*COUNT, *SIGMAS], None),
        (ONE, [{"keypoint_names": NAMES}], [*COUNT, *SIGMAS], None),  # left and right are told
        (ONE, [KNOWN], [*COUNT, "DATASETS.TEST", ()], None),
        (TWO, [KNOWN, {"keypoint_names": NAMES}], [*COUNT, *SIGMAS], None),
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


@pytest.fixture
def keypoints_of(config, files):
    """keypoints_of(categories, entry, KEY, VALUE, ...): what a mapper knows, and its indices."""

    def read(categories, entry, *options):
        content = {**valid_content(), "categories": categories}
        file, images = files(content)
        entry = {"name": "mine", "json": file, "images": images, **entry}
        names = ["DATASETS.TRAIN", ("mine",), "DATASETS.TEST", ()]
        cfg = config("lr", "DATASETS.COCO_FORMAT", [entry], *names, *COUNT, *options)
        cfg.MODEL.KEYPOINT_ON = True
        return read_keypoints(cfg), list(build_mapper(cfg, True).keypoint_hflip_indices)

    return read


def categories(names=NAMES, skeleton=((1, 2), (1, 3))):
    fields = {"keypoints": names, "skeleton": skeleton}
    return [{"id": 5, "name": "dog", **fields}, {"id": 3, "name": "cat", **fields}]


def test_they_are_read_from_entry_or_file(keypoints_of):
    known, indices = keypoints_of(categories(), {})
    assert known["keypoint_names"] == tuple(NAMES) and indices == [0, 2, 1]
    assert known["keypoint_flip_map"] == (("left eye", "right eye"),)
    bones = [rule[:2] for rule in known["keypoint_connection_rules"]]
    assert bones == [("nose", "left eye"), ("nose", "right eye")]
    assert "keypoint_names" not in vars(MetadataCatalog.get("mine"))  # the file may change
    entry = {"keypoint_names": OTHERS, "keypoint_flip_map": [["tail", "ear"]]}
    known, indices = keypoints_of(categories(), {**entry, "skeleton": [["nose", "ear"]]})
    assert known["keypoint_names"] == tuple(OTHERS) and indices == [0, 2, 1]
    assert [x[:2] for x in known["keypoint_connection_rules"]] == [("nose", "ear")]
    entry["keypoint_flip_map"] = []
    assert keypoints_of(categories(), entry)[1] == [0, 1, 2]
    assert keypoints_of(categories(), {})[1] == [0, 2, 1]  # nothing of the last entry is left
    sides = ["bright spot", "left eye", "right eye"]
    assert keypoints_of(categories(sides), {})[1] == [0, 2, 1]


@pytest.mark.parametrize(
    ("file", "entry", "words"),
    [
        (categories(OTHERS), {}, r"\(nose, tail, ear\) a horizontal flip .* keypoint_flip_map in"),
        (categories(), {"keypoint_names": ["left eye", "nose", "ear"]}, r"\(left eye\) a horizon"),
        ([categories()[0], categories(OTHERS)[1]], {}, "its categories have different keypoints"),
        (categories(skeleton=[[0, 1]]), {}, "skeleton .* pairs of numbers from 1 to 3"),
        (categories(skeleton=7), {}, "skeleton .* pairs of numbers from 1 to 3"),
        (categories(5), {}, "keypoint_names is 5; it should be a list of different names"),
        (categories(), {"skeleton": [["nose", "ear"]]}, "'ear' in its skeleton, not in its keypo"),
    ],
)
def test_what_cannot_be_known(keypoints_of, file, entry, words):
    with pytest.raises(InputError, match=f"data set 'mine'.*{words}"):
        keypoints_of(file, entry)


def test_without_flips_nothing_has_to_be_known_of_them(keypoints_of):
    flip = ["INPUT.RANDOM_FLIP", "none"]
    assert keypoints_of(categories(OTHERS), {}, *flip)[1] == [0, 1, 2]
    known, _ = keypoints_of(categories(5), {"keypoint_names": OTHERS}, *flip)
    assert known["keypoint_names"] == tuple(OTHERS)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("keypoint_names", ["nose", "nose"], "a list of different names"),
        ("keypoint_flip_map", [["left"]], "a list of pairs of keypoint_names"),
        ("skeleton", [[1, 2]], "a list of pairs of keypoint_names"),
    ],
)
def test_fields_of_an_entry(field, value, words):
    entry = {"name": "mine", "json": "a", "images": "b", field: value}
    with pytest.raises(InputError, match=f"{field} of data set 1 should be {words}"):
        build_config("", ["DATASETS.COCO_FORMAT", [entry]])


def test_another_number_of_keypoints_in_the_data(files):
    dicts = load_checked(*files(valid_content(keypoints=True)), "mine")
    check_keypoint_counts(dicts, "mine", 2)
    dicts += load_checked(*files(valid_content()), "bare")
    with pytest.raises(InputError, match="'mine': 3 of 6 annotations do not have 2 keypoints .*"):
        check_keypoint_counts(dicts, "mine", 2)


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
