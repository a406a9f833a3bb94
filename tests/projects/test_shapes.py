"""The Shapes data set is reproducible, exact in both formats, and never half written."""

import filecmp
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from filelock import Timeout
from helpers import ROOT
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from projects.Shapes import generate as generator
from projects.Shapes.coco_format import polygons_of
from projects.Shapes.generate import generate, main
from projects.Shapes.placement import _UNIT_OUTLINES, CLASS_NAMES, SceneOptions, _area
from projects.Shapes.scenes import SUPERSAMPLING, draw_scene

TINY = {"train": 2, "val": 2, "size": (64, 64), "progress": False}
OPTIONS = SceneOptions(size=(64, 64))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Return the folder of 2 + 4 scenes of 64 px in both formats."""
    pytest.importorskip("cityscapesscripts")
    folder = tmp_path_factory.mktemp("data") / "shapes"
    assert generate(folder, **{**TINY, "val": 4}, format="both")
    return folder


def files_of(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def visible(folder):
    """Return the names in a folder but for the lock files."""
    return [name for name in os.listdir(folder) if not name.endswith(".lock")]


def same_content(one, other):
    assert (names := files_of(one)) == files_of(other) and names
    return all(filecmp.cmp(one / name, other / name, shallow=False) for name in names)


def pixels_seen(scene, index):
    """Return (H, W) bool: where shape `index` is visible and covers at least half a pixel."""
    mask = 255 * scene.visible_mask(index)
    height, width = scene.image.shape[:2]
    return cv2.resize(mask, (width, height), interpolation=cv2.INTER_AREA) > 127


def iou(one, other):
    return (one & other).sum() / (one | other).sum()


# -- the scenes


def test_two_runs_are_bitwise_equal(shapes, tmp_path):
    generate(tmp_path / "again", **{**TINY, "val": 4}, format="both")
    assert same_content(shapes, tmp_path / "again")


def test_smaller_set_is_the_beginning_of_the_larger(shapes, tmp_path):
    generate(tmp_path / "less", **{**TINY, "train": 1})
    for split, count in (("train", 1), ("val", 2)):
        path = Path("annotations", f"instances_{split}.json")
        less = json.loads((tmp_path / "less" / path).read_text())
        more = json.loads((shapes / path).read_text())
        assert less["images"] == more["images"][:count]
        assert less["annotations"] == [a for a in more["annotations"] if a["image_id"] < count]
        for image in less["images"]:
            name = Path(split, image["file_name"])
            assert filecmp.cmp(tmp_path / "less" / name, shapes / name, shallow=False)


def test_seed_split_and_index_each_give_another_scene():
    places = [(0, "train", 0), (1, "train", 0), (0, "val", 0), (0, "train", 1)]
    images = {draw_scene(*place, OPTIONS).image.tobytes() for place in places}
    assert len(images) == len(places)


@pytest.mark.parametrize("difficulty, visible", [(0.0, 0.9), (1.0, 0.45)])
def test_numbers_sizes_and_visibility_are_within_their_bounds(difficulty, visible):
    options = SceneOptions(
        (64, 96), difficulty, classes=3, min_radius=5, max_radius=20, min_shapes=3, max_shapes=6
    )
    for index in range(10):
        scene = draw_scene(0, "train", index, options)
        assert scene.image.shape == (64, 96, 3) and scene.image.dtype == np.uint8
        assert 3 <= len(scene.shapes) <= 6
        for order, shape in enumerate(scene.shapes):
            assert shape.label in range(3)
            assert 5 <= shape.radius * 128 / 64 <= 20
            assert scene.visible_mask(order).sum() >= visible * shape.mask.sum()


def test_area_does_not_tell_the_class():
    assert [_area(outline) for outline in _UNIT_OUTLINES] == pytest.approx([np.pi] * 8)


def test_harder_scenes_have_less_contrast():
    def contrast(difficulty):
        options = SceneOptions((64, 64), difficulty, min_shapes=1, max_shapes=1)
        differences = []
        for index in range(10):
            scene = draw_scene(0, "train", index, options)
            inside = pixels_seen(scene, 0)
            ring = cv2.dilate(inside.astype(np.uint8), np.ones((7, 7))).astype(bool) & ~inside
            difference = scene.image[inside].mean(axis=0) - scene.image[ring].mean(axis=0)
            differences.append(np.linalg.norm(difference))
        return np.mean(differences)

    assert contrast(0.0) > 1.5 * contrast(1.0)


# -- COCO format


def test_coco_annotations_match_the_visible_shapes(shapes):
    overlaps = []
    for split, count in (("train", 2), ("val", 4)):
        coco = COCO(shapes / "annotations" / f"instances_{split}.json")
        assert [c["name"] for c in coco.loadCats(range(1, 9))] == list(CLASS_NAMES)
        assert len(coco.anns) == len(coco.dataset["annotations"]) and min(coco.anns) == 1
        for index in range(count):
            image, scene = coco.imgs[index], draw_scene(0, split, index, OPTIONS)
            stored = cv2.imread(str(shapes / split / image["file_name"]))[..., ::-1]
            assert np.array_equal(stored, scene.image)
            assert stored.shape == (image["height"], image["width"], 3)
            annotations = coco.imgToAnns[index]
            assert [a["category_id"] - 1 for a in annotations] == [s.label for s in scene.shapes]
            for order, annotation in enumerate(annotations):
                mask = coco.annToMask(annotation)
                assert annotation["iscrowd"] == 0 and annotation["area"] == mask.sum() > 0
                boxes = np.reshape([annotation["bbox"], cv2.boundingRect(mask)], (2, 2, 2))
                corners, expected = boxes.cumsum(axis=1)
                assert corners.min() >= 0 and corners.max() <= 64
                assert np.allclose(corners, expected, atol=1.0)
                overlaps.append(iou(mask > 0, pixels_seen(scene, order)))
    assert min(overlaps) > 0.6  # some shapes have only a dozen pixels
    assert np.mean(overlaps) > 0.93


def test_polygon_runs_along_the_edge_of_the_mask():
    mask = np.zeros((40 * SUPERSAMPLING, 40 * SUPERSAMPLING), np.uint8)
    mask[5 * SUPERSAMPLING : 9 * SUPERSAMPLING, 10 * SUPERSAMPLING :] = 1
    (polygon,) = polygons_of(mask)
    corners = {tuple(point) for point in np.reshape(polygon, (-1, 2)).tolist()}
    assert corners == {(10, 5), (40, 5), (40, 9), (10, 9)}


def test_polygons_leave_holes_out():
    mask = np.zeros((40 * SUPERSAMPLING, 40 * SUPERSAMPLING), np.uint8)
    cv2.circle(mask, (80, 80), 70, 1, -1)
    cv2.circle(mask, (60, 80), 15, 0, -1)
    cv2.circle(mask, (110, 90), 12, 0, -1)
    expected = cv2.resize(255 * mask, (40, 40), interpolation=cv2.INTER_AREA) > 127
    rle = mask_util.merge(mask_util.frPyObjects(polygons_of(mask), 40, 40))
    assert iou(mask_util.decode(rle).astype(bool), expected) > 0.95


# -- Cityscapes' layout


def test_cityscapes_layout(shapes):
    from cityscapesscripts.helpers.csHelpers import getCoreImageFileName, getCsFileInfo
    from cityscapesscripts.helpers.labels import name2label

    root, road = shapes / "cityscapes", name2label["road"].id
    for split, count in (("train", 2), ("val", 4)):
        images = sorted((root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
        assert len(images) == count
        assert len(list((root / "gtFine" / split).glob("*/*"))) == 3 * count
        for index, path in enumerate(images):
            info = getCsFileInfo(str(path))
            assert (info.city, int(info.sequenceNb)) == (path.parent.name, index)
            labels = f"{root}/gtFine/{split}/{info.city}/{getCoreImageFileName(str(path))}_gtFine"
            content = json.loads(Path(f"{labels}_polygons.json").read_text())
            label_ids = cv2.imread(f"{labels}_labelIds.png", -1)
            instance_ids = cv2.imread(f"{labels}_instanceIds.png", -1)
            assert filecmp.cmp(path, shapes / split / f"{index:06d}.png", shallow=False)
            assert (content["imgHeight"], content["imgWidth"]) == label_ids.shape == (64, 64)
            assert label_ids.dtype == np.uint8 and instance_ids.dtype == np.uint16

            scene = draw_scene(0, split, index, OPTIONS)
            background, *things = content["objects"]
            assert background["label"] == "road"
            drawn, numbers = np.full((64, 64), road), {}
            for order, thing in enumerate(things):
                # Detectron2 skips an object that has a key "deleted", whatever its value.
                assert thing.keys() == {"label", "polygon"}
                label = name2label[thing["label"]]
                assert label.hasInstances and not label.ignoreInEval
                assert label.trainId - name2label["person"].trainId == scene.shapes[order].label
                number = numbers[label.id] = numbers.get(label.id, -1) + 1
                mask = instance_ids == 1000 * label.id + number
                assert iou(mask, pixels_seen(scene, order)) > 0.75
                drawn[mask] = 1000 * label.id + number
            assert len(things) == len(scene.shapes) and np.array_equal(instance_ids, drawn)
            assert np.array_equal(label_ids, np.where(drawn == road, road, drawn // 1000))


# -- the folder


def test_existing_data_set_is_kept_unless_told_otherwise(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    command = ["--output", "~/s", "--train", "1", "--val", "1", "--size", "64"]
    times = []
    for message in ("is complete", "is there already: kept"):
        main(command)
        assert message in capsys.readouterr().out
        times.append([(tmp_path / "s" / x).stat().st_mtime_ns for x in files_of(tmp_path / "s")])
    assert times[0] == times[1]
    with pytest.raises(SystemExit, match=r"size \[64, 64\] instead of \[64, 96\].*--overwrite"):
        main([*command, "96"])
    main([*command, "96", "--overwrite"])
    assert cv2.imread(str(tmp_path / "s" / "val" / "000000.png")).shape == (64, 96, 3)
    assert visible(tmp_path) == ["s"]


def test_foreign_folder_is_never_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="is not a Shapes data set"):
        generate(tmp_path / "photos", overwrite=True, **TINY)
    assert files_of(tmp_path) == [Path("photos/a.png")]


def test_exception_leaves_nothing_new_and_the_old_as_it_was(tmp_path, monkeypatch):
    def interrupted(seed, split, index, options):
        if (split, index) == ("val", 1):
            raise KeyboardInterrupt
        return draw_scene(seed, split, index, options)

    generate(tmp_path / "old", **TINY)
    generate(tmp_path / "reference", **TINY)
    monkeypatch.setattr(generator, "draw_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "new", **TINY)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "old", seed=1, overwrite=True, **TINY)
    assert sorted(visible(tmp_path)) == ["old", "reference"]
    assert same_content(tmp_path / "old", tmp_path / "reference")


def test_killed_run_leaves_no_data_set_and_the_next_one_cleans_up(tmp_path):
    output = tmp_path / "shapes"
    script = ROOT / "projects" / "Shapes" / "generate.py"
    process = subprocess.Popen(
        [sys.executable, script, "--output", output, "--val", "100000", "--size", "64"],
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob(".shapes.partial/train/*1.png")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(Timeout):
        generate(output, **TINY)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert sorted(os.listdir(tmp_path)) == [".shapes.lock", ".shapes.partial"]
    generate(output, **TINY)
    generate(tmp_path / "reference", **TINY)
    assert sorted(visible(tmp_path)) == ["reference", "shapes"]
    assert same_content(output, tmp_path / "reference")


@pytest.mark.parametrize(
    "argument",
    [
        {"difficulty": 1.5},
        {"hue_spread": 0.0},
        {"classes": 9},
        {"min_radius": 9.0, "max_radius": 8.0},
        {"max_radius": 65.0},
        {"min_radius": 1.0},
        {"min_shapes": 0},
        {"min_shapes": 5, "max_shapes": 4},
        {"max_shapes": 101},
        {"size": (8, 64)},
        {"seed": -1},
        {"format": "voc"},
        {"min_radius": 40.0, "max_radius": 40.0, "min_shapes": 50, "max_shapes": 50},
    ],
    ids=lambda argument: "-".join(argument),
)
def test_impossible_arguments_are_refused(tmp_path, argument):
    with pytest.raises(ValueError, match=next(iter(argument)).split("_")[-1]):
        generate(tmp_path / "shapes", **{**TINY, **argument})
    assert visible(tmp_path) == []
