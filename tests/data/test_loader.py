"""Training batches depend on (seed, rank, iteration) alone; errors name unreadable images."""

import itertools
import pickle
import random
import resource
import shutil

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.utils import comm
from helpers import coco_format

from msad_kd.data.loader import CheckedMapper, build_test_loader, build_train_loader
from msad_kd.data.mapper import build_mapper
from msad_kd.utils.errors import InputError, input_error_of
from msad_kd.utils.seed import seed_all

SAMPLERS = ["TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler"]


def light(entry):
    """A cheap mapper: the image's name, and a number from every generator."""
    return entry["file_name"], random.random(), np.random.rand(), torch.rand(1).item()


def batches(cfg, count, start=0, mapper=light):
    loader = build_train_loader(cfg, mapper)
    # The iterator is asked for before the start is known, as Detectron2 0.6 does it.
    iterator = iter(loader)
    loader.start = start
    drawn = list(itertools.islice(iterator, count))
    iterator.close()  # which ends the workers
    return drawn


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_resumed_loader_goes_on_with_the_same_batches(config, sampler):
    cfg = config("lr", "DATALOADER.SAMPLER_TRAIN", sampler, "DATALOADER.RANDOM_SUBSET_RATIO", 0.7)
    whole = batches(cfg, 9)
    for start in (1, 5):
        assert batches(cfg, 9 - start, start) == whole[start:]
    assert len({draw for batch in whole for draw in batch}) == 18  # all draws differ
    cfg.SEED += 1
    assert batches(cfg, 9) != whole


def test_mapped_images_depend_on_neither_start_nor_workers(student_config):
    crop = ["INPUT.CROP.ENABLED", True, "INPUT.MIN_SIZE_TRAIN", (29, 32, 41)]
    found = []
    for workers, start in ((0, 0), (0, 2), (2, 0), (2, 2)):
        cfg = student_config("DATALOADER.NUM_WORKERS", workers, *crop)
        mapper = build_mapper(cfg, is_train=True)
        found.append(batches(cfg, 5 - start, start, mapper)[2 - start :])
    for other in found[1:]:
        for one, two in zip(itertools.chain(*found[0]), itertools.chain(*other), strict=True):
            assert one["file_name"] == two["file_name"]
            assert torch.equal(one["image"], two["image"])
            assert torch.equal(one["image_hr"], two["image_hr"])
    assert len({entry["image"].shape for batch in found[0] for entry in batch}) > 1


def test_ranks_differ(config, monkeypatch):
    cfg = config("lr")
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    found = []
    for rank in (0, 1):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        found.append([draw for batch in batches(cfg, 6) for draw in batch])
    assert len(found[0]) == len(found[1]) == 6  # one image each
    assert not {draw[1:] for draw in found[0]} & {draw[1:] for draw in found[1]}
    for step in range(0, 6, 3):  # together they see every image once
        seen = {draw[0] for ranks in found for draw in ranks[step : step + 3]}
        assert len(seen) == 6


@pytest.mark.parametrize("workers", [0, 1])
def test_global_generators_are_untouched(config, workers):
    cfg = config("lr", "DATALOADER.NUM_WORKERS", workers)
    seed_all(1)
    expected = light({"file_name": ""})
    seed_all(1)
    batches(cfg, 4)
    assert light({"file_name": ""}) == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_may_hand_over_many_tensors(config, workers):
    """Each is an open file or two, of which many systems allow 1,024 until they are asked."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (few := before[1] // 2, before[1]))
    try:
        batches(config("lr", "DATALOADER.NUM_WORKERS", workers), 1)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == (before[1] if workers else few)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("sized", [True, False])
def test_a_batch_is_all_portrait_or_all_landscape(config, monkeypatch, tmp_path, sized):
    def orientation(entry):
        return int(entry["file_name"][-6:-4]) % 3 > 0

    dicts = []
    for i in range(12):
        file, width = str(tmp_path / f"{i:02}.png"), 50 if i % 3 else 30
        dicts.append({"file_name": file, "annotations": [0]})
        if sized:
            dicts[i] |= {"height": 40, "width": width}
        elif i != 9:  # which is missing: that is the mapper's affair
            cv2.imwrite(file, np.zeros((40, width), np.uint8))
    monkeypatch.setitem(DatasetCatalog.data, "portraits", lambda: dicts)
    keys = ["DATASETS.TRAIN", ("portraits",), "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False]
    keys += ["MODEL.MASK_ON", False]
    found = batches(config("lr", *keys), 12, mapper=orientation)
    assert {frozenset(batch) for batch in found} == {frozenset([True]), frozenset([False])}
    ungrouped = config("lr", *keys, "DATALOADER.ASPECT_RATIO_GROUPING", False)
    assert frozenset([True, False]) in map(frozenset, batches(ungrouped, 12, mapper=orientation))


def test_a_refused_sample_is_replaced_unless_all_are_refused(config):
    refused = []

    def picky(entry, end="0.png"):
        if entry["file_name"].endswith(end):
            refused.append(entry)
            return None
        return light(entry)

    found = batches(config("lr"), 6, mapper=picky)
    assert refused and all(len(batch) == 2 for batch in found)
    assert found == batches(config("lr"), 6, mapper=picky)
    few = ["DATALOADER.SAMPLER_TRAIN", SAMPLERS[2], "DATALOADER.RANDOM_SUBSET_RATIO", 0.5]
    names = {sample[0] for batch in batches(config("lr", *few), 20) for sample in batch}
    left = {name for name in names if not name.endswith(min(names)[-5:])}
    found = batches(config("lr", *few), 20, mapper=lambda x: picky(x, min(names)[-5:]))
    assert {sample[0] for batch in found for sample in batch} == left
    with pytest.raises(InputError, match="refused 100 samples in a row"):
        batches(config("lr"), 1, mapper=lambda entry: None)


def test_mappers_can_be_pickled_for_spawned_workers(student_config):
    mapper = CheckedMapper(build_mapper(student_config(), is_train=True))
    assert pickle.loads(pickle.dumps(mapper)).mapper.augmentations.frame == "lr"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["DATASETS.TRAIN", ()], "no data set is named.*DATASETS.TRAIN"),
        (["DATASETS.TRAIN", ("bare",)], "data set bare: No valid data found"),
        (["DATALOADER.SAMPLER_TRAIN", "Fancy"], "'Fancy' is unknown; use TrainingSampler"),
        (["DATASETS.TRAIN", ("half",)], "data set half: one of the dicts .* has no 'annotations'"),
        (
            ["DATALOADER.SAMPLER_TRAIN", SAMPLERS[2], "DATALOADER.RANDOM_SUBSET_RATIO", 0.1],
            "RANDOM_SUBSET_RATIO is 0.1, which of 6 images leaves none",
        ),
        (["SOLVER.IMS_PER_BATCH", 3], "IMS_PER_BATCH is 3, which 2 processes"),
    ],
)
def test_mistakes(config, monkeypatch, keys, words):
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    bare = [{"file_name": "a.png", "annotations": []}]
    half = [{"file_name": "a.png", "annotations": [{"iscrowd": 0}]}, {"file_name": "b.png"}]
    monkeypatch.setitem(DatasetCatalog.data, "bare", lambda: bare)
    monkeypatch.setitem(DatasetCatalog.data, "half", lambda: half)
    with pytest.raises(InputError, match=words):
        build_train_loader(config("lr", *keys), light)


def test_images_with_too_few_keypoints_are_left_out(config, monkeypatch):
    points, size = {"with": [1.0, 1.0, 2] * 3, "without": [0.0] * 9}, {"height": 4, "width": 4}
    dicts = [
        {"file_name": name, **size, "annotations": [{"keypoints": values, "iscrowd": 0}]}
        for name, values in points.items()
    ]
    monkeypatch.setitem(DatasetCatalog.data, "people", lambda: dicts)
    options = ["MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 3]
    options += ["MODEL.MASK_ON", False]
    found = batches(config("lr", "DATASETS.TRAIN", ("people",), *options), 2)
    assert {name for batch in found for name, *_ in batch} == {"with"}


SPOILS = {
    "no image": lambda file: file.write_text("<html>404 Not Found</html>"),
    "another size": lambda file: cv2.imwrite(str(file), np.zeros((50, 50, 3), np.uint8)),
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_an_unreadable_image_is_named_whatever_the_mapper(config, data, tmp_path, spoil):
    folder, names = tmp_path / "spoiled", (str(tmp_path),)
    shutil.copytree(data, folder)
    victim = folder / "train" / "000002.png"
    spoil(victim)
    entry = {**coco_format(folder, "spoiled")[0], "name": names[0]}  # a name of this test alone
    keys = ["DATASETS.COCO_FORMAT", [entry], "DATASETS.TRAIN", names, "DATASETS.TEST", names]
    cfg = config("lr", *keys)
    for read in (
        lambda: batches(cfg, 3, mapper=DatasetMapper(cfg, True)),
        lambda: list(build_test_loader(cfg, names[0], DatasetMapper(cfg, False))),
    ):
        with pytest.raises(InputError, match=f"image '{victim}' (cannot be read|has 50 x 50 px)"):
            read()
    cfg = config("lr", *keys, "DATALOADER.NUM_WORKERS", 1)  # which passes on the error's text
    with pytest.raises(Exception, match="in DataLoader worker") as failed:
        batches(cfg, 3, mapper=DatasetMapper(cfg, True))
    assert input_error_of(failed.value).startswith(f"image '{victim}' ")


def test_data_of_panoptic_segmentation(config, monkeypatch):
    dicts = [{"file_name": __file__, "height": 9, "width": 9}] * 2
    monkeypatch.setitem(DatasetCatalog.data, "panoptic", lambda: dicts)
    cfg = config("lr", "DATASETS.TRAIN", ("panoptic",))
    assert build_train_loader(cfg, light)  # a user's mapper may make the objects
    with pytest.raises(InputError, match="data set panoptic: it has no boxes; is it one of panop"):
        build_train_loader(cfg, build_mapper(cfg, is_train=True))
