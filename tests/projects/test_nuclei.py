"""projects/Nuclei: the conversion of the Data Science Bowl's layout to COCO format."""

import filecmp
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.structures import Boxes, Instances
from filelock import FileLock
from helpers import ROOT
from PIL import Image
from pycocotools import mask as mask_util

from msad_kd.config.build import build_config
from msad_kd.evaluation.build import build_evaluator
from msad_kd.evaluation.coco import IMPLEMENTATIONS, _is_installed
from projects.Nuclei import prepare as nuclei
from projects.study.cells import make_cells
from projects.study.grid import read_grid

ARCHIVE = ROOT.parent / "shared" / "data" / "dsb2018_stage1_train.zip"
INSTALLED = [name for name in IMPLEMENTATIONS if _is_installed(name)]
# An id of each split.
TRAIN, VAL, TEST = "b", "h", "a"


def square(shape, y, x, side=3):
    mask = np.zeros(shape, np.uint8)
    mask[y : y + side, x : x + side] = 255
    return mask


def write_image(folder, image_id, image, masks):
    for kind in ("images", "masks"):
        (folder / image_id / kind).mkdir(parents=True)
    Image.fromarray(image).save(folder / image_id / "images" / f"{image_id}.png")
    for index, mask in enumerate(masks):
        Image.fromarray(mask).save(folder / image_id / "masks" / f"{index}.png")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """An image of each split: RGBA, grey, and one whose masks are mostly broken."""
    folder = tmp_path_factory.mktemp("source") / "stage1_train"
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (12, 16, 4), np.uint8)
    write_image(folder, TRAIN, rgba, [square((12, 16), 1, 2), square((12, 16), 6, 8, side=4)])
    grey = rng.integers(0, 256, (10, 10), np.uint8)
    write_image(folder, VAL, grey, [square((10, 10), 0, 0)])
    broken = [
        square((12, 16), 0, 0),
        square((12, 16), 2, 2),  # shares one pixel with the first
        np.zeros((12, 16), np.uint8),
        square((16, 12), 5, 5),
        square((12, 16), 1, 1, side=1),  # within the first
    ]
    write_image(folder, TEST, rgba, broken)
    return folder


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    """The converted source and what was reported."""
    reports = []
    output = tmp_path_factory.mktemp("output") / "nuclei"
    nuclei.prepare(source, output, reports.append)
    return output, reports


def content_of(output, split):
    return json.loads((output / "annotations" / f"instances_{split}.json").read_text())


def files_of(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def test_masks_boxes_and_pixels(source, converted):
    output, _ = converted
    path, images = output / "annotations" / "instances_train.json", output / "train"
    (record,) = load_coco_json(str(path), str(images), "nuclei_in_a_test", ["area"])
    assert record["file_name"] == str(images / f"{TRAIN}.png")
    assert (record["width"], record["height"]) == (16, 12)
    one, two = record["annotations"]
    assert (one["category_id"], one["bbox"], one["area"]) == (0, [2, 1, 3, 3], 9)
    assert (two["category_id"], two["bbox"], two["area"]) == (0, [8, 6, 4, 4], 16)
    decoded = mask_util.decode(two["segmentation"])
    np.testing.assert_array_equal(decoded * 255, square((12, 16), 6, 8, side=4))
    rgba = np.asarray(Image.open(source / TRAIN / "images" / f"{TRAIN}.png"))
    np.testing.assert_array_equal(Image.open(output / "train" / f"{TRAIN}.png"), rgba[..., :3])
    assert Image.open(output / "val" / f"{VAL}.png").mode == "RGB"


def test_broken_masks_are_named_and_handled(converted):
    output, reports = converted
    overlapping, empty, wrong, covered = reports
    assert "masks/1.png: 1 pixels overlap" in overlapping
    assert "masks/2.png: empty" in empty
    assert "masks/3.png: size (16, 12)" in wrong
    assert "masks/4.png" in covered and "left out" in covered
    assert [a["area"] for a in content_of(output, "test")["annotations"]] == [9, 8]


def test_a_zip_gives_the_same(source, converted, tmp_path):
    with zipfile.ZipFile(tmp_path / "source.zip", "w") as archive:
        for path in sorted(source.rglob("*.png"), reverse=True):
            archive.write(path, path.relative_to(source))
        archive.writestr(f"__MACOSX/{TRAIN}/images/._{TRAIN}.png", b"no image")
    again = tmp_path / "again"
    nuclei.prepare(tmp_path / "source.zip", again, [].append)
    names = files_of(again)
    assert names == files_of(converted[0]) and len(names) == 8
    assert all(filecmp.cmp(again / name, converted[0] / name, shallow=False) for name in names)


@pytest.mark.parametrize("mode", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_with_a_flipped_bit_is_named(source, tmp_path, mode):
    path, name = tmp_path / "source.zip", f"{TRAIN}/images/{TRAIN}.png"
    with zipfile.ZipFile(path, "w", mode) as archive:
        for image in source.rglob("*.png"):
            archive.write(image, image.relative_to(source))
    content, info = path.read_bytes(), zipfile.ZipFile(path).getinfo(name)
    start = info.header_offset + 30 + len(name)
    for place in (20, info.compress_size // 2):
        changed = bytearray(content)
        changed[start + place] ^= 16
        path.write_bytes(changed)
        with pytest.raises(SystemExit, match="zip '.*source.zip' is damaged"):
            nuclei.main([str(path), "--output", str(tmp_path / "nuclei")])


def test_split_depends_on_the_id_alone():
    known = {TRAIN: "train", VAL: "val", TEST: "test"}
    assert {image_id: nuclei.split_of(image_id) for image_id in known} == known
    splits = [nuclei.split_of(str(number)) for number in range(10000)]
    for split, share in {"train": 0.5, "val": 0.2, "test": 0.3}.items():
        assert abs(splits.count(split) / 10000 - share) < 0.02


def test_shares_are_parts_of_train_and_of_each_other(tmp_path):
    names = [f"{number}" for number in range(500)]
    images = [{"id": index + 1, "file_name": f"{name}.png"} for index, name in enumerate(names)]
    images = [image for image in images if nuclei.split_of(image["file_name"][:-4]) == "train"]
    labels = [{"id": image["id"] + 9, "image_id": image["id"]} for image in images]
    (tmp_path / "annotations").mkdir()
    nuclei.write_shares(tmp_path, {"images": images, "annotations": labels, "categories": ["x"]})
    ten, thirty = (content_of(tmp_path, f"train_{share}") for share in (10, 30))
    for share, content in {0.1: ten, 0.3: thirty}.items():
        assert abs(len(content["images"]) / len(images) - share) < 0.05
        kept = [image["id"] for image in content["images"]]
        assert [label["image_id"] for label in content["annotations"]] == kept
        assert content["categories"] == ["x"]
    assert {x["id"] for x in ten["images"]} < {x["id"] for x in thirty["images"]}


def test_a_stopped_run_leaves_no_data_set(source, converted, tmp_path, monkeypatch):
    output, write_split = tmp_path / "nuclei", nuclei.write_split

    def stop_at_val(folder, split, *args):
        if split == "val":
            raise KeyboardInterrupt
        return write_split(folder, split, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(nuclei, "write_split", stop_at_val)
        nuclei.prepare(source, output, [].append)
    assert not output.exists()
    nuclei.prepare(source, output, [].append)
    assert files_of(output) == files_of(converted[0])
    assert {path.name for path in tmp_path.iterdir()} - {".nuclei.lock"} == {"nuclei"}


def test_two_at_once_do_not_get_in_each_others_way(source, tmp_path):
    with FileLock(tmp_path / ".nuclei.lock"), pytest.raises(SystemExit, match="another one is"):
        nuclei.main([str(source), "--output", str(tmp_path / "nuclei")])
    nuclei.main([str(source), "--output", str(tmp_path / "nuclei")])


def without_image(folder):
    (folder / "x" / "masks").mkdir(parents=True)
    Image.fromarray(square((4, 4), 0, 0)).save(folder / "x" / "masks" / "0.png")


def broken_image(folder):
    write_image(folder, "x", np.zeros((64, 64, 3), np.uint8), [square((64, 64), 0, 0)])
    file = folder / "x" / "images" / "x.png"
    file.write_bytes(file.read_bytes()[:50])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda folder: None, "neither a folder nor a zip"),
        (lambda folder: folder.mkdir(), "should be stage1_train"),
        (without_image, "'x' has 0 images"),
        (broken_image, "prepare.py: '.*x/images/x.png' cannot be read: "),
    ],
)
def test_a_wrong_source_is_one_sentence(make, sentence, tmp_path):
    make(tmp_path / "source")
    with pytest.raises(SystemExit, match=sentence):
        nuclei.main([str(tmp_path / "source"), "--output", str(tmp_path / "nuclei")])
    assert not (tmp_path / "nuclei").exists()
    (tmp_path / "nuclei").mkdir()
    with pytest.raises(SystemExit, match="exists already"):
        nuclei.main([str(tmp_path / "source"), "--output", str(tmp_path / "nuclei")])


@pytest.mark.parametrize("implementation", INSTALLED)
def test_more_than_100_nuclei_count(implementation, tmp_path):
    corners = [(4 * row, 4 * column) for row in range(12) for column in range(12)]
    masks = [square((48, 48), *corner) for corner in corners]
    write_image(tmp_path / "source", TRAIN, np.zeros((48, 48), np.uint8), masks)
    nuclei.prepare(tmp_path / "source", tmp_path / "nuclei", [].append)
    name, file = f"nuclei_{implementation}", "nuclei/annotations/instances_train.json"
    register_coco_instances(name, {}, str(tmp_path / file), str(tmp_path / "nuclei/train"))
    DatasetCatalog.get(name)  # this registers the class
    options = ["TEST.COCO_EVALUATOR", implementation, "OUTPUT_DIR", str(tmp_path)]
    cfg = build_config(str(ROOT / "configs/Nuclei/lr.yaml"), options)
    evaluator = build_evaluator(cfg, name)
    evaluator.reset()
    found = Instances((48, 48))
    found.pred_boxes = Boxes([[x, y, x + 3, y + 3] for y, x in corners])
    found.scores = torch.ones(len(corners))
    found.pred_classes = torch.zeros(len(corners), dtype=torch.int64)
    found.pred_masks = torch.from_numpy(np.stack(masks) > 0)
    evaluator.process([{"image_id": 1}], [{"instances": found}])
    results = evaluator.evaluate()
    assert [results[task]["AP"] for task in ("bbox", "segm")] == pytest.approx([100, 100])


@pytest.mark.long
@pytest.mark.skipif(not ARCHIVE.exists(), reason=f"{ARCHIVE} is not there")
def test_the_real_archive(tmp_path):
    reports = []
    nuclei.prepare(ARCHIVE, Path(tmp_path) / "nuclei", reports.append)
    contents = [content_of(tmp_path / "nuclei", split) for split in nuclei.SPLITS]
    assert sum(len(content["images"]) for content in contents) == 664
    assert sum(len(content["annotations"]) for content in contents) == 28986
    assert all("overlap" in report for report in reports)


def test_the_study_can_be_read(tmp_path):
    cells = make_cells(read_grid(ROOT / "projects/Nuclei/study.yaml"), tmp_path)
    ends = {name: cell.test_options for name, cell in cells.items() if "-test/" in name}
    assert len(ends) > 6 and all("nuclei_test" in " ".join(x) for x in ends.values())
    assert {"teacher/1"} == {*cells["control-800/3"].needs} == {*cells["student-l1-800/2"].needs}
