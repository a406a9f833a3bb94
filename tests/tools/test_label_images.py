"""tools/label_images.py: a model's detections as a file in COCO format."""

import json
import shutil
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.structures import pairwise_iou
from helpers import TEST_SCENES, build_student, coco_format, load_tool, run_script

from msad_kd import KDTrainer
from msad_kd.config.build import build_config
from msad_kd.data.annotations import check_content
from msad_kd.data.loader import build_train_loader
from msad_kd.data.mapper import build_mapper

tool = load_tool("label_images")


@pytest.fixture
def arguments(config_files, teacher_weights, tmp_path):
    def words(*more, name="labels.json", which=("--dataset", "tiny_val"), **options):
        options = {"config-file": config_files["teacher"], "weights": teacher_weights, **options}
        options["output"] = tmp_path / name
        pairs = [x for key, value in options.items() for x in (f"--{key}", str(value))]
        return [*pairs, *map(str, which), *map(str, more)]

    return words


@contextmanager
def interrupted(count):
    """Stop models like by Ctrl-C after so many images."""
    load = KDTrainer.load_model

    def stopping(*args):
        model, calls = load(*args), []
        forward = model.forward

        def counted(batch):
            calls.append(1)
            if len(calls) > count:
                raise KeyboardInterrupt
            return forward(batch)

        model.forward = counted
        return model

    with mock.patch.object(KDTrainer, "load_model", stopping):
        yield


def partial_of(folder):
    (partial,) = folder.glob("labels_*.partial")
    return partial


def test_a_folder_by_a_process(arguments, data, tmp_path):
    folder = data / "val"
    run_script("tools/label_images.py", *arguments(which=("--images", folder), **{"batch-size": 2}))
    content = json.loads((tmp_path / "labels.json").read_text())
    assert list(tmp_path.iterdir()) == [tmp_path / "labels.json"]
    assert [x["file_name"] for x in content["images"]] == sorted(x.name for x in folder.iterdir())
    assert [x["id"] for x in content["categories"]] == list(range(1, 9))
    labels = content["annotations"]
    assert [x["id"] for x in labels] == list(range(1, len(labels) + 1))
    assert all(0.05 <= x["score"] <= 1 and x["segmentation"]["size"] == [64, 96] for x in labels)
    assert {x["image_id"] for x in labels} == set(range(TEST_SCENES))
    assert check_content(content).problems == []


def test_a_broken_image_is_left_out_or_ends_the_run_until_it_is_removed(arguments, data, tmp_path):
    folder = shutil.copytree(data / "val", tmp_path / "images")
    broken = sorted(folder.iterdir())[1]
    broken.write_bytes(broken.read_bytes()[:-40])  # its header is whole
    which = ("--images", folder)
    tool.main(arguments("DATASETS.INVALID_ANNOTATIONS", "drop", which=which, name="dropped.json"))
    content = json.loads((tmp_path / "dropped.json").read_text())
    others = {x["id"] for x in content["images"] if x["file_name"] != broken.name}
    assert len(others) == len(content["images"])  # as an image of background it would teach
    assert {x["image_id"] for x in content["annotations"]} == others
    with pytest.raises(SystemExit, match=broken.name):
        tool.main(arguments(which=which))
    assert len(partial_of(tmp_path).read_text().splitlines()) == 1
    broken.unlink()  # what was done counts, though the images after it have other ids
    tool.main(arguments(which=which))
    tool.main(arguments(which=which, name="whole.json"))
    assert (tmp_path / "labels.json").read_text() == (tmp_path / "whole.json").read_text()


def test_an_interrupted_run_goes_on(arguments, data, tmp_path):
    tool.main(arguments(name="whole.json"))
    for count in (1, 1):
        words = "interrupted; the same command goes on"
        with interrupted(count), pytest.raises(SystemExit, match=words):
            tool.main(arguments())
    part = partial_of(tmp_path)
    assert len(part.read_text().splitlines()) == 2
    whole = json.loads((tmp_path / "whole.json").read_text())["annotations"]
    others = shutil.copytree(data / "val", tmp_path / "others")  # images of the same names
    for score, options in ((0.1, {"min-score": 0.1}), (0, {"which": ("--images", others)})):
        tool.main(arguments(name="other.json", **options))  # neither takes nor removes what is done
        annotations = json.loads((tmp_path / "other.json").read_text())["annotations"]
        expected = [x["score"] for x in whole if x["score"] >= score]
        assert [x["score"] for x in annotations] == expected
        (tmp_path / "other.json").unlink()
    part.write_text(part.read_text() + '{"[\\"000003.jp')  # killed while writing
    writing = mock.patch.object(tool, "write_json", side_effect=KeyboardInterrupt)
    with interrupted(1), writing, pytest.raises(SystemExit, match="interrupted"):
        tool.main(arguments())  # one image was left
    with interrupted(0):
        tool.main(arguments())
    assert (tmp_path / "labels.json").read_text() == (tmp_path / "whole.json").read_text()
    assert not part.exists()


def test_by_test_time_augmentation(arguments, config_files, tmp_path):
    augmented = "TEST.AUG.ENABLED True TEST.AUG.MIN_SIZES (32,40) TEST.AUG.MAX_SIZE 128".split()
    cfg = build_config(str(config_files["lr"]), augmented)
    torch.manual_seed(0)
    model = KDTrainer.build_model(cfg).eval()
    torch.save(model.state_dict(), tmp_path / "lr.pth")
    files = {"config-file": config_files["lr"], "weights": tmp_path / "lr.pth"}
    for name, words in (("plain", []), ("augmented", augmented)):
        tool.main(arguments(*words, name=f"{name}.json", **files))
    plain, labels = (
        json.loads((tmp_path / f"{name}.json").read_text())["annotations"]
        for name in ("plain", "augmented")
    )
    mapper, dicts = build_mapper(cfg, is_train=False), DatasetCatalog.get("tiny_val")
    with torch.no_grad():
        found = GeneralizedRCNNWithTTA(cfg, model)([mapper(dict(x)) for x in dicts])
    found = [x["instances"] for x in found]
    found = [x[x.pred_masks.flatten(1).any(dim=1)].scores.tolist() for x in found]
    scores = [score for scores in found for score in scores if score >= 0.05]
    assert plain and labels and labels != plain
    assert sorted(x["score"] for x in labels) == pytest.approx(sorted(scores), abs=1e-5)
    with pytest.raises(SystemExit, match="TEST.AUG.ENABLED is True, but a MultiResolutionRCNN"):
        tool.main(arguments(*augmented, name="no.json"))


def test_labels_of_a_file_are_those_of_the_step(
    arguments, config_files, student_config, data, tmp_path
):
    build_config(str(config_files["teacher"]), [])
    dicts = DatasetCatalog.get("tiny_val")
    sizes = [(x.pop("height"), x.pop("width")) for x in dicts]  # Detectron2 needs neither
    DatasetCatalog.register("unsized", lambda: dicts)
    MetadataCatalog.get("unsized").image_root = str(data / "val")
    tool.main(arguments(which=("--dataset", "unsized")))
    images = json.loads((tmp_path / "labels.json").read_text())["images"]
    assert [(x["height"], x["width"]) for x in images] == sizes
    entry = {"name": "labels", "json": str(tmp_path / "labels.json"), "images": str(data / "val")}
    keys = [
        "DATASETS.COCO_FORMAT",
        [*coco_format(data, "tiny"), entry],
        "INPUT.RANDOM_FLIP",
        "none",
    ]
    keys += ["DATASETS.UNLABELED", ["labels"], "SOLVER.UNLABELED_PER_BATCH", TEST_SCENES]
    keys += ["KD.UNLABELED.PSEUDO_LABELS", True]
    keys += ["KD.UNLABELED.SCORE", [0.113], "KD.UNLABELED.IGNORE_SCORE", 0.1]
    cfg = student_config(*keys)
    samples = next(iter(build_train_loader(cfg, build_mapper(cfg, is_train=True))))[2:]
    student = build_student(cfg)
    bare = [{k: v for k, v in x.items() if k != "instances"} for x in samples]
    (mine, _), (theirs, _) = (
        student.unlabeled.label(inputs, student, student.teacher) for inputs in (samples, bare)
    )
    kinds = set()
    for one, other in zip(mine, theirs, strict=True):
        one, other = one["instances"], other["instances"]
        best = pairwise_iou(one.gt_boxes, other.gt_boxes)
        # The tiny teacher's masks are noise: at one of the resolutions a small one may be lost.
        for objects, overlaps in ((one, best), (other, best.T)):
            found = overlaps.amax(dim=1) > 0.99
            assert found.float().mean() > 0.9
            assert (objects.gt_boxes.area()[~found] < 48).all()
        best = best.max(dim=1)
        found = best.values > 0.99
        assert torch.equal(one.gt_classes[found], other.gt_classes[best.indices[found]])
        masks = one.gt_masks.tensor[found], other.gt_masks.tensor[best.indices[found]]
        # They are pasted at another resolution.
        assert (masks[0] & masks[1]).sum() > 0.5 * (masks[0] | masks[1]).sum() > 0
        kinds |= set(one.gt_classes.tolist())
    assert -1 in kinds and max(kinds) >= 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"which": ("--dataset", "tiny_vla")}, "'tiny_vla' is not registered; did you mean tiny_"),
        ({"which": ("--images", "no/such")}, "--images: there is no folder 'no/such'"),
        ({"weights": "no.pth"}, "no.pth"),
        ({"name": "there.json"}, "there.json' exists already; remove it"),
        ({"name": "there.json/x.json"}, "label_images.py: .*: '.*there.json'"),
        ({"name": "x.json", "batch-size": 0}, "2"),
    ],
)
def test_mistakes(arguments, options, words, tmp_path, capsys):
    (tmp_path / "there.json").write_text("{}")
    with pytest.raises(SystemExit, match=words):
        tool.main(arguments(**options))
