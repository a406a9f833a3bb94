"""tools/analysis/suggest_scores.py: a worked-out example, its keys in a config, and its errors."""

import json
import shlex

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
    categories = [{"id": 7, "name": "car"}, {"id": 9, "name": "bus"}]
    truth = [{"image_id": x["id"], "category_id": 7, "bbox": BOX} for x in images]
    truth += [{"image_id": i, "category_id": 9, "bbox": ELSEWHERE} for i in (1, 2)]
    truth.append({"image_id": 1, "category_id": 7, "bbox": [60, 10, 30, 30], "iscrowd": 1})
    truth = [{**x, "id": i} for i, x in enumerate(truth, start=1)]
    found = [(i, BOX, score) for i, score in enumerate(SURE, start=1)]
    found += [(i, ELSEWHERE, 0.5) for i in range(1, 11)]
    found += [(i, BOX, 0.4) for i in range(31, 36)]
    found += [(1, [60, 10, 30, 30], 0.95)]  # in the crowd: neither right nor wrong
    keys = "image_id", "bbox", "score"
    found = [{**dict(zip(keys, x)), "category_id": 7} for x in found]
    return {"images": images, "categories": categories, "annotations": truth}, found


@pytest.fixture
def files(tmp_path):
    """Return a function that writes truth and predictions and returns the two paths."""

    def write(truth, found):
        paths = tmp_path / "truth.json", tmp_path / "found.json"
        for path, content in zip(paths, (truth, found)):
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return tuple(map(str, paths))

    return write


def test_worked_out(files):
    car, bus = tool.match(*files(*example()))
    assert (car.name, car.objects, bus.name, bus.objects) == ("car", 40, "bus", 2)
    # F1 is 60 / 70 at 0.70, and 70 / 85 with all; F2 is 150 / 190 and 175 / 205.
    assert car.best(1) == pytest.approx((0.7, 60 / 70, 1, 0.75))
    assert car.best(2) == pytest.approx((0.4, 175 / 205, 35 / 45, 35 / 40))
    assert len(bus.scores) == 0
    score, ignore, rows = tool.suggest([car, bus])
    assert score == pytest.approx([0.7, 0.7]) and ignore == pytest.approx(0.4)
    assert [row[:2] for row in rows] == [["all classes", 42], ["car", 40]]


def test_the_keys_fit_a_config(files, capsys):
    truth, found = files(*example())
    arguments = ["--truth", truth, "--predictions", found]
    tool.run(tool.build_parser(), tool.main, arguments)
    keys = shlex.split(capsys.readouterr().out.splitlines()[-1])
    keys = build_config("", ["MODEL.ROI_HEADS.NUM_CLASSES", 2, *keys]).KD.UNLABELED
    assert keys.SCORE == [0.7, 0.7] and keys.IGNORE_SCORE == 0.4


TRUTH, FOUND = example()


@pytest.mark.parametrize(
    ("truth", "found", "words"),
    [
        (TRUTH, "no JSON", "found.json' cannot be read as JSON"),
        (TRUTH, TRUTH, "found.json' should be the coco_instances_results.json of an evaluation on"),
        (TRUTH, [{**FOUND[0], "image_id": 99}], "should be the coco_instances_results.json"),
        ({}, FOUND, "should be the coco_instances_results.json"),
        (example(5)[0], FOUND[:5], "7 objects and 5 right detections tell nothing"),
        (TRUTH, FOUND[30:40], "42 objects and 0 right detections tell nothing"),
        (TRUTH, [], "found.json' has no detection; train the detector first"),
    ],
)
def test_errors(files, truth, found, words):
    with pytest.raises(InputError, match=words):
        tool.suggest(tool.match(*files(truth, found)))
