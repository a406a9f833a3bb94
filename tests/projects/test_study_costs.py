"""What the study's trainings cost, worked out by hand; no step is timed here."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT

from projects.Shapes import costs, measure, study_report, study_runs
from projects.Shapes.cells import make_cells
from projects.Shapes.costs import training_costs, training_recipes
from projects.Shapes.grid import Grid, Row

HR, STUDENT = "configs/Shapes/hr.yaml", "configs/Shapes/student.yaml"
TEACHER = "projects/Shapes/checkpoints/teacher.pth"


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def loss(name="l1", **fields):
    return {"KD.LOSSES": [{"name": name, **fields}]}


def stages(*teachers, **fields):
    entries = [
        {"name": each, "config_file": f"configs/Shapes/{each}.yaml", "weights": TEACHER, **fields}
        for each in teachers
    ]
    return {"KD.LADDER.STAGES": entries}


@pytest.fixture
def recipe(tmp_path):
    def recipe(options, config=STUDENT, **fields):
        rows = {"a": Row("a", "A", config, config, options, seeds=(1,), **fields)}
        data = {"train": 1, "val": 1}
        return make_cells(Grid(data, rows, [], []), tmp_path)["a/1"].recipe

    return recipe


def test_what_a_step_costs_does_not_depend_on(recipe):
    same = recipe({"KD.TEACHER.WEIGHTS": TEACHER, **loss(weight=0.6, warmup_iters=100)})
    for options in (
        {"SOLVER.MAX_ITER": 7, "SOLVER.STEPS": [3], "SOLVER.BASE_LR": 0.5, "SEED": 9},
        {"MODEL.WEIGHTS": "other.pth", "KD.TEACHER.WEIGHTS": "other.pth"},
    ):
        assert recipe({**loss(weight=7.0), **options}) == same
    ladder = stages("teacher", "hr", losses=[{"name": "l1", "weight": 1.0}], iterations=5)
    other = stages("teacher", "hr", losses=[{"name": "l1", "weight": 3.0}], iterations=5)
    for each in other["KD.LADDER.STAGES"]:
        each |= {"weights": "other.pth", "base_lr": 0.5}
    assert recipe(ladder) == recipe(other)


def test_what_a_step_costs_depends_on(recipe):
    students = [
        *(loss(weight=0.6), loss("ssim", weight=0.6), loss(weight=0.6, levels=["p2"])),
        *({"KD.TEACHER.BRANCH": "hr"}, {"SOLVER.IMS_PER_BATCH": 1}),
        *(stages("teacher", "hr"), stages("teacher")),
        stages("teacher", "hr", iterations=5),
        # Beside a stage that names its iterations, these are another share of the ladder.
        *({**stages("hr"), "SOLVER.MAX_ITER": count} for count in (5, 9)),
    ]
    different = [recipe(options) for options in students] + [recipe({}, config=HR)]
    different.append(recipe(stages("teacher", "hr"), ladder_control="reversed"))
    assert len(set(different)) == len(different)


def row(name, seeds=(1,), config="c", **fields):
    return Row(name, f"the {name}", config, config, seeds=seeds, **fields)


def cell(row, *needs, recipe="slow", iterations=100, folder=None):
    fields = {"row": row, "needs": needs, "recipe": recipe, "iterations": iterations}
    if folder is not None:
        fields |= {"folder": folder, "weights": folder / row.name, "options": []}
    return SimpleNamespace(**fields)


@pytest.fixture
def of_config(monkeypatch):
    """Checkpoints are made by 1,000 slow steps of each config, but 5,000 of the first."""
    counts = {"start": 5000, "hr": 1000, "teacher": 1000}
    monkeypatch.setattr(costs, "config_recipe", lambda config: ("slow", counts[config]))


def test_shared_ancestors_count_once(of_config):
    grid = Grid(
        {},
        {
            "hr": row("hr", (), checkpoint="hr.pth", trained_by=("start", "hr")),
            "teacher": row("teacher", (), checkpoint="t.pth", trained_by=("start", "teacher")),
            "lr": row("lr"),
            "from-teacher": row("from-teacher"),
            "target": row("target"),
            "ladder": row("ladder"),
            "branch": row("branch", (), checkpoint="{from-teacher}"),
            "untimed": row("untimed"),
            "after": row("after"),
        },
        [],
        [],
    )
    needs = {
        "from-teacher": ["teacher/0"],
        "target": ["from-teacher/1", "teacher/0"],
        "ladder": ["teacher/0", "hr/0"],
        "branch": ["from-teacher/1"],
        "after": ["untimed/1"],
    }
    cells = {
        f"{name}/{(each.seeds or (0,))[0]}": cell(
            *(each, *needs.get(name, ())),
            recipe={"lr": "fast", "untimed": "unknown"}.get(name, "slow"),
        )
        for name, each in grid.rows.items()
    }
    results = {"steps": {"seconds": {"slow": [0.2, 0.4, 0.3], "fast": [0.1]}}}
    found = {
        name: tuple(round(cost, 6) for cost in pair)
        for name, pair in training_costs(grid, cells, results).items()
    }
    assert found == {  # 0.3 s a step
        "hr": (1800, 1800),
        "teacher": (1800, 1800),
        "lr": (10, 10),
        "from-teacher": (30, 1830),
        "target": (30, 1860),  # the teacher once
        "ladder": (30, 2130),  # what hr and teacher both start from once: 7,000 steps
        "branch": (30, 1830),  # as the row whose checkpoint it is
    }


class Timer:
    """Stands in for `run_jobs`: notes what is timed, and that it took a second a step."""

    def __init__(self):
        self.timed = []

    def __call__(self, jobs, slots, screen):
        for job in jobs:
            rows = json.loads(job.command[-1])["rows"]
            self.timed.append([row["key"] for row in rows])
            job.folder.mkdir(exist_ok=True)
            content = {"device": "no GPU", "seconds": {row["key"]: [1.0] for row in rows}}
            (job.folder / "results.json").write_text(json.dumps(content))
            job.done()


@pytest.fixture
def timer(monkeypatch):
    timer = Timer()
    monkeypatch.setattr(study_runs, "run_jobs", timer)
    monkeypatch.setattr(study_report, "write", lambda *_: None)
    return timer


def study_of(folder, **recipes):
    cells = {f"{k}/1": cell(row(k), recipe=each, folder=folder) for k, each in recipes.items()}
    return study_runs.Study(None, cells, folder, SimpleNamespace(say=lambda _: None), 5)


def test_steps_are_timed_together(tmp_path, timer):
    study = study_of(tmp_path, a="A", b="B", c="A", d="D", e="E")
    study.time_steps(["a/1", "c/1"])
    assert timer.timed == [["A"]]  # which cost the same, so once
    study.time_steps(["c/1"])
    assert len(timer.timed) == 1
    # What is done is timed beside what is asked for, so that all ratios are of one process.
    study.results["cells"] = {"a/1": {}, "b/1": {}}
    study.time_steps(["d/1"])
    assert timer.timed[1:] == [["A", "B", "D"]]
    study.time_steps(["a/1"])
    study.time_steps(["d/1"])
    assert len(timer.timed) == 2
    assert study.results["steps"]["seconds"].keys() == {"A", "B", "D"}

    changed = study_of(tmp_path, a="A", b="B2", d="D")
    changed.results |= {"cells": study.results["cells"], "steps": study.results["steps"]}
    changed.time_steps(["a/1"])
    assert timer.timed[2:] == [["A", "B2"]]


def test_times_are_not_mixed_with_another_machines(tmp_path):
    content = {"cells": {}, "steps": {"device": "theirs", "seconds": {"A": [1.0]}}}
    (tmp_path / "another.json").write_text(json.dumps(content))
    study = study_of(tmp_path, a="A")
    study.take(tmp_path / "another.json")
    assert study.results["steps"]["device"] == "theirs"
    study.results["steps"] = {"device": "ours", "seconds": {"B": [1.0]}}
    study.take(tmp_path / "another.json")
    assert study.results["steps"] == {"device": "ours", "seconds": {"B": [1.0]}}


def test_recipes_leave_out_what_cannot_start(tmp_path, of_config):
    teacher = row("teacher", (), checkpoint="t.pth", trained_by=("start", "teacher"))
    cells = {
        "teacher/0": cell(teacher, folder=tmp_path),
        "student/1": cell(row("student"), "teacher/0", recipe="S", folder=tmp_path),
        "again/1": cell(row("again"), "student/1", recipe="G", folder=tmp_path),
        "lr/1": cell(row("lr"), recipe="L", folder=tmp_path),
    }
    (tmp_path / "teacher").touch()
    asked = {"teacher", "student", "again"}
    assert training_recipes(cells, asked) == [
        {"key": "slow", "config": "start", "options": ["MODEL.WEIGHTS", ""]},
        {"key": "S", "config": "c", "options": []},
    ]


def test_a_gpu_is_waited_for(monkeypatch):
    events = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("finished"))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: events.append("read") or 1.0)
    assert measure.finished_clock() == 1.0 and events == ["finished", "read"]
