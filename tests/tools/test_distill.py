"""tools/distill.py: from one config to trained models, a table and a picture."""

import functools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers import NO_TEST, ROOT, load_tool, run_script, train

from msad_kd.config.build import build_config
from msad_kd.utils.errors import InputError

COCO = ROOT.parent / "shared" / "data" / "coco_100"


@pytest.fixture(scope="module")
def hr_of(files_of, tmp_path_factory):
    """hr_of(detector): config and checkpoint of a stock model that was trained for a few steps."""

    @functools.cache
    def make(detector):
        folder, config = tmp_path_factory.mktemp("hr"), str(files_of(detector)["hr"])
        torch.manual_seed(0)
        train(build_config(config, ["OUTPUT_DIR", str(folder), *NO_TEST]))
        return config, folder / "model_final.pth"

    return make


def test_a_dry_run_writes_configs_that_train_net_runs(hr_of, tmp_path, capsys):
    output, (config, weights) = tmp_path / "out", hr_of("mask_rcnn")
    load_tool("tools.distill").main(
        ["--config-file", config, "--weights", str(weights)]
        + ["--output", str(output), "--dry-run", "SOLVER.MAX_ITER", "2"]
        + ["teacher:SOLVER.MAX_ITER", "3", "student:KD.LOSSES", "[{name: l1, weight: 5e-1}]"]
    )
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said[-4:]] == ["hr", "teacher", "control", "student"]
    assert "l1 0.5" in said[-1]
    assert said[-4].split()[-3:] == ["-"] * 3  # HR is not trained here
    assert sorted(x.name for x in output.iterdir()) == [".lock", "configs", "grid.yaml"]
    steps = {}
    for role in ("teacher", "student", "control"):  # what the files say is enough to train them
        cfg = build_config(str(output / "configs" / f"{role}.yaml"), [])
        steps[role] = train(cfg).iter
        assert (output / role / "seed_1" / "model_final.pth").is_file()
    assert steps == {"teacher": 3, "student": 2, "control": 2}


def test_a_role_with_another_schedule(config_files, tmp_path, capsys):
    load_tool("tools.distill").main(
        ["--config-file", str(config_files["hr"]), "--output", str(tmp_path), "--dry-run"]
        + ["SOLVER.MAX_ITER", "1000", "SOLVER.WARMUP_ITERS", "100", "student:SOLVER.MAX_ITER", "20"]
        + ["SOLVER.STEPS", "(600, 900)"]
    )
    cfg = build_config(str(tmp_path / "configs" / "student.yaml"), [])
    assert cfg.SOLVER.WARMUP_ITERS == 2 and cfg.SOLVER.STEPS == (12, 18)
    assert {term["warmup_iters"] for term in cfg.KD.LOSSES} == {2}
    other = ", ".join(f"SOLVER.{name}" for name in ("MAX_ITER", "WARMUP_ITERS", "STEPS"))
    assert f"student and control differ in {other}:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("labels_by", "images", "name"),
    [("hr", "val", "unlabeled"), ("teacher", "tiny_val", "tiny_val")],
)
def test_images_without_labels(labels_by, images, name, data, hr_of, tmp_path, capsys, monkeypatch):
    """A folder, named from where one stands, or a data set joins the student's batches alone."""
    config, weights = hr_of("mask_rcnn")
    words = ["--config-file", config, "--output", str(tmp_path), "--unlabeled", images]
    words += ["--weights", str(weights)] * (labels_by == "hr")
    monkeypatch.chdir(data)
    load_tool("tools.distill").main([*words, "--dry-run", "SOLVER.MAX_ITER", "1"])
    monkeypatch.chdir(tmp_path)
    said = capsys.readouterr().out
    if labels_by == "hr":
        (line,) = (line for line in said.splitlines() if "label_images.py" in line)
        load_tool("tools.label_images").main(shlex.split(line)[2:] + ["--min-score", "0"])
    assert f"images of {name}{'_by_hr' * (labels_by == 'hr')}" in said
    roles = ("teacher", "control", "student")
    configs = {x: build_config(str(tmp_path / "configs" / f"{x}.yaml"), []) for x in roles}
    logged = {role: train(cfg).storage.histories() for role, cfg in configs.items()}
    assert {"loss_cls_unlabeled", "loss_kd_roi_box_unlabeled"} < set(logged["student"])
    assert not any("unlabeled" in key for key in logged["control"])
    solver = configs["student"].SOLVER
    assert solver.UNLABELED_PER_BATCH == solver.IMS_PER_BATCH


def test_time_augmentation_is_for_labels_alone(hr_of, tmp_path, capsys):
    config, weights = hr_of("mask_rcnn")
    words = ["--config-file", config, "--output", str(tmp_path), "--weights", str(weights)]
    words += ["--unlabeled", "tiny_val", "--dry-run", "TEST.AUG.ENABLED"]
    files = set()
    for enabled in ("True", "False"):
        load_tool("tools.distill").main([*words, enabled])
        for catalog in (DatasetCatalog, MetadataCatalog):  # as in a process of its own
            catalog.remove("tiny_val_by_hr")
        files |= set(re.findall(r"labels_by_hr_\w+\.json", capsys.readouterr().out))
        hr = build_config(str(tmp_path / "configs" / "hr.yaml"), [])
        assert str(hr.TEST.AUG.ENABLED) == enabled
        rows = yaml.safe_load((tmp_path / "grid.yaml").read_text())["rows"]
        assert {row["options"]["TEST.AUG.ENABLED"] for row in rows.values()} == {False}
    assert len(files) == 2


def test_labels_that_a_model_has_given_are_kept(data, hr_of, tmp_path, capsys):
    config, weights = hr_of("mask_rcnn")
    content = json.loads((data / "annotations" / "instances_val.json").read_text())
    content["annotations"] = [{**x, "score": 1.0} for x in content["annotations"]]
    (tmp_path / "scored.json").write_text(json.dumps(content))
    with_scores = {"name": "scored", "json": str(tmp_path / "scored.json")}
    entries = build_config(config, []).DATASETS.COCO_FORMAT
    entries = [*entries, {**with_scores, "images": str(data / "val")}]
    words = ["--config-file", config, "--output", str(tmp_path), "--weights", str(weights)]
    words += ["--unlabeled", "scored", "--dry-run"]
    entries = ["DATASETS.COCO_FORMAT", str(entries)]
    load_tool("tools.distill").main([*words, *entries])
    assert capsys.readouterr().out.rstrip().endswith("images of scored")
    with pytest.raises(SystemExit, match="'scored' has labels of a model already"):
        load_tool("tools.distill").main([*words, "--labels-by", "hr", *entries])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config-file", "nowhere.yaml"], "'nowhere.yaml' is no file and not in the model zoo"),
        (["--config-file", "new_baselines/mask_rcnn_R_50_FPN_50ep_LSJ.py"], "Python config"),
        (["--weights", "nowhere.pth"], "'nowhere.pth' for --weights does not exist; correct"),
        (["--baseline", "nowhere.pth"], "--baseline"),
        (["judge:SOLVER.MAX_ITER", "3"], "there is no role 'judge'"),
        (["SEED", "0"], "SEED is 0; give a number from 1"),
        (["student:SEED", "3"], "'student:SEED' cannot be chosen: SEED without a role is that of"),
        (["SOLVER.MAX_ITER"], "'SOLVER.MAX_ITER' has no value"),
        (["--scale", "3"], "KD.SCALE is 3"),
        (["DATASETS.TRAIN", "()"], "DATASETS.TRAIN of the config should name"),
        (["DATASETS.TEST", "()"], "DATASETS.TEST is nothing; "),
        (["DATASETS.TEST", "('tiny_val', 'tiny_train')"], "DATASETS.TEST is tiny_val, tiny_train;"),
        (["student:DATASETS.TEST", "('tiny_train',)"], "'student:DATASETS.TEST' cannot be chosen"),
        (["student:KD.LOSSES", "[{name: l3, weight: 1.0}]"], "there is no loss 'l3'"),
        (["student:KD.LOSSES", "[{name: dense_box, weight: 1.0}]"], "dense_box"),
        (["control:TEST.PATIENCE", "2"], "TEST.PATIENCE is 2"),
        (["student:INPUT.MIN_SIZE_TEST", "32"], "control's config; give control:INPUT.MIN_SIZE_TE"),
        (["student:TEST.DETECTIONS_PER_IMAGE", "9"], "'student:TEST.DETECTIONS_PER_IMAGE' cannot"),
        (["student:MODEL.ROI_BOX_HEAD.FC_DIM", "8"], "_HEAD.FC_DIM is 8 in the student and "),
        (["control:MODEL.ANCHOR_GENERATOR.OFFSET", "0.5"], "OFFSET is 0.0 in the student and 0.5"),
        (["SOLVER.MAX_ITER", "8", "--dry-run"], "'--dry-run' is an option: write it before"),
        (["--unlabeled", "nowhere"], "--unlabeled: 'nowhere' is neither a folder nor"),
        (["--unlabeled", "tiny_val", "--labels-by", "hr"], "hr needs --weights FILE"),
        (["--unlabeled", "voc_2007_val"], "'voc_2007_val' does not say where its images are"),
        (["--labels-by", "teacher"], "--labels-by needs --unlabeled IMAGES"),
        (["--output", "README.md"], "File exists: "),
    ],
)
def test_what_is_wrong_ends_in_one_sentence(config_files, tmp_path, arguments, words):
    given = ["--config-file", str(config_files["hr"]), "--output", str(tmp_path), "--dry-run"]
    with pytest.raises(SystemExit, match="^distill.py: ") as end:
        load_tool("tools.distill").main([*given, *arguments])
    assert words in str(end.value) and "\n" not in str(end.value)


def test_a_baseline_of_another_kind_is_refused_before_anything_is_trained(hr_of, tmp_path):
    config, weights = hr_of("retinanet")  # which makes its last levels from others than at LR
    given = ["--config-file", config, "--output", str(tmp_path), "--baseline", str(weights)]
    with pytest.raises(SystemExit, match="does not fit the config '.*control.yaml' of --baseline"):
        load_tool("tools.distill").main([*given, "--dry-run"])


def test_labels_are_made_once(tmp_path, monkeypatch):
    tool, said = load_tool("tools.distill"), []
    monkeypatch.setattr(tool, "run_tool", lambda *words: said.append(words))
    monkeypatch.setattr(tool, "describe_labels", lambda *file_and_config: said.append("described"))
    words = ["--output", tmp_path / "labels.json"]
    tool.label_images(words, None)
    (tmp_path / "labels.json").touch()
    tool.label_images(words, None)
    assert said == [("label_images.py", *words), "described", "described"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_that_is_at_work(number, tmp_path, monkeypatch, capsys):
    tool = load_tool("tools.distill")
    code = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); "
    (tmp_path / "slow.py").write_text(f"{code}os.kill(os.getppid(), {int(number)}); time.sleep(60)")
    monkeypatch.setattr(tool, "TOOLS", tmp_path)
    before = signal.signal(number, signal.default_int_handler)  # not ignored, as in a background
    try:
        with pytest.raises(SystemExit) as ended:
            tool.run_tool("slow.py", tmp_path / "pid")
    finally:
        signal.signal(number, before)
    assert ended.value.code == 128 + number
    assert "interrupted; the same command goes on" in capsys.readouterr().err
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


SMALL = "INPUT.MIN_SIZE_TRAIN (128,) INPUT.MAX_SIZE_TRAIN 192 INPUT.MIN_SIZE_TEST 128 "
SMALL = [*(SMALL + "INPUT.MAX_SIZE_TEST 192 SOLVER.IMS_PER_BATCH 2 MODEL.WEIGHTS").split(), ""]


def run_on_coco(folder, *command):
    """Run a command with the 100 images as Detectron2's builtin COCO, and return what it says."""
    if not (folder / "coco").exists():
        (folder / "coco").symlink_to(COCO)
    environment = {**os.environ, "DETECTRON2_DATASETS": str(folder)}  # read on import
    command, capture = [sys.executable, *command], {"stdout": subprocess.PIPE, "text": True}
    return subprocess.run(command, check=True, env=environment, cwd=ROOT, **capture).stdout


@pytest.mark.long
@pytest.mark.skipif(not COCO.exists(), reason=f"{COCO} is not there")
def test_keypoints_end_with_their_ap_and_commands_that_work(tmp_path):
    narrow = "MODEL.BACKBONE.FREEZE_AT 0 MODEL.RESNETS.NORM BN MODEL.RESNETS.WIDTH_PER_GROUP 16 "
    narrow += "MODEL.RESNETS.RES2_OUT_CHANNELS 32 MODEL.FPN.OUT_CHANNELS 32 MODEL.FPN.NORM BN "
    narrow += "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS (16,) SOLVER.MAX_ITER 2 DATALOADER.NUM_WORKERS 0"
    said = run_on_coco(
        *(tmp_path, "tools/distill.py", "--output", tmp_path / "out", "--detections", "10"),
        *("--config-file", "COCO-Keypoints/keypoint_rcnn_R_50_FPN_3x.yaml", *SMALL),
        *narrow.split(),
    )
    assert "| keypoint AP " in said and re.search(r"student: box AP .*, keypoint AP", said)
    assert "tools/predict.py" in said and "onnx" not in said  # keypoints cannot be traced


@pytest.mark.long
@pytest.mark.skipif(not COCO.exists(), reason=f"{COCO} is not there")
@pytest.mark.parametrize(
    "name",
    [
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x",
        "COCO-Detection/faster_rcnn_R_50_FPN_3x",
        "COCO-Detection/retinanet_R_50_FPN_3x",
        "COCO-Keypoints/keypoint_rcnn_R_50_FPN_3x",
    ],
)
def test_what_is_derived_of_the_model_zoo_trains_a_step_on_coco(name, tmp_path):
    run = functools.partial(run_on_coco, tmp_path)
    # Activations of frozen statistics that belong to no weights are huge.
    small = [*SMALL, "SOLVER.MAX_ITER", "1", "SOLVER.BASE_LR", "1e-6"]
    command = ["--config-file", f"{name}.yaml", "--output", tmp_path / "out", "--dry-run"]
    run("tools/distill.py", *command, *small)
    for role in ("teacher", "control", "student"):
        config = tmp_path / "out" / "configs" / f"{role}.yaml"
        run("train_net.py", "--config-file", config, "DATASETS.TEST", "()")
        assert (tmp_path / "out" / role / "seed_1" / "model_final.pth").is_file()


@pytest.mark.long
@pytest.mark.parametrize("detector", ["mask_rcnn", "retinanet"])
def test_killed_and_typed_again_it_ends_with_a_table(detector, hr_of, tmp_path):
    config, weights = hr_of(detector)
    command = ["tools/distill.py", "--config-file", config, "--weights", str(weights)]
    command += ["--baseline", str(weights)] * (detector == "mask_rcnn")  # has the same levels
    command += ["--output", str(tmp_path / "out"), "SOLVER.MAX_ITER", "4"]
    first = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=os.environ)
    checkpoint = tmp_path / "out" / "teacher" / "seed_1" / "model_final.pth"
    for _ in range(3000):
        if checkpoint.exists():
            break
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    for _ in range(600):  # the training that it left behind ends by itself
        try:
            with load_tool("tools.distill").locked(tmp_path / "out"):
                break
        except InputError:
            time.sleep(0.1)
    made = checkpoint.stat().st_mtime_ns
    done = run_script(*command)
    assert "high resolution" in done.stdout
    others = {"baseline": "LR without a teacher", "control": "its control"}
    others = others if "--baseline" in command else {"control": others["control"]}
    for other in others.values():
        assert re.search(rf"The student against {other}, one seed: box AP [+-]", done.stdout)
    assert checkpoint.stat().st_mtime_ns == made  # it went on
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [x["row"] for x in table["models"]] == ["hr", "teacher", *others, "student"]
    grid = yaml.safe_load((tmp_path / "out" / "grid.yaml").read_text())
    assert grid["rows"]["hr"]["checkpoint"] == str(weights)
    for made in ("scenes.png", "ap_cost.png", "data/sizes.png", "export/config.yaml"):
        assert (tmp_path / "out" / made).is_file()
