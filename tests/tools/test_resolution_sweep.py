"""tools/analysis/resolution_sweep.py: as a process of its own, by its main(), and its files."""

import csv
import json

import cv2
import pytest
import torch
from helpers import ROOT, coco_format, load_tool, run_script

from msad_kd import KDTrainer
from msad_kd.checkpoint.checkpoint import load_strictly
from msad_kd.config.build import build_config
from projects.Shapes.generate import generate

report = load_tool("sweep_report")

SIZES = ["--sizes", "64", "128"]
CHECKPOINTS = ROOT / "projects/Shapes/checkpoints"


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """KEY VALUE pairs that give a Shapes config four scenes to be tested on."""
    folder = tmp_path_factory.mktemp("swept")
    generate(folder / "data", train=1, val=4, classes=5, difficulty=0.1, progress=False)
    sets = ["DATASETS.COCO_FORMAT", str(coco_format(folder / "data", "swept"))]
    return [*sets, "DATASETS.TRAIN", "()", "DATASETS.TEST", "('swept_val',)", "MODEL.DEVICE", "cpu"]


@pytest.fixture(scope="module")
def swept(options, tmp_path_factory):
    """The folder that the tool wrote to, and the finished process."""
    folder = tmp_path_factory.mktemp("sweep") / "new"
    arguments = [*SIZES, "--images", "2", "--output", folder]
    for label, name in (("stock, HR", "hr"), ("teacher", "teacher_one_size")):
        config = ROOT / f"configs/Shapes/{name}.yaml"
        arguments += ["--model", label, config, CHECKPOINTS / f"{name}.pth", *options]
    arguments += ["MODEL.MULTI_RESOLUTION.TEST_BRANCH", "lr"]  # of the last one
    return folder, run_script("tools/analysis/resolution_sweep.py", *arguments)


def test_a_row_for_every_model_and_size(swept, options, tmp_path):
    sizes = ["INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 128, "OUTPUT_DIR", str(tmp_path)]
    cfg = build_config(str(ROOT / "configs/Shapes/hr.yaml"), [*options, *sizes])
    model = KDTrainer.build_model(cfg)
    load_strictly(model, str(CHECKPOINTS / "hr.pth"), "the test")
    expected = KDTrainer.test(cfg, model)  # as train_net.py finds them
    rows = json.loads((swept[0] / "sweep.json").read_text())["rows"]
    names = ["stock, HR 64 64", "stock, HR 128 128", "teacher 64 32", "teacher 128 64"]
    assert [f"{row['model']} {row['size']} {row['side']}" for row in rows] == names
    found = [expected[task]["AP"] for task in ("bbox", "segm")]
    assert min(found) > 5
    assert [rows[0]["box_ap"], rows[0]["mask_ap"]] == pytest.approx(found)
    assert rows[0]["box_ap"] < rows[1]["box_ap"] and rows[0]["gmacs"] < rows[1]["gmacs"]
    for row in rows:
        low, middle, high = (row[f"latency_{name}ms"] for name in ("low_", "", "high_"))
        assert 0 < low <= middle <= high


def test_all_files_agree(swept):
    folder, process = swept
    names = ["sweep.csv", "sweep.json", "sweep.md", "sweep.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    content = json.loads((folder / "sweep.json").read_text())
    assert "swept_val, 4 images" in content["note"] and "2 images, all models" in content["note"]
    assert "10 detections" in content["note"] and "PARTIAL" not in content["note"]
    with open(folder / "sweep.csv", newline="") as file:
        table = list(csv.DictReader(file))
    written = [{name: row[name] for name in report.HEADINGS} for row in content["rows"]]
    assert table == [{k: "" if v is None else str(v) for k, v in row.items()} for row in written]
    text = (folder / "sweep.md").read_text()
    assert text == report.markdown(content["rows"], content["note"]) and text in process.stdout
    assert cv2.imread(str(folder / "sweep.png")).std() > 10
    # The progress bar counts 2 + 4 images for each of 4 rows.
    assert "24/24" in process.stderr and "teacher, 128 px" in process.stderr


def test_a_model_without_masks_and_an_unfinished_sweep(tmp_path):
    row = dict.fromkeys(report.HEADINGS, 1.0) | {"model": "boxes", "side": "32"}
    row |= {"mask_ap": None, "keypoint_ap": None}
    report.write_files(str(tmp_path), [row], "a note", 1)
    header, _, line = (tmp_path / "sweep.md").read_text().splitlines()[:3]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, line)]
    shown = dict(zip(*cells))
    assert (shown["model"], shown["box AP"]) == ("boxes", "1.00") and "mask AP" not in shown
    assert "PARTIAL" not in (tmp_path / "sweep.md").read_text()
    alone = cv2.imread(str(tmp_path / "sweep.png")).shape[1]
    report.write_files(str(tmp_path), [row, {**row, "model": "masks", "mask_ap": 2.0}], "", 3)
    assert "| boxes " in (text := (tmp_path / "sweep.md").read_text()) and " - |" in text
    assert "keypoint" not in text
    for name in ("sweep.md", "sweep.json"):
        assert "PARTIAL: 2 of 3 rows" in (tmp_path / name).read_text()
    assert cv2.imread(str(tmp_path / "sweep.png")).shape[1] == 2 * alone


def test_mistakes_end_in_one_sentence(config_files, tmp_path):
    low = [str(config_files["lr"]), str(tmp_path / "lr.pth")]
    model = KDTrainer.build_model(build_config(low[0], []))
    torch.save({"model": model.state_dict()}, low[1])
    main = load_tool("resolution_sweep").main
    mistakes = {
        "--model a b: NAME, CONFIG and WEIGHTS are needed": ["--model", "a", "b"],
        "--model a: the name is given twice": ["--model", "a", *low, "--model", "a", *low],
        "--model b: DATASETS.TEST is .*the same single data set": [
            *("--model", "a", *low),
            *("--model", "b", *low, "DATASETS.TEST", "('tiny_train',)"),
        ],
        "'nowhere.pth' .* does not exist": ["--model", "a", low[0], "nowhere.pth"],
    }
    for words, arguments in mistakes.items():
        with pytest.raises(SystemExit, match=words):
            main(["--output", str(tmp_path / "new"), *SIZES, *arguments])
    assert not (tmp_path / "new").exists()
