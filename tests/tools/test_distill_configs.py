"""The configs that distill.py derives: student and control stay comparable."""

import re

import pytest
import yaml
from helpers import load_tool

from msad_kd.config.build import build_config


def test_given_losses_leave_the_rates_of_student_and_control_alike(config_files, tmp_path, capsys):
    words = ["--config-file", str(config_files["hr"]), "--output", str(tmp_path), "--dry-run"]
    words += ["SOLVER.MAX_ITER", "1000", "SOLVER.WARMUP_ITERS", "100"]
    words += ["student:SOLVER.MAX_ITER", "20", "control:SOLVER.MAX_ITER", "20"]
    losses = "[{name: ssim, weight: 1.0, warmup_iters: 7}]"
    tool = load_tool("tools.distill")
    tool.main([*words, "student:KD.LOSSES", losses])
    student, control = (
        build_config(str(tmp_path / "configs" / f"{role}.yaml"), [])
        for role in ("student", "control")
    )
    assert student.SOLVER.WARMUP_ITERS == control.SOLVER.WARMUP_ITERS == 2
    assert student.KD.LOSSES[0]["warmup_iters"] == 7  # as it was given
    assert "Warning" not in capsys.readouterr().out
    tool.main([*words, "control:SOLVER.WARMUP_ITERS", "5"])
    assert "student and control differ in SOLVER.WARMUP_ITERS" in capsys.readouterr().out


def derived(config, tmp_path, *words):
    """The configs that the command derives, by role."""
    words = ["--config-file", str(config), "--output", str(tmp_path), "--dry-run", *words]
    load_tool("tools.distill").main(words)
    files = {role: tmp_path / "configs" / f"{role}.yaml" for role in ("teacher", "student")}
    return {role: build_config(str(file), []) for role, file in files.items()}


def test_a_seed_is_that_of_all_roles(config_files, tmp_path):
    expected = ["TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 38.5, 0.2]]"]  # those of HR
    configs = derived(config_files["hr"], tmp_path, "SEED", "7", *expected)
    assert {cfg.SEED for cfg in configs.values()} == {7}
    assert configs["student"].OUTPUT_DIR == str(tmp_path / "student" / "seed_7")
    assert yaml.safe_load((tmp_path / "grid.yaml").read_text())["seeds"] == [7]
    assert configs["student"].TEST.EXPECTED_RESULTS == []


def test_a_roles_schedule_is_that_of_the_processes_that_will_train_it(
    config_files, tmp_path, capsys
):
    keys = ["SOLVER.REFERENCE_WORLD_SIZE", "1", "SOLVER.MAX_ITER", "80", "teacher:SOLVER.MAX_ITER"]
    configs = derived(config_files["hr"], tmp_path, "--num-gpus", "2", *keys, "30")
    # One process, as here, takes twice as many steps, of half the images, as two.
    lengths = {role: cfg.SOLVER.MAX_ITER for role, cfg in configs.items()}
    assert lengths == {"teacher": 60, "student": 80}
    shown = dict(re.findall(r"(?m)^(teacher|student) .* px +(\d+) ", capsys.readouterr().out))
    assert shown == {"teacher": "30", "student": "40"}  # of each of the two


def test_a_cascade_learns_from_images_without_labels(config_files, tmp_path):
    keys = ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG"]
    student = derived(config_files["hr"], tmp_path, "--unlabeled", "tiny_val", *keys, "True")
    unlabeled = student["student"].KD.UNLABELED
    assert unlabeled.IGNORE_SCORE == max(unlabeled.SCORE)


def test_an_unknown_optimizer_is_told_before_anything_is_trained(config_files, tmp_path):
    with pytest.raises(SystemExit, match="distill.py: SOLVER.OPTIMIZER is 'ADAM'; use SGD or ADA"):
        derived(config_files["hr"], tmp_path, "student:SOLVER.OPTIMIZER", "ADAM")


def test_images_without_labels_that_are_not_there(config_files, tmp_path):
    (tmp_path / "cities" / "aachen").mkdir(parents=True)
    for name, words in {
        str(tmp_path / "cities"): "cities' has no images; folders in it are not read",
        "cityscapes_fine_instance_seg_test": "leftImg8bit/test.*' does not exist",
    }.items():
        with pytest.raises(SystemExit, match=f"distill.py: .*{words}"):
            derived(config_files["hr"], tmp_path / "out", "--unlabeled", name)
