"""The configs that distill.py derives: student and control stay comparable."""

from helpers import load_tool

from msad_kd.config.build import build_config


def test_given_losses_leave_the_rates_of_student_and_control_alike(
    config_files, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("DETECTRON2_DATASETS", "datasets")  # undo what the command does to it
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
