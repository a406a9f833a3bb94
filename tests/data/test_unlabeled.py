"""Images without labels: where they come from, in which batches, and what is refused."""

import itertools
import json
import logging

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.utils import comm
from helpers import TEST_SCENES, coco_format
from PIL import Image

from msad_kd.data.images import image_size, read_image
from msad_kd.data.loader import build_train_loader
from msad_kd.data.mapper import build_mapper
from msad_kd.data.unlabeled import IGNORED, unlabeled_dicts
from msad_kd.utils.errors import InputError

JITTER = ["INPUT.JITTER.SIZE", 32, "INPUT.JITTER.SCALES", [0.5, 1.5]]


@pytest.fixture
def bare(data):
    """bare(count): options that add a folder, the validation images, to a student's batches."""

    def options(count=2, *more):
        entries = [*coco_format(data, "tiny"), {"name": "bare", "images": str(data / "val")}]
        names = ["DATASETS.COCO_FORMAT", entries, "DATASETS.UNLABELED", ["bare"]]
        return [*names, "SOLVER.UNLABELED_PER_BATCH", count, *more]

    return options


def samples(cfg, count, start=0):
    loader = build_train_loader(cfg, build_mapper(cfg, is_train=True))
    iterator = iter(loader)
    loader.start = start
    drawn = list(itertools.islice(iterator, count))
    iterator.close()
    return drawn


def same(one, other):
    return one["file_name"] == other["file_name"] and torch.equal(one["image"], other["image"])


def test_a_folder_is_a_data_set_of_its_images_in_order(data, bare, config, tmp_path):
    config("student", *bare())
    dicts = DatasetCatalog.get("bare")
    assert [x["file_name"] for x in dicts] == sorted(map(str, (data / "val").glob("*.png")))
    assert [x["image_id"] for x in dicts] == list(range(TEST_SCENES))
    assert all((x["height"], x["width"]) == (64, 96) and "annotations" not in x for x in dicts)
    assert MetadataCatalog.get("bare").image_root == str(data / "val")
    photo, turn = Image.new("RGB", (30, 20)), Image.Exif()
    for turn[0x0112], name in itertools.product((1, 3, 6), ("photo.jpg", "photo.tif")):
        photo.save(tmp_path / name, exif=turn)
        expected = (30, 20) if turn[0x0112] == 6 else (20, 30)
        assert image_size(str(tmp_path / name)) == expected
        assert read_image(str(tmp_path / name)).shape[:2] == expected


def test_labels_that_are_not_used_may_be_of_any_classes(config, data, tmp_path):
    content = json.loads((data / "annotations" / "instances_val.json").read_text())
    content["annotations"] = [{**x, "score": 0.9} for x in content["annotations"]]
    for category in content["categories"]:
        category["name"] += " of others"
    (tmp_path / "others.json").write_text(json.dumps(content))
    entry = {"name": "others", "json": str(tmp_path / "others.json"), "images": str(data / "val")}
    keys = ["DATASETS.COCO_FORMAT", [*coco_format(data, "tiny"), entry]]
    keys += ["DATASETS.UNLABELED", ["others"], "SOLVER.UNLABELED_PER_BATCH", 1]
    build_train_loader(config("student", *keys), None)
    with pytest.raises(InputError, match="'others'.* has classes that .* lacks"):
        build_train_loader(config("student", *keys, "KD.UNLABELED.PSEUDO_LABELS", True), None)


def test_they_follow_the_labelled_samples_which_stay_the_same(config, bare):
    found = samples(config("student", *JITTER, *bare(3)), 6)
    expected = samples(config("student", *JITTER), 6)
    for batch, labeled in zip(found, expected, strict=True):
        assert len(batch) == 5 and all(map(same, batch, labeled))
        assert [x.get("unlabeled") for x in batch] == [None, None, True, True, True]
        assert all("instances" not in x and x["image_hr"].shape[1] == 64 for x in batch[2:])
    seen = [x["file_name"] for batch in found for x in batch[2:]]
    assert len(set(seen[:3])) == TEST_SCENES and "/val/" in seen[0]
    again = samples(config("student", *JITTER, *bare(3), "DATALOADER.NUM_WORKERS", 1), 2, start=4)
    for batch, other in zip(found[4:], again, strict=True):
        assert all(map(same, batch, other))


def test_processes_share_them_and_another_number_of_processes_scales_them(
    config, bare, monkeypatch
):
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    seen = []
    for rank in (0, 1):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        ((_, sample),) = samples(config("student", *bare(2)), 1)
        seen.append(sample["file_name"])
    assert len(set(seen)) == 2
    keys = ["SOLVER.REFERENCE_WORLD_SIZE", 1, "SOLVER.STEPS", ()]
    assert config("student", *bare(3), *keys).SOLVER.UNLABELED_PER_BATCH == 6


def test_only_students_have_them(config, bare, caplog):
    ((*batch,),) = samples(config("lr", *bare()), 1)
    assert len(batch) == 2 and "DATASETS.UNLABELED is not used" in caplog.text


def test_a_student_that_learns_nothing_from_them_does_without(config, bare, caplog):
    for keys in (["KD.UNLABELED.WEIGHT", 0.0], ["KD.UNLABELED.PSEUDO_LABELS", True]):
        ((*batch,),) = samples(config("student", *bare(), "KD.LOSSES", [], *keys), 1)
        assert len(batch) == 4 and "DATASETS.UNLABELED is not used" not in caplog.text
    ((*batch,),) = samples(config("student", *bare(), "KD.LOSSES", []), 1)
    assert len(batch) == 2 and "is not used: nothing is learned from it" in caplog.text


@pytest.fixture
def scored(data, bare, tmp_path):
    """scored(score of the first annotation, ...): options with labels of 0.9, 0.4 and 0.1."""

    def options(score, *more):
        content = json.loads((data / "annotations" / "instances_val.json").read_text())
        first = content["images"][0]["id"]
        mine = [x for x in content["annotations"] if x["image_id"] == first]
        scores = (0.9, 0.4, 0.1) if score is None else (score,)
        content["annotations"] = [{**mine[0], "id": i + 1} for i in range(4)]
        for entry, number in zip(content["annotations"], scores):
            entry["score"] = number
        (tmp_path / "labels.json").write_text(json.dumps(content))
        keys = bare(2, *more)
        keys[1][-1]["json"] = str(tmp_path / "labels.json")
        return keys

    return options


def test_of_a_file_only_annotations_with_scores_are_read(config, scored, caplog):
    pseudo = ["KD.UNLABELED.PSEUDO_LABELS", True]
    with caplog.at_level(logging.INFO):
        first, *others = unlabeled_dicts(config("student", *scored(None, *pseudo)))
    assert "bare' of DATASETS.UNLABELED: 1 annotations are not used" in caplog.text
    kind = DatasetCatalog.get("bare")[0]["annotations"][0]["category_id"]
    assert [x["category_id"] for x in first["annotations"]] == [kind, IGNORED]
    assert [x["annotations"] for x in others] == [[]] * (TEST_SCENES - 1)
    for scores, kinds in (([0.3], [kind, kind]), ([0.95] * 8, [IGNORED] * 2)):
        keys = [*scored(None, *pseudo), "KD.UNLABELED.SCORE", scores]
        found = unlabeled_dicts(config("student", *keys))
        assert [x["category_id"] for x in found[0]["annotations"]] == kinds
    unasked = unlabeled_dicts(config("student", *scored(None)))
    assert all("annotations" not in x for x in unasked)
    batches = samples(config("student", *scored(None, *pseudo)), 3)
    labels = [x["instances"].gt_classes.tolist() for batch in batches for x in batch[2:]]
    assert [kind, IGNORED] in labels and [] in labels


def test_ground_truth_of_any_classes_is_not_read_and_stays(config, monkeypatch):
    entry = {"file_name": "a.png", "sem_seg_file_name": "b.png", "annotations": [{}]}
    monkeypatch.setitem(DatasetCatalog.data, "others", lambda: [entry])
    metadata = Metadata(name="others", thing_classes=["whale"])
    monkeypatch.setitem(MetadataCatalog.data, "others", metadata)
    keys = ["DATASETS.UNLABELED", ["others"], "SOLVER.UNLABELED_PER_BATCH", 2]
    found = unlabeled_dicts(config("student", *keys, "KD.UNLABELED.PSEUDO_LABELS", True))
    assert found == [{"file_name": "a.png"}] and entry["annotations"] == [{}]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["SOLVER.UNLABELED_PER_BATCH", 0], r"UNLABELED is \['bare'\] and .*PER_BATCH is 0"),
        (["DATASETS.UNLABELED", []], r"UNLABELED is \[\] and SOLVER.UNLABELED_PER_BATCH is 2"),
        (["DATASETS.UNLABELED", ["bear"]], "DATASETS.UNLABELED: 'bear' is not.*mean bare"),
        (["MODEL.LOAD_PROPOSALS", True], "images of DATASETS.UNLABELED have no proposals"),
        (["DATASETS.TRAIN", ["bare"]], "DATASETS.TRAIN: 'bare' is a folder .* without labels"),
        (["DATASETS.TEST", ["bare"]], "DATASETS.TEST: 'bare' is a folder .* without labels"),
        (["KD.UNLABELED.SCORE", [0.5, 0.6]], "SCORE has 2 numbers; .* 8 classes"),
        (["KD.UNLABELED.IGNORE_SCORE", 0.6], "IGNORE_SCORE is 0.6, above 0.5"),
        (["SOLVER.REFERENCE_WORLD_SIZE", 2, "SOLVER.UNLABELED_PER_BATCH", 3], "PER_BATCH is 3.*2"),
    ],
)
def test_keys_that_do_not_fit(config, bare, keys, words):
    with pytest.raises(InputError, match=words):
        config("student", *bare(), *keys)


def test_data_that_are_refused(config, bare, scored, monkeypatch, tmp_path):
    def read(*keys):
        return lambda: samples(config("student", *keys), 1)

    empty, broken = tmp_path / "empty", tmp_path / "broken"
    for folder in (empty, broken):
        folder.mkdir()
    for name in ("notes.txt", "notes.pdf"):  # which Pillow writes, but does not read
        (empty / name).write_text("no image")
    (broken / "a.png").write_text("no image")
    pseudo, drop = ["KD.UNLABELED.PSEUDO_LABELS", True], ["DATASETS.INVALID_ANNOTATIONS", "drop"]
    for folder, words, more in (
        (tmp_path / "gone", "image folder '.*gone' does not exist", []),
        (empty, "'empty': the folder '.*empty' has no images", []),
        (broken, "image '.*a.png' cannot be read .it is no image.; .*1 such images", []),
        (broken, "'broken': the folder '.*broken' has no images", drop),
    ):
        keys = bare(2, *more)
        keys[1][-1] = {"name": folder.name, "images": str(folder)}
        keys[3] = [folder.name]
        with pytest.raises(InputError, match=words):
            read(*keys)()
    for score in (1.5, "high", True):
        DatasetCatalog.data.pop("bare", None)
        with pytest.raises(InputError, match="'bare' of DATASETS.UNLABELED: a score is .* 0 to 1"):
            unlabeled_dicts(config("student", *scored(score, *pseudo)))
    DatasetCatalog.data.pop("bare", None)
    points = ["MODEL.KEYPOINT_ON", True]
    with pytest.raises(InputError, match="a label has no keypoints"):
        unlabeled_dicts(config("student", *scored(None, *pseudo), *points))
    DatasetCatalog.data.pop("bare", None)
    MetadataCatalog.data.pop("bare", None)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    with pytest.raises(InputError, match="UNLABELED_PER_BATCH is 3, which 2 processes"):
        read(*bare(3))()
