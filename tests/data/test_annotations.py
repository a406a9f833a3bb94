"""What becomes of each field of an annotation file: its right value, or a sentence."""

import copy

import pytest
from annotation_files import HEIGHT, WIDTH, valid_content
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import load_coco_json

from msad_kd.data.annotations import check_content, read_annotations
from msad_kd.data.coco_format import load_checked
from msad_kd.utils.errors import InputError

NAN, INF = float("nan"), float("inf")
MISSING = object()
NESTED = [[[[[[[[10, 5, 20, 20]]]]]]]]


def put(content, path, value):
    """Set, or delete, what a path such as ("annotations", 0, "bbox") leads to."""
    *parents, last = path
    for key in parents:
        content = content[key]
    if value is MISSING:
        del content[last]
    else:
        content[last] = value


def annotation(key, *values, row=0):
    return [(("annotations", row, key), value) for value in values]


def rle(size=(HEIGHT, WIDTH), counts=(100, 40, HEIGHT * WIDTH - 140)):
    return {"size": list(size), "counts": list(counts) if isinstance(counts, tuple) else counts}


PIXELS = HEIGHT * WIDTH

INVALID = {
    "bbox should be 4 numbers": annotation(
        "bbox",
        *([1, 2, 3], [1, 2, 3, 4, 5], [], "10 5 20 20", NESTED, [10, 5, "20", 20], 7, {"x": 1}),
        *([10, 5, None, 20], [10, 5, True, 20], [10, 5, 10**400, 20], [[10, 5], [20, 20]], False),
    ),
    "bbox should be finite": annotation(
        "bbox", [NAN, 5, 20, 20], [10, 5, INF, 20], [-INF, 5, 2, 2]
    ),
    "bbox has a negative": annotation("bbox", [10, 5, -20, 20], [10, 5, 20, -1e-3]),
    "bbox has neither": annotation("bbox", [10, 5, 0, 0], [10, 5, 1e-300, 0.0]),
    "bbox lies outside": annotation("bbox", [61, 5, 20, 20], [10, -30, 20, 20], [1e308, 5, 1, 1]),
    "bbox reaches far out": annotation("bbox", [-100, 5, 120, 9], [10, 5, 1e308, 1e308]),
    "bbox is missing, and there is no segmentation": [
        (("annotations", 0), {"id": 11, "image_id": 7, "category_id": 3, **more})
        for more in ({}, {"bbox": None}, {"segmentation": []})
    ],
    "no image has its image_id": annotation(
        "image_id", 8, "cat", None, MISSING, [7], True, 7.5, -7
    ),
    "no category has its category_id": annotation(
        "category_id", 4, 0, "cat", None, MISSING, {"id": 3}, False, 3.5, NAN, 10**30
    ),
    "iscrowd should be 0 or 1": annotation("iscrowd", "yes", 2, -1, "0", [], NAN, {}, 0.5),
    "ignore is set": annotation("ignore", 1, True),
    "segmentation should be a list of polygons or an RLE": annotation(
        "segmentation", "text", "", 5, True, 0.0
    ),
    "a polygon should be a list of numbers": annotation(
        "segmentation", [1, 1, 9, 1, 9, 9], ["a"], [None], [{}], [[1, 1, 9, 1, 9, 9], 3]
    ),
    "a polygon has an odd number": annotation("segmentation", [[1, 1, 9, 1, 9, 9, 5]], [[1]]),
    "a polygon should have at least 6": annotation(
        "segmentation", [[1, 1, 9, 9]], [[]], [[], [1, 1]]
    ),
    "a polygon should hold finite numbers": annotation(
        "segmentation",
        *([[1, 1, 9, NAN, 9, 9]], [[1, 1, 9, INF, 9, 9]], [[1, 1, 9, None, 9, 9]]),
        *([[1, 1, 9, "1", 9, 9]], [[1, 1, 9, True, 9, 9]], [[1, 1, [9], 1, 9, 9]]),
        *([[1, 1, 9, 10**400, 9, 9]], [[1, 1, 9, 1, 9, 9], [1, 1, 9, NAN, 9, 9]]),
    ),
    "segmentation lies outside": annotation("segmentation", [[70, 1, 90, 1, 90, 9]]),
    "segmentation reaches far out": annotation("segmentation", [[1, 1, 1e308, 1, 9, 9]]),
    "the RLE's size should be": annotation(
        "segmentation",
        *(rle(size=s) for s in [(60, 40), (10**5, 10**5), (40,), (), (40, "60"), (40, 60, 1)]),
        *({"counts": [2400]}, {}, {"size": 40, "counts": [2400]}),
    ),
    "the RLE's counts do not make up": annotation(
        "segmentation",
        *(rle(counts=c) for c in ((), (PIXELS + 1,), (-5, PIXELS + 5), (0.5, PIXELS - 0.5))),
        *(rle(counts=c) for c in ((NAN, PIXELS), (True, PIXELS - 1), ("100", PIXELS - 100))),
        *(rle(counts=c) for c in (None, 5, "", "zzz", "0", "é", "\0", {}, (10**400,), "P" * 999)),
        {"size": [HEIGHT, WIDTH]},
    ),
    "the RLE covers nothing": annotation("segmentation", rle(counts=(PIXELS,))),
    "it should be a dict": [(("annotations", 0), value) for value in (None, [], "a", 4)],
    "should be a whole number above 0": [
        (("images", 0, key), value)
        for key in ("height", "width")
        for value in (None, MISSING, "wide", 0, -40, 40.5, NAN, [40], True)
    ],
    "height x width is above": [
        (("images", 0, "width"), 20_000_000),
        (("images", 0, "height"), 1e12),
    ],
    "file_name should be a text": [
        (("images", 0, "file_name"), x) for x in (None, MISSING, 3, "", ".")
    ],
    "another image has the same file_name": [(("images", 1, "file_name"), "7.png")],
    "id should be a whole number, or all": [
        (("images", 0, "id"), x) for x in (None, "a", MISSING, [7])
    ],
}


@pytest.mark.parametrize("words", INVALID)
def test_invalid_records_are_refused_or_dropped(words, files, caplog):
    for path, value in INVALID[words]:
        content = valid_content()
        put(content, path, value)
        json_file, _ = files(content)
        with pytest.raises(InputError) as error:
            read_annotations(json_file, "mine")
        message = str(error.value)
        assert message.startswith(f"data set 'mine': '{json_file}': "), message
        assert words in message and "set DATASETS.INVALID_ANNOTATIONS drop" in message, value
        kept = read_annotations(json_file, "mine", "drop")
        assert words in caplog.text and " are left out" in caplog.text
        caplog.clear()
        expected = valid_content()
        if path[0] == "images":
            assert [x["id"] for x in kept["images"]] == [7 if path[1] else 9]
        else:
            assert kept["annotations"] == expected["annotations"][1:], value


CONTENT = valid_content()
REFUSED = {
    "cannot be read as JSON": ["", "no JSON", "{", '{"images": [', b"\xff\xfe\xfd", "1" * 5000],
    "nested too deep": ["[" * 200_000, '{"a":' * 200_000],
    "it has no list of images": ["[]", "3", "null", "{}", {**CONTENT, "images": []}],
    "it has no list of annotations": [{**CONTENT, "annotations": x} for x in (None, {}, "a")],
    "it has no list of categories": [{**CONTENT, "categories": x} for x in (None, [], {"id": 1})],
    "another image has the same id": [{**CONTENT, "images": 2 * CONTENT["images"]}],
    "another category has the same id": [
        {**CONTENT, "categories": [{"id": 3, "name": "a"}, {"id": x, "name": "b"}]}
        for x in (3, 3.0, "3")
    ],
    "another category has the same name": [
        {**CONTENT, "categories": [{"id": 3, "name": "a"}, {"id": 5, "name": "a"}]}
    ],
    "category 'cat'.*: id should be a whole number": [
        {**CONTENT, "categories": [{"id": "cat", "name": "cat"}]}
    ],
    "category number 1: id should": [{**CONTENT, "categories": [{"name": "cat"}]}],
    "category 3: name should be a text": [
        {**CONTENT, "categories": [{"id": 3, "name": x}]} for x in (None, 7, "", " ", ["cat"])
    ],
    "category number 2: it should be a dict": [
        {**CONTENT, "categories": [{"id": 3, "name": "cat"}, "dog"]}
    ],
}


@pytest.mark.parametrize("words", REFUSED)
@pytest.mark.parametrize("invalid", ["error", "drop"])
def test_what_can_never_be_used(words, invalid, files):
    for content in REFUSED[words]:
        json_file, _ = files(content)
        with pytest.raises(InputError, match=words) as error:
            read_annotations(json_file, "mine", invalid)
        assert f"data set 'mine': '{json_file}'" in str(error.value)
        assert len(str(error.value)) < 1000 and "INVALID_ANNOTATIONS" not in str(error.value)


A = ("annotations",)
MENDED = [  # changes of valid_content, and fields of the first annotation afterwards
    *[([((*A, 0, "id"), x)], {"id": 1}) for x in (0, -4, MISSING, None, "a", 12, 1.5, 10**30, [])],
    *[([((*A, 0, "area"), x)], {"area": 400.0}) for x in (MISSING, None, 0, -1, "a", NAN, 1e308)],
    *[([((*A, 0, "iscrowd"), x)], {"iscrowd": 0}) for x in (MISSING, None, False, 0.0)],
    *[([((*A, 0, "iscrowd"), x)], {"iscrowd": 1}) for x in (True, 1.0)],
    *[([((*A, 0, "bbox"), x)], {"bbox": [10, 5, 20, 20]}) for x in (MISSING, None)],
    *[([((*A, 0, "category_id"), x)], {"category_id": 3}) for x in (3.0, "3", " 3")],
    *[([((*A, 0, "image_id"), x)], {"image_id": 7}) for x in (7.0, "7", "07")],
    *[([((*A, 0, "segmentation"), x)], {"segmentation": None}) for x in (MISSING, None, [])],
    ([(("categories", 1, "id"), "3")], {"category_id": 3}),
    ([(("categories", 1, "id"), 3.0)], {"category_id": 3}),
    ([(("images", 0, "id"), 7.0)], {"image_id": 7}),
    ([(("images", 0, "id"), "7")], {"image_id": 7}),
    (
        [
            (("images", 0, "id"), "x"),
            (("images", 1, "id"), "y"),
            *[((*A, i, "image_id"), "y") for i in range(4)],
        ],
        {"image_id": "y"},
    ),
    ([(("images", 0, "height"), float(HEIGHT)), (("images", 0, "width"), str(WIDTH))], {}),
    ([((*A, 0, "bbox"), [-3, 5, 20, 20])], {"bbox": [-3, 5, 20, 20]}),  # a mapper clips it
    ([((*A, 0, "segmentation"), MISSING), ((*A, 0, "area"), MISSING)], {"area": 400.0}),
    ([((*A, 0, "segmentation"), rle()), ((*A, 0, "area"), MISSING)], {"area": 40.0}),
    (
        [((*A, 0, "segmentation"), rle()), ((*A, 0, "bbox"), MISSING)],
        {"bbox": [2.0, 0.0, 2.0, 40.0]},
    ),
    ([((*A, 0, "segmentation"), rle(size=(40.0, 60.0)))], {"segmentation": rle()}),
    (
        [((*A, 0, "segmentation"), [[1, 1, 9, 9], [1, 1, 9, 1, 9, 9]])],
        {"segmentation": [[1, 1, 9, 1, 9, 9]]},
    ),
]


@pytest.mark.parametrize("number", range(len(MENDED)))
def test_what_is_normalised(number, files):
    changes, expected = MENDED[number]
    content = valid_content()
    for path, value in changes:
        put(content, path, value)
    dicts = load_checked(*files(content), f"mended{number}")
    content = read_annotations(files(content)[0], "mine")
    first = content["annotations"][0]
    for key, value in expected.items():
        assert first.get(key) == value and type(first.get(key)) is type(value)
    assert {type(x[key]) for x in content["images"] for key in ("height", "width")} == {int}
    ids = [x["id"] for x in content["annotations"]]
    assert ids == [11, 12, 13, 14] or ids == [1, 2, 3, 4]
    assert sum(len(entry["annotations"]) for entry in dicts) == 4


def test_valid_files_stay_as_they_are_and_become_the_dicts_of_detectron2(files, data, caplog):
    shapes = (str(data / "annotations/instances_train.json"), str(data / "train"))
    for number, keypoints in enumerate((False, True)):
        content = valid_content(keypoints)
        assert check_content(copy.deepcopy(content)).problems == []
        read = read_annotations(files(content)[0], "mine")
        assert read == content
        for place, source in enumerate((files(content), shapes)):
            ours, theirs = f"ours{number}{place}", f"theirs{number}{place}"
            assert load_checked(*source, ours) == load_coco_json(*source, theirs)
            for key in ("thing_classes", "thing_dataset_id_to_contiguous_id"):
                assert MetadataCatalog.get(ours).get(key) == MetadataCatalog.get(theirs).get(key)
    del content["annotations"]  # as in a file of test images
    assert [d["annotations"] for d in load_checked(*files(content), "test")] == [[], []]


def test_what_is_left_out_with_a_warning_or_if_asked(files, caplog):
    content = valid_content()
    content["annotations"][1]["bbox"] = [10, 5, 20, 0]
    content["annotations"].append({**content["annotations"][2], "id": 20, "area": 199})
    other = {**content["annotations"][0], "id": 21, "segmentation": [[10, 5, 30, 5, 30, 25]]}
    content["annotations"].append(other)  # another mask in the same box is no copy
    content["annotations"].append({**other, "id": 22, "bbox": [10, 5, 20, 20]})  # a copy of 21
    json_file, _ = files(content)
    kept = read_annotations(json_file, "mine")["annotations"]
    assert [x["id"] for x in kept] == [11, 13, 14, 20, 21, 22]
    assert "annotation 12 (image 7): bbox has no width or no height" in caplog.text
    assert "annotation 20 (image 9): it repeats another annotation" in caplog.text
    assert [x["id"] for x in read_annotations(json_file, "mine", "drop")["annotations"]] == [
        *(11, 13, 14, 21)
    ]


def test_problems_are_counted_and_named(files):
    content = valid_content()
    for row in (1, 2, 3):
        content["annotations"][row]["bbox"] = [1, 2, 3]
    content["annotations"][0]["iscrowd"] = "yes"
    with pytest.raises(InputError) as error:
        read_annotations(files(content)[0], "mine")
    words = "annotation 12 (image 7): bbox should be 4 numbers, not [1, 2, 3] (and 2 more)"
    assert words in str(error.value) and "; 4 annotations in all; mend" in str(error.value)
    assert "annotation 11 (image 7): iscrowd should be 0 or 1, not 'yes'" in str(error.value)
    content["images"] = [{**x, "width": None} for x in content["images"]]
    with pytest.raises(InputError, match="no image is usable.*image 7: width"):
        read_annotations(files(content)[0], "mine", "drop")


def test_an_image_that_is_no_dict_does_not_spoil_ids_that_are_texts(files):
    content = valid_content()
    content["images"] = [{**x, "id": str(x["id"])} for x in content["images"]] + [None]
    content["images"][0]["id"] = "one"
    for row in (0, 1):
        content["annotations"][row]["image_id"] = "one"
    kept = read_annotations(files(content)[0], "mine", "drop")
    assert [x["id"] for x in kept["images"]] == ["one", "9"] and len(kept["annotations"]) == 4


@pytest.mark.parametrize(
    ("boxes", "words"),
    [
        ([[20, 10, 50, 35]] * 6 + [[30, 5, 55, 20]] * 6 + [[2, 3, 30, 20]] * 8, "two corners"),
        ([[0.5, 0.5, 0.2, 0.1], [0.1, 0.2, 1.0, 0.9]] * 5, "from 0 to 1"),
        ([[50, 30, 9, 9], [0, 0, 60, 40]] * 20 + [[10, 10, 60, 35]] * 9, None),
        ([[10, 10, 60, 35]] * 3, None),  # too few to tell
    ],
)
def test_boxes_of_another_format_are_doubted(boxes, words):
    content = valid_content()
    content["annotations"] = [
        {"id": i, "image_id": 7, "category_id": 3, "bbox": x} for i, x in enumerate(boxes)
    ]
    odd = [x.words for x in check_content(content).problems if x.severity == "strange"]
    assert (words in odd[0]) if words else not odd
