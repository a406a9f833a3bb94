"""What is said at the start of a data set's files, masks and shapes; RLEs beside polygons."""

import copy
import logging
import os

import numpy as np
import pytest
from annotation_files import HEIGHT, valid_content
from detectron2.data import DatasetMapper
from pycocotools import mask as mask_util

from msad_kd.data.annotations import read_annotations
from msad_kd.data.annotations.segmentations import mask_areas, run_lengths
from msad_kd.data.coco_format import load_checked
from msad_kd.data.dict_checks import accept_rles, check_masks, check_shapes
from msad_kd.data.mapper import longest_side
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
    fine = {"file_name": "fine.png", "width": 2000, "height": 3}
    with pytest.raises(
        InputError, match=f"'mine': 1 of 2 .*'narrow.png', {size[0]} x {size[1]} px"
    ):
        check_shapes([fine, narrow], "mine", 400, "error")
    assert check_shapes([fine, narrow], "mine", 400, "drop") == [fine]
    assert "narrow.png" in caplog.text
    assert check_shapes([narrow], "mine", 4000, "error") == [narrow]
    with pytest.raises(InputError):
        check_shapes([narrow], "mine", 400, "drop")


def test_the_longest_side_is_that_of_the_smallest_image(config):
    assert longest_side(config("lr", "INPUT.MAX_SIZE_TRAIN", 300)) == 300
    assert longest_side(config("teacher", "INPUT.MAX_SIZE_TRAIN", 300)) == 150
    jitter = ("INPUT.JITTER.SIZE", 200, "INPUT.JITTER.SCALES", [0.1, 2.0])
    assert longest_side(config("student", *jitter)) == 20


def test_training_says_at_the_start_what_it_cannot_learn_from(files, config):
    content = valid_content()
    del content["annotations"][1]["segmentation"]
    entry = dict(zip(("json", "images"), files(content)))
    sets = ["DATASETS.COCO_FORMAT", [{"name": "bare", **entry}], "DATASETS.TRAIN", ("bare",)]
    # Nothing is compared with a test set's classes.
    cfg = config("lr", *sets, "DATASETS.TEST", ())
    with pytest.raises(InputError, match="'bare': 1 of 3 annotations have no segmentation"):
        KDTrainer.build_train_loader(cfg)
    cfg = config(
        "lr", *sets, "DATASETS.TEST", (), "MODEL.MASK_ON", False, "INPUT.MAX_SIZE_TRAIN", 0
    )
    with pytest.raises(InputError, match="'bare': 2 of 2 images are so narrow"):
        KDTrainer.build_train_loader(cfg)
    with pytest.raises(InputError, match="INVALID_ANNOTATIONS is 'skip'"):
        config("lr", "DATASETS.INVALID_ANNOTATIONS", "skip")
