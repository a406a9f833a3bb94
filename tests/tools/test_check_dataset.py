"""tools/check_dataset.py by its main(): what it finds in broken data, and the sizes it counts."""

import json
import re

import cv2
import numpy as np
import pytest
import yaml
from annotation_files import HEIGHT, WIDTH, valid_content
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from helpers import load_tool
from PIL import Image

from msad_kd.data.statistics import resize_scales

tool = load_tool("check_dataset")


def move(content, _):
    """Move the box of the first annotation out of its image."""
    content["annotations"][0]["bbox"] = [70, 5, 20, 20]


def cut(content, folder):
    """Keep the header of an image, and little more."""
    path = folder / "photos" / "7.png"
    path.write_bytes(path.read_bytes()[:3000])


BROKEN = {  # one fault of each kind; tests/data has the others
    "bbox lies outside the image: [70, 5, 20, 20]": move,
    "it has no list of categories": lambda content, _: content.pop("categories"),
    "no image has an object": lambda content, _: content["annotations"].clear(),
    "1 of the 2 images": lambda _, folder: (folder / "photos" / "9.png").unlink(),
    "7.png' cannot be read (image file is truncated)": cut,
}


@pytest.mark.parametrize("words", BROKEN)
def test_each_fault_is_an_error_that_names_it(check, mine, words):
    content = valid_content()
    BROKEN[words](content, mine)
    (mine / "mine.json").write_text(json.dumps(content))
    code, text = check()
    errors = text.partition("Errors")[2].partition("Warnings:")[0]
    assert code == 1 and words in errors, text
    assert (mine / "out" / "report.txt").read_text() in text


def test_a_file_that_is_no_json(check, mine):
    (mine / "mine.json").write_text("{")
    code, text = check()
    assert code == 1 and "mine.json' cannot be read as JSON" in text


def test_several_faults_at_once_and_all_records_in_the_json(check, mine):
    content = valid_content()
    for row in (0, 2):
        content["annotations"][row]["category_id"] = 4
    (mine / "mine.json").write_text(json.dumps(content))
    cut(content, mine)
    code, text = check()
    assert code == 1 and "2 errors" in text
    report = json.loads((mine / "out" / "report.json").read_text())
    (remark,) = [x for x in report["remarks"] if "category_id" in x["words"]]
    assert remark["records"] == ["annotation 11 (image 7)", "annotation 13 (image 9)"]
    assert report["classes"]["mine"] == {"cat": 0, "dog": 1}  # of what is usable


def test_sound_data_have_no_error_and_a_readable_picture(check, mine):
    content = valid_content()
    del content["annotations"][0]["area"]
    (mine / "mine.json").write_text(json.dumps(content))
    code, text = check()
    assert code == 0 and "0 errors" in text and "area is missing, and was computed" in text
    assert re.search(r"mine +2 +0 +4 +4 +1 +40 to 40, median 40", text)
    assert cv2.imread(str(mine / "out" / "sizes.png")).std() > 10


def test_quick_reads_headers_alone(check, mine):
    cut(None, mine)
    data = ["--json", mine / "mine.json", "--images", mine / "photos"]
    assert check(*data)[0] == 1 and check(*data, "--quick")[0] == 0
    turned = Image.new("RGB", (HEIGHT, WIDTH))  # EXIF turns it to 60 x 40 px
    exif = Image.Exif()
    exif[0x112] = 6
    turned.save(mine / "photos" / "9.png", exif=exif)
    assert check(*data, "--quick")[0] == 0
    turned.save(mine / "photos" / "9.png")
    code, text = check(*data, "--quick")
    assert code == 1 and "9.png' has 40 x 60 px, but its entry says 60 x 40" in text
    Image.new("RGB", (WIDTH, HEIGHT)).save(mine / "photos" / "9.png", exif=exif)
    assert "has 40 x 60 px, once turned as its EXIF says, but its" in check(*data, "--quick")[1]


def test_images_without_labels_are_read_too(check, mine):
    photos, cut_off = mine / "photos", mine / "unlabeled" / "1.png"
    cut_off.parent.mkdir()
    cut_off.write_bytes((photos / "7.png").read_bytes()[:-1000])
    entries = [{"name": "bare", "images": str(cut_off.parent)}]
    entries += [{"name": "later", "images": str(photos), "json": str(mine / "later.json")}]
    entries += [{"name": "mine", "images": str(photos), "json": str(mine / "mine.json")}]
    config = mine / "mine.yaml"
    names = {"TRAIN": ["mine"], "TEST": [], "UNLABELED": ["bare", "later"], "COCO_FORMAT": entries}
    model = {"META_ARCHITECTURE": "DistilledRCNN", "ROI_HEADS": {"NUM_CLASSES": 12}}
    config.write_text(yaml.safe_dump({"DATASETS": names, "MODEL": model}))
    code, text = check("--config-file", config, "SOLVER.UNLABELED_PER_BATCH", 16)
    assert code == 1 and f"data set 'bare': image '{cut_off}' cannot be read" in text
    assert re.search("there is no '.*later.json' yet to check", text)
    assert "MODEL.ROI_HEADS.NUM_CLASSES is 12, and the data have 2 classes" in text


def test_objects_below_4_and_8_px_worked_out_by_hand(check, mine):
    """Boxes of 3 to 40 px; at a quarter of the size 16 px become 4, and so on."""
    boxes = [[0, 0, 3, 30], [0, 0, 30, 8], [0, 0, 16, 16], [0, 0, 31, 39], [9, 0, 40, 40]]
    content = valid_content()
    content["annotations"] = [
        {"id": i + 1, "image_id": 7, "category_id": 3, "bbox": box} for i, box in enumerate(boxes)
    ]
    (mine / "mine.json").write_text(json.dumps(content))
    check()
    rows = json.loads((mine / "out" / "report.json").read_text())["sizes"]
    found = [(row["short_side"], row["below_4_px"], row["below_8_px"]) for row in rows]
    # The shorter sides are 3, 8, 16, 31 and 40 px; images have a short side of 40 px.
    assert found == [(10, 2, 4), (15, 2, 3), (20, 1, 2), (30, 1, 2), (40, 1, 1)]
    assert rows[0]["median_side"] == 4 and rows[-1]["objects"] == 5


def test_the_longer_side_limits_the_size():
    sides = np.array([[100, 200], [100, 400]])
    assert resize_scales(sides, 50, 100).tolist() == [0.5, 0.25]


@pytest.mark.parametrize(
    "role, sizes",
    [
        ("student", {"LR": 32, "HR": 64}),
        ("teacher", {"LR": 32, "HR": 64}),
        ("lr", {"LR of an HR config": 16, "config": 32}),
        ("lr KD.SCALE 1", {"config": 32}),
    ],
)
def test_a_config_names_the_sizes(config_files, check, role, sizes, mine):
    role, *opts = role.split()
    code, text = check("--config-file", config_files[role], *opts)
    assert code == 0, text
    rows = json.loads((mine / "out" / "report.json").read_text())["sizes"]
    found = {row["size"]: row["short_side"] for row in rows if row["data_set"] == "tiny_train"}
    assert {key: value for key, value in found.items() if key} == sizes
    assert len(rows) == 10 and "tiny_val (TEST)" in text


def test_what_does_not_fit_the_config(check, pair):
    train, test = valid_content(), valid_content()
    del train["annotations"][1]["segmentation"]
    test["categories"][0]["name"] = "horse"
    code, text = check(*pair(train, test))
    assert code == 1 and "1 of 3 annotations have no segmentation" in text
    assert "has classes that data set 'one'" in text and "lacks: horse" in text
    assert "has no category, so no AP, for dog" in text
    assert re.search("images that are training images, too: .*7.png, .*9.png", text)
    code, text = check(*pair(valid_content(), valid_content(), "MODEL.ROI_HEADS.NUM_CLASSES", "1"))
    assert code == 1 and "MODEL.ROI_HEADS.NUM_CLASSES is 1" in text


def test_what_could_not_be_evaluated(check, pair):
    """A training would say it at its start, distill.py only once it measures."""
    bare = valid_content()
    del bare["annotations"][0]["segmentation"]
    train = valid_content()
    train["annotations"][0]["bbox"] = [70, 5, 20, 20]
    code, text = check(*pair(train, bare))
    assert (
        code == 1
        and "2 errors" in text
        and "'two': 1 of its annotations have no segmentation, e.g. that" in text
    )
    assert check(*pair(valid_content(), bare, "MODEL.MASK_ON", "False"))[0] == 0
    vars(MetadataCatalog.get("two")).update(evaluator_type="lvis")
    code, text = check(*pair(valid_content(), valid_content()))
    assert code == 0 and "'two' needs the evaluator 'lvis'" in text


def test_masks_that_a_dense_detector_would_be_trained_with(check, pair, files_of):
    bare = valid_content()
    del bare["annotations"][0]["segmentation"]
    arguments = pair(bare, valid_content(), "MODEL.RETINANET.NUM_CLASSES", "2")
    arguments[1] = files_of("retinanet")["lr"]
    for masks, expected in (("True", 1), ("False", 0)):
        code, text = check(*arguments, "MODEL.MASK_ON", masks)
        assert (code, "have no segmentation" in text) == (expected, expected == 1), text


def test_what_training_would_drop_is_a_warning(check, pair, mine):
    train = valid_content()
    train["annotations"][0]["bbox"] = [70, 5, 20, 20]
    drop = ("DATASETS.INVALID_ANNOTATIONS", "drop")
    assert check(*pair(train, valid_content()))[0] == 1
    code, text = check(*pair(train, valid_content(), *drop))
    assert code == 0 and "bbox lies outside the image" in text.partition("Warnings")[2]
    Image.new("RGB", (WIDTH, HEIGHT + 1)).save(mine / "photos" / "7.png")
    assert check(*pair(train, valid_content(), *drop))[0] == 1  # it is an image of TEST, too


@pytest.mark.parametrize("size", [{"height": HEIGHT, "width": WIDTH}, {}])
def test_data_without_a_file_in_coco_format(check, config_files, mine, size):
    box = {"bbox": [0, 0, 9, 7], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    entry = {"file_name": str(mine / "photos" / "7.png"), **size}
    DatasetCatalog.register("own", lambda: [{**entry, "image_id": 1, "annotations": [box]}])
    MetadataCatalog.get("own").thing_classes = ["cat"]
    names = ["DATASETS.TRAIN", "('own',)", "DATASETS.TEST", "('own',)", "MODEL.MASK_ON", "False"]
    code, text = check("--config-file", config_files["lr"], *names)
    if not size:
        assert code == 1 and "one of the dicts that its function returns has no 'width'" in text
        names[3] = "()"
        code, text = check("--config-file", config_files["lr"], *names)
    assert code == 0 and "'own': it is not in COCO format" in text
    assert re.search(r"own \(TRAIN\) +1 +0 +1 +0 +0 +40 to 40", text)


def test_mistakes_of_the_command_line(check, mine):
    for arguments in (["--json", "x.json"], ["--images", "x"], ["--quick"], ["--workers", "0"]):
        assert check(*arguments)[0] == 2
    assert "'nowhere.yaml' does not exist" in check("--config-file", "nowhere.yaml")[0]
    (mine / "out").write_text("")
    assert f"File exists: '{mine / 'out'}'" in check()[0]
