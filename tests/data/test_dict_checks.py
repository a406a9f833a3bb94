"""Checks before a training starts: files, masks and shapes of images; RLEs beside polygons."""

import copy
import logging
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
from annotation_files import HEIGHT, valid_content
from detectron2.data import DatasetMapper
from pycocotools import mask as mask_util

from msad_kd.data.annotations import read_annotations
from msad_kd.data.annotations.segmentations import mask_areas, run_lengths
from msad_kd.data.coco_format import load_checked
from msad_kd.data.dict_checks import accept_rles, check_masks, check_shapes
from msad_kd.data.mapper import build_mapper
from msad_kd.engine.trainer import KDTrainer
from msad_kd.utils.errors import InputError


def test_a_pipe_is_no_image_and_no_annotation_file(files, tmp_path):
    source = files(valid_content())
    (tmp_path / "9.png").unlink()
    os.mkfifo(tmp_path / "9.png")
    with pytest.raises(
        InputError, match="1 of the 2 images in .* are missing or no regular files.*9.png"
    ):
        load_checked(*source, "pipe")
    (tmp_path / "9.png").unlink()
    with pytest.raises(InputError, match="1 of the 2 images in .* are missing"):
        load_checked(*source, "pipe")
    (tmp_path / "9.png").symlink_to(tmp_path / "7.png")
    assert len(load_checked(*source, "link")) == 2
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(InputError, match="pipe.json' is no regular file"):
        load_checked(str(tmp_path / "pipe.json"), source[1], "pipe")


@pytest.mark.parametrize("file", ["\0.png", "x" * 5000, "\ud800.png", "../7", "sub/7.png"])
def test_names_that_no_file_can_have(file, files):
    content = valid_content()
    content["images"][0]["file_name"] = file
    with pytest.raises(InputError, match="1 of the 2 images in .* are missing"):
        load_checked(*files(content), "names")


def test_an_rle_is_checked_without_decoding_it(files):
    huge = 100_000
    content = valid_content()
    for counts in (
        [huge * huge],
        [0, huge * huge],
        "0" * 40,
        mask_util.encode(np.ones((9, 9), np.uint8, order="F"))["counts"].decode(),
    ):
        mask = {"size": [huge, huge], "counts": counts}
        for image in (
            content["images"],
            [{**x, "height": huge, "width": huge} for x in content["images"]],
        ):
            spoiled = {**copy.deepcopy(content), "images": image}
            spoiled["annotations"][0]["segmentation"] = mask
            with pytest.raises(InputError, match="size should be|Pillow opens"):
                read_annotations(files(spoiled)[0], "huge")


def test_run_lengths_are_those_of_pycocotools():
    rng = np.random.default_rng(0)
    masks = [
        rng.random((rng.integers(1, 60), rng.integers(1, 60))) < rng.random() ** 2
        for _ in range(300)
    ]
    rles = [mask_util.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks]
    counts = [x["counts"] if i % 2 else x["counts"].decode() for i, x in enumerate(rles)]
    pixels = np.array([mask.size for mask in masks])
    assert mask_areas(counts, pixels).tolist() == [mask.sum() for mask in masks]
    assert np.isnan(mask_areas(counts, pixels + 1)).all()
    runs, numbers = run_lengths([[3, 4], counts[0], None])
    alone, _ = run_lengths(counts[:1])
    assert numbers.tolist() == [2, len(alone), -1] and runs.tolist() == [3, 4, *alone]


def test_polygons_and_rles_are_trained_on_together(files, config, caplog):
    caplog.set_level(logging.INFO)
    dicts = load_checked(*files(valid_content()), "both")
    cfg = config("lr", "INPUT.RANDOM_FLIP", "none", "INPUT.MIN_SIZE_TRAIN", (HEIGHT,))
    assert cfg.MODEL.MASK_ON
    polygons = [d for d in dicts if d["image_id"] == 7]  # image 9 has a crowd in RLE, too
    for chosen, kind in ((polygons, "PolygonMasks"), (dicts, "BitMasks")):
        mapper = DatasetMapper(cfg, True)
        accept_rles(mapper, chosen, "both")
        mapped = [mapper(copy.deepcopy(d))["instances"] for d in chosen]
        assert {type(x.gt_masks).__name__ for x in mapped} == {kind}
        assert [len(x) for x in mapped] == [2, 1][: len(mapped)]
    assert caplog.text.count("'both' has masks in RLE") == 1
    assert mapped[1].gt_masks.tensor.sum() == 200


def test_objects_without_masks(files):
    content = valid_content()
    del content["annotations"][3]["segmentation"]  # a crowd is not trained on
    check_masks(load_checked(*files(content), "some"), "some")
    del content["annotations"][1]["segmentation"]
    words = "'some': 1 of 3 annotations have no .* number 2 of image '.*7.png'.*MASK_ON False"
    with pytest.raises(InputError, match=words):
        check_masks(load_checked(*files(content), "some"), "some")


@pytest.mark.parametrize("size", [(4000, 3), (3, 4000), (20000, 10)])
def test_narrow_images(size, caplog):
    narrow = {"file_name": "narrow.png", "width": size[0], "height": size[1]}
    fine = [{"file_name": "fine.png", "width": 2000, "height": 3}, {"file_name": "unknown.png"}]
    mapper, large = SimpleNamespace(longest_side=400), SimpleNamespace(longest_side=4000)
    words = f"'mine': 1 of 3 .*'narrow.png', {size[0]} x {size[1]} px; remove them"
    for drop, remedy in ((False, ", or set DATASETS.INVALID_ANNOTATIONS drop$"), (None, "$")):
        with pytest.raises(InputError, match=words + remedy):
            check_shapes([*fine, narrow], "mine", mapper, drop)
    assert check_shapes([*fine, narrow], "mine", mapper, True) == fine
    assert "narrow.png" in caplog.text
    for other in (large, len):  # a mapper of the user's is not asked
        assert check_shapes([narrow], "mine", other, False) == [narrow]
    with pytest.raises(InputError, match="remove them$"):
        check_shapes([narrow], "mine", mapper, True)


@pytest.mark.parametrize(
    ("role", "options", "train", "test"),
    [
        ("lr", ["INPUT.MAX_SIZE_TRAIN", 300, "INPUT.MAX_SIZE_TEST", 80], 300, 80),
        ("teacher", ["INPUT.MAX_SIZE_TRAIN", 301, "INPUT.MAX_SIZE_TEST", 80], 151, 40),
        ("student", ["INPUT.JITTER.SIZE", 200, "INPUT.JITTER.SCALES", [0.1, 2.0]], 20, None),
        ("lr", ["INPUT.MIN_SIZE_TRAIN", (0,), "INPUT.MIN_SIZE_TEST", 0], math.inf, math.inf),
    ],
)
def test_the_longest_side_is_that_of_the_smallest_image(config, role, options, train, test):
    cfg = config(role, *options)
    assert build_mapper(cfg, True).longest_side == train
    assert build_mapper(cfg, False).longest_side == (test or cfg.INPUT.MAX_SIZE_TEST)


def test_training_says_at_the_start_what_it_cannot_learn_from(files, config):
    content = valid_content()
    del content["annotations"][1]["segmentation"]
    entry = dict(zip(("json", "images"), files(content)))
    sets = ["DATASETS.COCO_FORMAT", [{"name": "bare", **entry}], "DATASETS.TRAIN", ("bare",)]
    # Nothing is compared with a test set's classes.
    cfg = config("lr", *sets, "DATASETS.TEST", ())
    with pytest.raises(InputError, match="'bare': 1 of 3 annotations have no segmentation"):
        KDTrainer.build_train_loader(cfg)
    content["images"][0] |= {"width": 4000, "height": 3}
    content["annotations"] = content["annotations"][2:]
    files(content)
    cfg = config("lr", *sets, "DATASETS.TEST", ("bare",), "DATASETS.INVALID_ANNOTATIONS", "drop")
    cfg.INPUT.MAX_SIZE_TRAIN = cfg.INPUT.MAX_SIZE_TEST = 600
    assert len(KDTrainer.build_train_loader(cfg).dataset) == 1
    with pytest.raises(InputError, match="'bare': 1 of 2 images are so narrow.*remove them$"):
        KDTrainer.build_test_loader(cfg, "bare")
