"""The demo's plan: which models, trained and measured how, one after which."""

from demo_rows import KEYS
from helpers import ROOT

from msad_kd.config.build import build_config
from projects.Shapes import plan
from projects.Shapes.demo import DATA


def make_plan(tmp_path, screen, recorded, settings=()):
    rows = plan.model_rows(tmp_path, tmp_path / "checkpoints", settings)
    return plan.plan_jobs(
        tmp_path, tmp_path / "checkpoints", rows, list(settings), recorded, screen
    )


def test_student_is_measured_with_the_plain_config_of_its_baseline(tmp_path):
    rows = plan.model_rows(tmp_path, tmp_path / "checkpoints", ["SEED", "2"])
    assert [each["key"] for each in rows] == KEYS
    student, control, baseline = rows[-1], rows[-2], rows[-3]
    assert student["config"] == control["config"] == baseline["config"] == plan.CONFIGS["lr"]
    assert student["options"] == baseline["options"] == ["SEED", "2"]
    assert student["weights"] == str(tmp_path / "student" / "model_final.pth")


def test_plan_of_the_short_demo(tmp_path, screen, monkeypatch):
    monkeypatch.setattr(plan, "count_cores", lambda: 2)
    jobs = make_plan(tmp_path, screen, recorded={"hr": {}, plan.TEACHER: {}})
    assert [job.name for job in jobs[:3]] == ["student", "checkpoints", "LR baseline"]
    control = "LR from the teacher"
    assert [job.after for job in jobs] == [
        *[(), (), (), ()],
        *[("LR baseline",), (control,), ("student",)],
    ]
    student, baseline, started = (jobs[index].command for index in (0, 2, 3))
    place = started.index("MODEL.WEIGHTS")
    assert started[place + 1] == str(tmp_path / "checkpoints" / "teacher_jitter.pth")
    assert started[place + 1] in student
    assert not any(word.startswith("KD.") for word in baseline)
    monkeypatch.setattr(plan, "count_cores", lambda: 1)
    jobs = make_plan(tmp_path, screen, recorded={"hr": {}, plan.TEACHER: {}})
    assert jobs[0].name == "checkpoints"


def test_plan_of_the_full_demo(tmp_path, screen):
    jobs = {job.name: job for job in make_plan(tmp_path, screen, None, ["SOLVER.MAX_ITER", "3"])}
    assert jobs["student"].after == jobs["LR from the teacher"].after == ("teacher",)
    for name in ("stock HR", "teacher, first part"):
        assert jobs[name].after == ("stock HR, first part",)
    assert jobs["teacher"].after == ("teacher, first part",)
    assert jobs["checkpoints"].after == ("teacher", "stock HR")
    trained = [job for job in jobs.values() if "train_net.py" in job.command]
    assert len(trained) == 7
    assert all("SOLVER.MAX_ITER" in job.command for job in trained)


def test_student_and_control_differ_in_the_distillation_alone(monkeypatch):
    monkeypatch.chdir(ROOT)
    student, control = (
        build_config(plan.CONFIGS[name], ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", "same"])
        for name in ("student", "lr-from-teacher")
    )
    assert student.KD.TEACHER.CONFIG_FILE == plan.CONFIGS[plan.TEACHER]
    assert student.KD.TEACHER.WEIGHTS == control.MODEL.WEIGHTS  # both start from these
    student.KD, student.MODEL.WEIGHTS = control.KD, control.MODEL.WEIGHTS
    student.MODEL.META_ARCHITECTURE = control.MODEL.META_ARCHITECTURE
    assert student == control


def test_models_have_the_classes_of_the_data(monkeypatch):
    monkeypatch.chdir(ROOT)
    for config in plan.CONFIGS.values():
        cfg = build_config(config, ["MODEL.DEVICE", "cpu"])
        assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == DATA["classes"]
