"""tools/predict.py by its main(): images of all kinds, videos, COCO-format JSON, and ONNX."""

import json
import os
import re
import shutil
import signal

import cv2
import numpy as np
import pytest
from helpers import ROOT, TEST_SCENES, build, load_tool
from PIL import Image
from pycocotools import mask as mask_util

from msad_kd import KDTrainer
from msad_kd.checkpoint.checkpoint import save_model
from msad_kd.config.build import build_config
from msad_kd.data.coco_format import load_checked

tool, files = load_tool("predict"), load_tool("prediction_files")
predictors = load_tool("predictors")
CLASSES = [f"shape {i}" for i in range(8)]


@pytest.fixture(scope="module")
def weights_of(config_files, tmp_path_factory):
    """weights_of(role): a checkpoint of a model that was not trained, with class names."""

    def save(role):
        path = tmp_path_factory.mktemp("weights") / f"{role}.pth"
        save_model(build(build_config(str(config_files[role]), [])).state_dict(), path, CLASSES)
        return path

    return {role: save(role) for role in ("lr", "teacher")}.__getitem__


@pytest.fixture
def predict(config_files, weights_of, tmp_path, capsys):
    """predict(input, ..., role=...): the exit code or message, stdout and stderr."""

    def run(*arguments, role="lr", config=True):
        model = ["--config-file", config_files[role]] if config else []
        model += ["--weights", weights_of(role)] if "--weights" not in arguments else []
        output = [] if "--output" in arguments else ["--output", tmp_path / "out"]
        code = 0
        try:
            tool.main([*map(str, [*arguments, *output, *model])])
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def photos(data, tmp_path):
    """A folder of a grey image, an RGBA one, one that EXIF turns, and a broken one."""
    folder = tmp_path / "photos"
    folder.mkdir()
    first, second, third = sorted((data / "val").iterdir())[:TEST_SCENES]
    Image.open(first).convert("L").save(folder / "grey.bmp")
    Image.open(second).convert("RGBA").save(folder / "rgba.png")
    exif = Image.Exif()
    exif[0x112] = 6
    Image.open(third).save(folder / "turned.jpg", exif=exif)
    (folder / "broken.png").write_bytes(first.read_bytes()[:200])
    Image.new("RGB", (900, 1)).save(folder / "narrow.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_three_results_and_named_warnings(predict, photos, tmp_path):
    code, out, errors = predict(photos, "--json", "--score", "0")
    assert (
        code == 0
        and "detections with a score of " in out
        and "3 images, " in out
        and "of the model alone" in out
    )
    broken, narrow = [line for line in errors.splitlines() if "warning: " in line]
    assert "broken.png' cannot be read" in broken and "annotation file" not in broken
    assert "narrow.png' cannot be used (its 900 x 1 px would become" in narrow
    assert "5/5" in errors
    shapes = {path.name: cv2.imread(str(path)).shape for path in (tmp_path / "out").glob("*.*g")}
    # Scenes have 64 x 96 px; the pictures are enlarged.
    sizes = {"grey.bmp.png": (384, 576, 3), "rgba.png": (384, 576, 3), "turned.jpg": (576, 384, 3)}
    assert shapes == sizes
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())
    names = ["grey.bmp", "rgba.png", "turned.jpg"]
    assert [image["file_name"] for image in found["images"]] == names
    assert (found["images"][2]["height"], found["images"][2]["width"]) == (96, 64)
    assert [category["name"] for category in found["categories"]] == CLASSES


@pytest.mark.parametrize("role", ["lr", "student", "teacher"])
def test_the_json_has_the_evaluators_detections(predict, data, weights_of, config, role, tmp_path):
    weights = weights_of("teacher" if role == "teacher" else "lr")
    opts = ("TEST.DETECTIONS_PER_IMAGE", 9, "TEST.COCO_EVALUATOR", "pycocotools")
    cfg = config(role, *opts)
    model = KDTrainer.load_model(cfg, str(weights), "the test")
    del model.classes  # those of the data are others; the numbers of the classes are compared
    KDTrainer.test(cfg, model)
    path = f"{cfg.OUTPUT_DIR}/inference/coco_instances_results.json"
    expected = json.load(open(path))
    options = ["--json", "--score", "0", "--weights", weights, "--opts", *map(str, opts)]
    assert predict(data / "val", *options, role=role)[0] == 0
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())
    truth = json.loads((data / "annotations" / "instances_val.json").read_text())
    files = {image["id"]: image["file_name"] for image in truth["images"]}
    own = {image["id"]: image["file_name"] for image in found["images"]}
    ids = sorted(category["id"] for category in truth["categories"])

    def plain(rows, files, classes):
        keys = ("bbox", "score", "segmentation")
        return [
            [files[row["image_id"]], classes[row["category_id"]], *(row.get(key) for key in keys)]
            for row in sorted(rows, key=lambda row: (files[row["image_id"]], -row["score"]))
        ]

    index = dict(zip(ids, range(8)))
    expected = plain(expected, files, index)
    for row in expected:  # COCO format has no mask of nothing
        row[4] = row[4] if mask_util.area(row[4]) else None
    assert len(expected) >= 9
    assert plain(found["annotations"], own, {i + 1: i for i in range(8)}) == expected


def test_the_json_is_a_data_set(predict, data, tmp_path, capsys):
    predict(data / "val", "--json", "--score", "0")
    path = tmp_path / "out" / "predictions.json"
    dicts = load_checked(str(path), str(data / "val"), "predicted")
    assert len(dicts) == TEST_SCENES and all(entry["annotations"] for entry in dicts)
    main = load_tool("check_dataset").main
    main(["--json", str(path), "--images", str(data / "val"), "--output", str(tmp_path / "check")])
    assert "0 errors" in capsys.readouterr().out


def test_only_good_detections_are_kept(predict, data, tmp_path):
    path = tmp_path / "out" / "predictions.json"
    predict(data / "val", "--json", "--score", "0")
    scores = [x["score"] for x in json.loads(path.read_text())["annotations"]]
    limit = float(np.median(scores))
    predict(data / "val", "--json", "--score", repr(limit))
    kept = [x["score"] for x in json.loads(path.read_text())["annotations"]]
    assert kept == [score for score in scores if score >= limit] and len(kept) < len(scores)


@pytest.mark.parametrize("suffix", files.VIDEOS)
def test_videos(predict, data, suffix, tmp_path):
    clip = tmp_path / f"clip{suffix}"
    code = cv2.VideoWriter_fourcc(*"mp4v")
    writer = cv2.VideoWriter(str(clip), code, 10, (96, 64))
    for path in sorted((data / "val").iterdir()):
        writer.write(cv2.imread(str(path)))
    writer.release()
    (tmp_path / "broken.mp4").write_text("text")
    code, out, errors = predict(clip, tmp_path / "broken.mp4", "--json", "--score", "0")
    assert code == 0 and f"{TEST_SCENES} images" in out and f"{TEST_SCENES}/{TEST_SCENES}" in errors
    assert "broken.mp4' cannot be read" in errors
    drawn = cv2.VideoCapture(str(tmp_path / "out" / clip.name))
    frames = [frame.shape for there, frame in (drawn.read() for _ in range(9)) if there]
    assert frames == [(384, 576, 3)] * TEST_SCENES
    assert drawn.get(cv2.CAP_PROP_FPS) == pytest.approx(10)
    assert "frames it should have" not in errors
    found = json.loads((tmp_path / "out" / f"{clip.name}.json").read_text())
    assert [x["file_name"] for x in found["images"]] == [f"{clip.name}#{i}" for i in range(3)]
    assert {x["image_id"] for x in found["annotations"]} == {1, 2, 3}
    assert not (tmp_path / "out" / "predictions.json").exists()


def test_files_folders_and_patterns(photos, monkeypatch):
    (photos / "more").mkdir(), (photos / "no.mp4").mkdir()
    shutil.copy(photos / "rgba.png", photos / "more" / "rgba.png")
    shutil.copy(photos / "rgba.png", photos / "._rgba.png")  # as a Mac leaves beside each file
    monkeypatch.chdir(photos)
    words = [str(photos / "*.png"), ".", "grey.bmp", "**/*.png", "nowhere.png"]
    found, unmatched = files.find_inputs(words)
    names = ["broken.png", "narrow.png", "rgba.png", "./grey.bmp", "./turned.jpg", "more/rgba.png"]
    assert [path.removeprefix(f"{photos}/") for path in found] == names
    assert unmatched == ["nowhere.png"]
    targets, folder = files.targets_of(found, "out")
    assert folder == str(photos)
    assert set(targets.values()) == {
        *("out/broken.png", "out/narrow.png", "out/rgba.png", "out/grey.bmp.png", "out/turned.jpg"),
        "out/more/rgba.png",
    }
    with pytest.raises(tool.InputError, match="two inputs would be drawn as 'out/grey.bmp.png'"):
        files.targets_of(["grey.bmp", "grey.bmp.png"], "out")


MISTAKES = {
    r"no image or video matches 'nowhere/\*.jpg'": ["nowhere/*.jpg"],
    "none of the 1 inputs could be read": [ROOT / "README.md"],
    "'.*broken.png' is one of the inputs and would be over": ["PHOTOS", "--output", "PHOTOS"],
    "File exists: 'PHOTOS/notes.txt'": ["PHOTOS", "--output", "NOTES"],
    "'nowhere.pth' .*does not exist": ["PHOTOS", "--weights", "nowhere.pth"],
    "'PHOTOS/in'; for those in folders of a folder, name 'FOLDER": ["IN"],
    "do not change an .onnx file": ["PHOTOS", "--weights", "FILE.onnx", "--opts", "SEED", "1"],
    "an .onnx file runs on the CPU": ["PHOTOS", "--weights", "FILE.onnx", "--device", "cuda"],
    "images alone have no proposals": ["PHOTOS", "--opts", "MODEL.LOAD_PROPOSALS", "True"],
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_end_in_one_sentence(predict, photos, tmp_path, words):
    (photos / "in" / "in").mkdir(parents=True)
    places = {"PHOTOS": photos, "IN": photos / "in", "NOTES": photos / "notes.txt"}
    message = predict(*(places.get(word, word) for word in MISTAKES[words]))[0]
    assert isinstance(message, str) and "\n" not in message
    assert re.search(words.replace("PHOTOS", str(photos)), message)


def test_a_video_that_is_cut_off(predict, data, tmp_path):
    clip = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter_fourcc(*"MJPG"), 10, (96, 64))
    for _ in range(8):
        writer.write(cv2.imread(str(next((data / "val").iterdir()))))
    writer.release()
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    code, out, errors = predict(clip)
    assert code == 0 and re.search(r"clip.avi' ends after \d of the 8 frames it should", errors)


def test_an_image_that_a_resizing_file_would_leave_nothing_of():
    predictor = predictors.OnnxPredictor.__new__(predictors.OnnxPredictor)
    predictor.metadata = {"min_size": 32, "max_size": 128, "resizes": True}
    with pytest.raises(predictors.ImageError, match="its 3000 x 1 px would be less than a pixel"):
        predictor(np.zeros((1, 3000, 3), np.uint8))


def test_classes_without_names_have_numbers(predict, config_files, data, tmp_path):
    model = build(build_config(str(config_files["lr"]), ["DATASETS.TRAIN", ()]))
    save_model(model.state_dict(), tmp_path / "bare.pth")
    opts = ["--weights", tmp_path / "bare.pth", "--json", "--opts", "DATASETS.TRAIN", "()"]
    assert predict(next((data / "val").iterdir()), *opts)[0] == 0
    categories = json.loads((tmp_path / "out" / "predictions.json").read_text())["categories"]
    assert [x["name"] for x in categories] == [f"class {i}" for i in range(8)]


def test_a_score_is_from_0_to_1(predict, photos):
    code, _, error = predict(photos, "--score", 50)
    assert code == 2 and "--score 50 should be from 0 to 1" in error


def test_a_stopped_run_keeps_what_it_found(predict, photos, tmp_path, monkeypatch):
    def write(*arguments):
        files.write_picture(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(tool, "write_picture", write)
    code, _, error = predict(photos, "--json", "--score", 0)
    assert code == 128 + signal.SIGTERM and "stopped; what was done is in" in error
    (image,) = json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]
    assert (tmp_path / "out" / f"{image['file_name']}.png").exists()


def test_weights_without_a_config(predict, photos):
    assert "--config-file is missing" in predict(photos, config=False)[0]


def test_a_model_that_finds_no_objects(config, tmp_path):
    cfg, path = config("lr", "MODEL.META_ARCHITECTURE", "ProposalNetwork"), tmp_path / "rpn.pth"
    save_model(build(cfg).state_dict(), path)
    with pytest.raises(tool.InputError, match=r"a ProposalNetwork .* \['proposals'\]"):
        predictors.ConfigPredictor(cfg, str(path))(np.zeros((32, 48, 3), np.uint8))


def test_names_of_classes(config_files, tmp_path):
    cfg = build_config(str(config_files["lr"]), ["DATASETS.TRAIN", "()"])
    path = tmp_path / "model.pth"
    save_model(build(cfg).state_dict(), path)
    cfg.DATASETS.CLASSES = ["cat", "dog"]
    run = tool.Run(predictors.ConfigPredictor(cfg, str(path)), 0.5, None)
    assert [run.name(i) for i in (1, 2)] == ["dog", "class 2"]


def test_an_exported_student_finds_the_same(predict, config_files, weights_of, data, tmp_path):
    words = ["--config-file", config_files["lr"], "--weights", weights_of("lr"), "--format", "onnx"]
    words += ["--output", tmp_path / "exported", "--count", "1", "--runs", "1"]
    load_tool("export_model").main(list(map(str, words)))
    (exported,) = (tmp_path / "exported").glob("*.onnx")
    contents = []
    for weights, config in ((weights_of("lr"), True), (exported, False)):
        arguments = (data / "val", "--json", "--score", "0", "--weights", weights)
        assert predict(*arguments, config=config)[0] == 0
        contents.append(json.loads((tmp_path / "out" / "predictions.json").read_text()))
    expected, found = contents
    assert found["categories"] == expected["categories"] and found["images"] == expected["images"]
    rows = [[[*x["bbox"], x["score"]] for x in content["annotations"]] for content in contents]
    assert len(rows[0]) > 9 and np.allclose(*rows, rtol=0, atol=[*[0.05] * 4, 1e-3])
    masks = [[x.get("segmentation") for x in content["annotations"]] for content in contents]
    assert np.mean([one == other for one, other in zip(*masks)]) > 0.9
