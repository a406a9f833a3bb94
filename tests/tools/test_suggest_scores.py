"""tools/analysis/suggest_scores.py: a worked-out example, its keys in a config, and its errors."""

import json
import shlex

import numpy as np
import pytest
from helpers import load_tool

from msad_kd import build_config
from msad_kd.utils.errors import InputError

tool = load_tool("suggest_scores")
BOX, ELSEWHERE = [10, 10, 20, 20], [60, 60, 20, 20]
SURE = [0.99 - 0.01 * i for i in range(30)]  # 0.99 to 0.70


def example(objects=40):
    """Return annotations and detections: 30 of 40 cars found, then 10 errors, then 5 more cars."""
    images = [{"id": i, "height": 100, "width": 100} for i in range(1, objects + 1)]
    images = [{**x, "file_name": f"{x['id']}.png"} for x in images]
    categories = [{"id": 9, "name": "bus"}, {"id": 7, "name": "car"}]
    truth = [{"image_id": x["id"], "category_id": 7, "bbox": BOX} for x in images]
    truth += [{"image_id": i, "category_id": 9, "bbox": ELSEWHERE} for i in (1, 2)]
    truth.append({"image_id": 1, "category_id": 7, "bbox": [60, 10, 30, 30], "iscrowd": 1})
    truth = [{"iscrowd": 0, "area": 400, **x, "id": i} for i, x in enumerate(truth, start=1)]
    found = [(i, BOX, score) for i, score in enumerate(SURE, start=1)]
    found += [(i, ELSEWHERE, 0.5) for i in range(1, 11)]
    found += [(i, BOX, 0.4) for i in range(31, 36)]
    found += [(1, [60, 10, 30, 30], 0.95)]  # in the crowd: neither right nor wrong
    keys = "image_id", "bbox", "score"
    found = [{**dict(zip(keys, x)), "category_id": 7} for x in found]
    return {"images": images, "categories": categories, "annotations": truth}, found


def config(tmp_path, config_files, truth, *keys):
    """Return a config file and keys whose data set is this truth, with one class more: a van."""
    more = {**truth, "categories": [*truth["categories"], {"id": 8, "name": "van"}]}
    entries = []
    for name, content in (("truth", truth), ("more", more)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        entries.append({"name": name, "json": str(tmp_path / f"{name}.json"), "images": "."})
    keys = ["MODEL.ROI_HEADS.NUM_CLASSES", 3, "DATASETS.TEST", ["truth"], *keys]
    keys += ["DATASETS.COCO_FORMAT", entries, "DATASETS.TRAIN", ["more"], "OUTPUT_DIR", tmp_path]
    return str(config_files["hr"]), list(map(str, keys))


def test_worked_out(tmp_path):
    truth, found = example()
    (tmp_path / "found.json").write_text(json.dumps(found))
    matches = tool.match(truth, tmp_path / "found.json")
    car, bus = matches["car"], matches["bus"]
    # F1 is 60 / 70 at 0.70, and 70 / 85 at 0.40; F2 is 150 / 190 and 175 / 205.
    assert (car.best(1), car.best(2)) == (0.7, 0.4)
    assert car.line(0.7) == [40, 0.7, 1, 30 / 40] and car.line(0.4) == [40, 0.4, 35 / 45, 35 / 40]
    assert car.line(0.995) == [40, 0.995, 0, 0]
    assert len(bus.scores) == 0 and bus.objects == 2
    score, ignore, lines = tool.suggest(["van", "car", "bus"], matches)
    assert score == [0.7, 0.7, 0.7] and ignore == 0.4
    names = ["all classes", "car", "bus (too few: SCORE of all classes)"]
    ignored = "all classes, IGNORE_SCORE"
    lowest = f"{ignored} (the lowest there is: lower SCORE_THRESH_TEST)"
    assert [line[0] for line in lines] == [*names, lowest]
    assert lines[0] == ["all classes", 42, 0.7, 1, 30 / 42]
    car.scores, car.right = np.append(car.scores, 0.1), np.append(car.right, False)
    assert tool.suggest(["car"], {"car": car})[2][-1][:2] == [ignored, 40]


def test_the_keys_fit_a_config(tmp_path, config_files, capsys):
    """They are in the order of the model's classes, of which the evaluated images lack one."""
    truth, found = example()
    (tmp_path / "inference").mkdir()
    (tmp_path / "inference" / "coco_instances_results.json").write_text(json.dumps(found))
    path, keys = config(tmp_path, config_files, truth)
    tool.run(tool.build_parser(), tool.main, ["--config-file", path, *keys])
    suggested = shlex.split(capsys.readouterr().out.splitlines()[-1])
    chosen = build_config(path, [*keys, *suggested]).KD.UNLABELED
    assert chosen.SCORE == [0.7] * 3 and chosen.IGNORE_SCORE == 0.4
    # Without training data, the classes are those of the file.
    less = ["DATASETS.TRAIN", "()", "MODEL.ROI_HEADS.NUM_CLASSES", "2"]
    tool.run(tool.build_parser(), tool.main, ["--config-file", path, *keys, *less])
    assert 'KD.UNLABELED.SCORE "[0.7, 0.7]"' in capsys.readouterr().out


TRUTH, FOUND = example()


@pytest.mark.parametrize(
    ("truth", "found", "words"),
    [
        (TRUTH, "no JSON", "found.json' should be the coco_instances_results.json of an eval"),
        (TRUTH, TRUTH, "should be the coco_instances_results.json"),
        (TRUTH, [{**FOUND[0], "image_id": 99}], "should be the coco_instances_results.json"),
        (example(5)[0], FOUND[:5], "7 objects and 5 right detections tell nothing"),
        (TRUTH, FOUND[30:40], "42 objects and 0 right detections tell nothing"),
        (TRUTH, [], "^42 objects and 0 right detections tell nothing"),
    ],
)
def test_errors(truth, found, words, tmp_path):
    file = tmp_path / "found.json"
    file.write_text(found if isinstance(found, str) else json.dumps(found))
    with pytest.raises(InputError, match=words):
        tool.suggest(["car", "bus"], tool.match(truth, file))


def test_the_data_set_and_the_predictions_are_needed(tmp_path, config_files):
    path, keys = config(tmp_path, config_files, example()[0])  # COCOeval has changed TRUTH
    for change, words in (
        (["DATASETS.TEST", "('truth', 'more')"], "name one data set in COCO format"),
        ([], "should be the coco_instances_results.json of an evaluation on the data set of"),
    ):
        with pytest.raises(SystemExit, match=words):
            tool.run(tool.build_parser(), tool.main, ["--config-file", path, *keys, *change])
