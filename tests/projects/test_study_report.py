"""Tables and pictures of a study, worked out by hand."""

from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts

from msad_kd import KDTrainer, build_config
from projects.study import measure, reports
from projects.study.grid import Curve, Grid, Row, Table
from projects.study.pictures import draw_ap_cost, draw_curves, draw_differences
from projects.study.scenes import choose_scenes, ground_truth, paint

AP = {
    "hr/0": (50.0, 52.0),
    "control/1": (40.0, 38.0),
    "control/2": (42.0, 39.0),
    "control/3": (41.0, 40.0),
    "lr/1": (30.0, 20.0),
    "student/1": (43.0, 37.0),
    "student/3": (42.0, 41.0),
}


def row(name, seeds=(1, 2, 3), **fields):
    return Row(f"the {name}", config="c", test_config="c", seeds=[*seeds], name=name, **fields)


@pytest.fixture
def grid():
    rows = {name: row(name) for name in ("control", "lr", "student", "later")}
    rows = {"hr": row("hr", (), checkpoint="hr.pth"), **rows}
    table = Table("all", "All", [*rows], control="control", baseline="lr", picture=True)
    curve = Curve("c", "C", {"line": ["lr", "student", "later"]}, {"level": "hr"})
    return Grid(rows, seeds=[1, 2, 3], tables=[table], curves=[curve])


@pytest.fixture
def cells(grid):
    return {
        f"{each.name}/{seed}": SimpleNamespace(row=each, seed=seed)
        for each in grid.rows.values()
        for seed in each.seeds or [0]
    }


@pytest.fixture
def results():
    seconds = {"training_seconds": 20.0, "total_seconds": 20.0}

    def cell(box, mask):
        metrics = dict.fromkeys(reports.METRICS, 1.0)
        aps = {"bbox": {**metrics, "AP": box}, "segm": {**metrics, "AP": mask}}
        return aps | {"iterations": 100, "machine": "this one"} | seconds

    results = {"cells": {key: cell(*aps) for key, aps in AP.items()}}
    for key in ("student/1", "student/3"):
        results["cells"][key] |= {"training_seconds": 40.0, "total_seconds": 140.0}
    return results


@pytest.fixture
def lines(grid, cells, results):
    """lines(): the cells of a line of the table by its model, after `row` and `model`."""

    def lines():
        text = reports.table_text(grid, reports.frame(cells, results), grid.tables[0])
        found = [line.split("|")[2:-1] for line in text.splitlines() if line.startswith("| ")]
        return {each[0].strip(): [cell.strip() for cell in each[1:]] for each in found}

    return lines


def test_a_table(lines, grid, results):
    found = lines()
    assert found["model"] == [
        *("seeds", "box AP", "box, against the control"),
        *("mask AP", "mask, against the control", "training"),
    ]
    # 40 s, and 140 s with its teacher's training, are 200 and 700 steps of 0.2 s.
    assert found["the student"] == [
        *("2", "42.5 ± 0.7", "+2.0 ± 1.4 (2/2)", "39.0 ± 2.8", "+0.0 ± 1.4 (1/2)", "200 (700)"),
    ]
    assert found["the control"][:3] == ["3", "41.0 ± 1.0", "-"]
    assert found["the lr"] == ["1", "30.0", "-10.0 (0/1)", "20.0", "-18.0 (0/1)", "100 (100)"]
    # A checkpoint: the difference of the means.
    assert found["the hr"][:3] == ["-", "50.0", "+9.0"]
    assert found["the later"][:3] == ["0", "not run", "-"]

    results["cells"]["student/1"]["gradient_ratio"] = 0.1
    results["cells"]["student/3"]["gradient_ratio"] = 0.4
    found = lines()
    assert found["model"][-2] == "KD gradient"
    assert found["the student"][-2] == "0.25" and found["the lr"][-2] == "-"

    grid.tables[0].seeds = [1]
    found = lines()
    assert found["the student"][:3] == ["1", "43.0", "+3.0 (1/1)"]
    assert found["the control"][:2] == ["1", "40.0"] and found["the hr"][2] == "+10.0"


def test_a_row_without_masks_among_others(lines, results):
    for seed in (1, 3):
        del results["cells"][f"student/{seed}"]["segm"]
    assert lines()["the student"][:5] == ["2", "42.5 ± 0.7", "+2.0 ± 1.4 (2/2)", "-", "-"]


def test_rows_are_compared_by_seed_unless_they_are_teachers(lines, grid, results, cells):
    # A row that was trained once, with a seed that the control happens to have, too.
    results["cells"]["hr/1"] = results["cells"].pop("hr/0")
    cells["hr/1"] = SimpleNamespace(row=grid.rows["hr"], seed=1)
    grid.rows["hr"] = row("hr", [1])
    assert lines()["the hr"][2] == "+10.0 (1/1)"
    grid.rows["hr"].seeds = [5]
    assert lines()["the hr"][2] == "+9.0"  # the control has no such seed
    grid.rows["hr"].seeds = [1, 4]  # its first seed need not be the grid's
    assert lines()["the hr"][2] == "+10.0 (1/1)"
    grid.rows["hr"].seeds = [1]
    grid.rows["later"].options["KD.TEACHER.WEIGHTS"] = "{hr}"
    assert lines()["the hr"][2] == "+9.0"  # it is a teacher
    branches = {"hr-lr": row("hr-lr", [1], checkpoint_of="hr")}  # and so are its branches
    branches["hr-lr-test"] = row("hr-lr-test", [1], checkpoint_of="hr-lr")
    with_branches = replace(grid, rows={**grid.rows, **branches})
    assert reports.unpaired(with_branches) == {"hr", *branches}
    grid.rows["later"].options["MODEL.WEIGHTS"] = "{student}"
    assert lines()["the student"][2] == "+2.0 ± 1.4 (2/2)"  # has several seeds
    grid.tables[0].control = "hr"
    assert lines()["the student"][2] == "-7.5"
    grid.tables[0].control = "control"
    del results["cells"]["control/1"], results["cells"]["control/3"]
    assert lines()["the student"][2] == "-"  # no equal seed


def test_files(grid, cells, results, tmp_path, monkeypatch):
    reports.write(grid, cells, results, tmp_path)
    assert "Machine: this one." in (tmp_path / "tables.md").read_text()
    csv = (tmp_path / "cells.csv").read_text().splitlines()
    assert len(csv) == 1 + len(AP)
    assert csv[1].startswith("hr,,50.0,") and csv[2].startswith("control,1,40.0,")
    for name in ("bars_all.png", "curves_c.png"):
        assert cv2.imread(str(tmp_path / name)).std() > 10
    grid.curves[0].seeds, grid.curves[0].levels = [1], {"level": "control"}
    drawn = []
    with monkeypatch.context() as patch:
        patch.setattr(reports.pictures, "draw_curves", lambda *args: drawn.append(args))
        patch.setattr(reports, "_save", lambda *_: None)
        reports.write(grid, cells, results, tmp_path)
    (_, ((_, lines, levels), _)), *_ = drawn
    assert lines["line"][100].index.tolist() == [1] and levels == {"level": 40.0}
    for cell in results["cells"].values():  # of a detector without masks
        del cell["segm"]
    reports.write(grid, cells, results, tmp_path)
    assert "mask" not in (tmp_path / "tables.md").read_text()
    results["cells"]["control/1"]["keypoints"] = {"AP": 12.5}  # of a detector of keypoints
    reports.write(grid, cells, results, tmp_path)
    results["cells"]["student/1"]["keypoints"] = {"AP": 14.5}
    drawn = []
    monkeypatch.setattr(reports, "_save", lambda figure, path: drawn.append(figure))
    for kinds in (["box", "keypoint"], ["box", "mask", "keypoint"]):
        drawn.clear()
        reports.write(grid, cells, results, tmp_path)
        axes = drawn[0].axes
        assert [axis.get_title() for axis in axes] == [f"{kind} AP" for kind in kinds]
        assert [text.get_text() for text in axes[-1].texts] == ["+2.0"]
        results["cells"]["control/1"]["segm"] = {"AP": 3.0}
    assert "keypoint AP" in (text := (tmp_path / "tables.md").read_text()) and "12.5" in text


def test_differences_are_drawn_to_the_control(grid, cells, results):
    data, table = reports.frame(cells, results), grid.tables[0]
    gains = {n: reports.differences(grid, data, table, n, "box") for n in ("hr", "student")}
    (axis,) = draw_differences("T", "the control", {"box": gains}).axes
    bars = [bar.get_width() for bar in axis.patches]
    assert bars == [3.0, 2.0] and axis.patches[0].get_hatch()  # the axis ends at 3
    assert sorted(axis.lines[1].get_xdata()) == [1.0, 3.0]  # seeds 3 and 1
    assert [text.get_text() for text in axis.texts] == ["+9.0", "+2.0 ± 1.4"]


def test_curves():
    aps = {100: np.array([30.0]), 50: np.array([42.0, 43.0])}
    panel = ("box AP", {"line": aps, "not run": {}}, {"level": 50.0})
    (axis,) = draw_curves("C", [panel]).axes
    line, _, level = axis.lines
    assert line.get_xydata().tolist() == [[50, 42.5], [100, 30.0]]  # by rising iterations
    assert level.get_ydata()[0] == 50.0
    ends = {tuple(point) for point in axis.collections[0].get_paths()[0].vertices.tolist()}
    assert ends == {(50, 42.0), (50, 43.0), (100, 30.0)}


def test_ap_by_cost_shows_the_gain_and_says_what_is_far_below():
    aps = {"high": (0.2, 80), "control": (0.1, 72), "student": (0.1, 73), "scratch": (0.1, 20)}
    lines = [
        {"title": name, "gmacs": gmacs, "bbox": {"AP": float(ap)}}
        for name, (gmacs, ap) in aps.items()
    ]
    (axis,) = draw_ap_cost(lines, {"bbox": "box"}, 10).axes
    low, high = axis.get_ylim()
    assert 68 < low < 72 and high > 80
    points = [line.get_xydata()[0].tolist() for line in axis.lines]
    assert points[1] == [0.1, 72] and points[2] == [0.1, 73] and low < points[3][1] < 71
    assert [t.get_text() for t in axis.texts][3] == "scratch: 20.0 (far below)"


def test_scenes_are_chosen_by_their_number_of_objects():
    counts = [3, 9, 5, 9, 1, 7] + [0] * 44 + [99]
    assert choose_scenes(counts, scenes=4) == [1, 2, 3, 5]
    assert choose_scenes([2, 2], scenes=1) == [0]


def test_masks_are_painted_in_the_colours_of_their_classes_the_first_on_top():
    image = np.full((8, 12, 3), 100, np.uint8)
    masks = np.zeros((2, 8, 12), bool)
    masks[0, :, :6], masks[1, :, 3:9] = True, True
    painted = paint(image, masks, [0, 1])
    one, other = (paint(image, masks[[i]], [i]) for i in (0, 1))
    assert (painted[:, :6] == one[:, :6]).all() and (painted[:, 9:] == 100).all()
    assert (painted[:, 7] == other[:, 7]).all() and (one[4, 4] != other[4, 4]).any()
    assert (paint(image, masks[:0], []) == 100).all()


def test_the_ground_truth_is_drawn_as_what_the_models_predict():
    triangle, box = [[0, 0, 10, 0, 0, 10]], {"bbox": [0, 0, 10, 10], "bbox_mode": 1}
    each = {**box, "category_id": 3, "segmentation": triangle, "keypoints": [2, 4, 2, 0, 0, 0]}
    scene = {"height": 20, "width": 20, "annotations": [each, {**each, "iscrowd": 1}]}
    areas = {}
    for with_masks in (True, False):
        (mask,), classes, points = ground_truth(scene, 40, 40, with_masks)
        assert classes == [3] and points.tolist() == [[4, 8]]  # the other is not labelled
        areas[with_masks] = mask.sum()
    assert areas[True] < 0.7 * areas[False] and areas[False] == pytest.approx(400, rel=0.2)


def test_nothing_found_is_ap_0_and_nothing_there_is_none():
    metrics = dict.fromkeys(reports.METRICS, 12.5) | {"APl": float("nan")}
    assert measure.tidy_metrics(metrics)["APl"] is None
    nothing = dict.fromkeys(metrics, float("nan"))
    assert set(measure.tidy_metrics(nothing).values()) == {0.0}


def test_a_row_with_test_time_augmentation_is_measured_by_it(config_files, tmp_path):
    options = "TEST.AUG.ENABLED True TEST.AUG.MIN_SIZES (32,40) TEST.AUG.MAX_SIZE 128".split()
    config, weights = str(config_files["lr"]), tmp_path / "lr.pth"
    torch.save(KDTrainer.build_model(build_config(config, [])).state_dict(), weights)
    models = {"row": {"config": config, "options": options, "weights": str(weights)}}
    result = measure.evaluate(models, 4, tmp_path)["models"]["row"]
    assert {"bbox", "segm", "gmacs"} <= result.keys()
    assert list(tmp_path.glob("inference_TTA/coco_instances_results.json"))


def test_pictures_show_the_ground_truth_in_the_models_classes(config_files, tmp_path, monkeypatch):
    config, weights = str(config_files["lr"]), tmp_path / "lr.pth"
    cfg = build_config(config, ["OUTPUT_DIR", str(tmp_path)])
    test_set = cfg.DATASETS.TEST[0]
    before = [x["annotations"] for x in get_detection_dataset_dicts(test_set)]
    classes = MetadataCatalog.get(test_set).thing_classes
    torch.save(KDTrainer.build_model(cfg).state_dict(), weights)
    options = ["DATASETS.CLASSES", str(classes[::-1])]
    models = {"row": {"config": config, "options": options, "weights": str(weights)}}
    shown = []
    monkeypatch.setattr(
        measure, "draw_scenes", lambda _, name, __: shown.extend(get_detection_dataset_dicts(name))
    )
    monkeypatch.setattr(measure, "COST_IMAGES", 1)
    measure.compare(models, 4, tmp_path, {"Row": "row"})
    numbers = [[x["category_id"] for x in each["annotations"]] for each in shown]
    expected = [[len(classes) - 1 - x["category_id"] for x in each] for each in before]
    assert numbers == expected and any(numbers)


def test_help_of_the_measuring_program(capsys):
    with pytest.raises(SystemExit):
        measure.main(["--help"])
    assert "usage" in capsys.readouterr().out
