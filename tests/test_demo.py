"""The demo: its arithmetic, its jobs, what it says when something is wrong; a tiny run of all."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from msad_kd.setup import build_config
from projects.Shapes import measure, pictures, plan, records, report
from projects.Shapes.demo import DATA, RESULTS, make_data, parse_arguments
from projects.Shapes.generate import generate
from projects.Shapes.jobs import (
    CONSOLE,
    DemoError,
    Job,
    Screen,
    clock,
    evaluation_progress,
    last_error,
    run_jobs,
    training_progress,
    typed,
)

ROOT = Path(__file__).resolve().parents[1]
KEYS = ["hr", "teacher-hr", "teacher-lr", "teacher-fused", "lr", "student"]


def ap(box, mask):
    """What `measure.py` tells of a model, as far as it matters."""
    return {"bbox": {"AP": box}, "segm": {"AP": mask}}


def row(key, box, mask, gmacs=0.5):
    """A row of `table.json`."""
    return {
        "key": key,
        "model": f"model {key}",
        "side": "64",
        "box": {"AP": box, "APs": box, "APm": box, "APl": None},
        "mask": {"AP": mask},
        "gmacs": gmacs,
        "params_m": 1.5,
        "latency_ms": {"median": 41.2, "low": 38.7, "high": 44.4},
    }


@pytest.fixture
def screen():
    with open(os.devnull, "w") as nowhere:
        yield Screen(nowhere)


# -- arithmetic and words


def test_gap_closed_is_the_share_of_the_distance_to_the_hr_model():
    assert report.gap_closed(student=36.0, baseline=34.0, high=44.0) == pytest.approx(0.2)
    assert report.gap_closed(student=33.0, baseline=34.0, high=44.0) == pytest.approx(-0.1)
    assert report.gap_closed(student=36.0, baseline=34.0, high=34.0) is None


def test_gaps_of_a_table():
    rows = [row("hr", 44, 40), row("lr", 34, 30), row("teacher-hr", 50, 50), row("student", 36, 35)]
    closed = report.gaps(rows)
    assert closed == pytest.approx({"box": 0.2, "mask": 0.5})
    assert "box AP 20 %, mask AP 50 %" in report.gap_sentence(closed)
    assert "cannot be told" in report.gap_sentence({"box": None, "mask": 0.5})


def test_table_has_a_dash_for_sizes_that_do_not_occur():
    header, _, line = report.table([row("lr", 34.04, 33.96, gmacs=0.1234)]).splitlines()
    names = [cell.strip() for cell in header.strip("|").split("|")]
    cells = dict(zip(names, [cell.strip() for cell in line.strip("|").split("|")]))
    assert cells == {
        "model": "model lr",
        "test side (px)": "64",
        "box AP": "34.0",
        "mask AP": "34.0",
        "APs": "34.0",
        "APm": "34.0",
        "APl": "-",
        "GMACs": "0.12",
        "params (M)": "1.50",
        "latency (ms)": "41 (39-44)",
    }


def test_markdown_tells_what_a_reader_needs_to_repeat_it():
    rows = [row("hr", 44, 40), row("lr", 34, 30), row("student", 36, 35)]
    run = {"iterations": 1200, "batch_size": 8, "seed": 1, "full": False, "data": {"train": 300}}
    run |= {"device": "no GPU", "machine": "some CPU, 2 cores", "seconds": 725}
    text = report.markdown({"rows": rows, "gap_closed": report.gaps(rows), "run": run})
    for part in ("1200 iterations of 8 images, seed 1", "train 300", "some CPU, 2 cores", "12:05"):
        assert part in text
    assert "one CPU thread" in text and "model student" in text


def test_machine_names_versions():
    assert f"torch {torch.__version__.partition('+')[0]}" in report.machine("no GPU")


def test_clock():
    assert [clock(seconds) for seconds in (0, 65, 3600, 7322.4)] == [
        "0:00",
        "1:05",
        "1:00:00",
        "2:02:02",
    ]


def test_verification_within_the_tolerance():
    sentence = report.verify("teacher, fused", "t.pth", ap(44.5, 43.0), ap(44.65, 42.85))
    assert sentence.startswith("teacher, fused: box AP 44.5, mask AP 43.0, as recorded")


@pytest.mark.parametrize("box, mask, said", [(44.1, 43.0, "box AP 44.1"), (44.5, 40, "mask AP 40")])
def test_verification_names_the_file_and_both_numbers(box, mask, said):
    with pytest.raises(DemoError, match=rf"teacher has {said}.* here, but .* beside 't.pth'"):
        report.verify("teacher", "t.pth", ap(box, mask), ap(44.5, 43.0))


def test_verification_refuses_nan():
    with pytest.raises(DemoError):
        report.verify("teacher", "t.pth", ap(float("nan"), 43.0), ap(44.5, 43.0))


# -- what is measured


def test_sizes_present():
    assert measure.sizes_present([100, 1023]) == {"APs"}
    assert measure.sizes_present([100, 5000, 20000]) == {"APs", "APm", "APl"}


def test_nothing_found_is_ap_0_and_nothing_there_is_none():
    metrics = dict.fromkeys(measure.METRICS, float("nan")) | {"AP50": 12.5}
    tidy = measure.tidy_metrics(metrics, {"APs"})
    assert tidy == {"AP": 0.0, "AP50": 12.5, "AP75": 0.0, "APs": 0.0, "APm": None, "APl": None}


def test_gmacs_of_a_convolution_and_a_linear_layer():
    conv, linear = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Linear(4, 5)

    def model(batch):
        return linear(conv(batch[0]).mean(dim=(2, 3)))

    inputs = [torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 16)]
    macs = [side * 3 * 4 * 9 + 4 * 5 for side in (8 * 8, 8 * 16)]
    assert measure.count_gmacs(model, inputs) * 1e9 == pytest.approx(np.mean(macs))


def test_models_are_timed_in_turn_on_the_same_images():
    calls = []
    models = {name: lambda batch, name=name: calls.append((name, *batch)) for name in "ab"}
    times = measure.time_models(models, {name: [10, 20, 30] for name in "ab"})
    assert set(times) == {"a", "b"} and set(times["a"]) == {"median", "low", "high"}
    rounds = [calls[i : i + 2] for i in range(0, len(calls), 2)]
    assert len(rounds) == 3 + measure.WARM_UP_ROUNDS
    assert all(one[1] == other[1] and {one[0], other[0]} == {"a", "b"} for one, other in rounds)
    assert len({pair[0][0] for pair in rounds}) == 2  # neither is always the first


def test_sides_of_what_each_branch_sees():
    inputs = {"image": torch.zeros(3, 128, 256), "image_lr": torch.zeros(3, 64, 128)}
    assert measure.input_sides(inputs, "hr") == "128"
    assert measure.input_sides(inputs, "lr") == "64"
    assert measure.input_sides(inputs, "fused") == "128 + 64"
    assert measure.input_sides({"image": torch.zeros(3, 64, 80)}, None) == "64"


# -- pictures


def test_scenes_are_chosen_by_their_number_of_objects():
    counts = [3, 9, 5, 9, 1, 7] + [0] * 44 + [99]
    assert pictures.choose_scenes(counts) == [1, 2, 3, 5]
    assert pictures.choose_scenes([2, 2], scenes=1) == [0]


def test_masks_do_not_cover_what_is_surer():
    masks = np.array([[[1, 1, 0, 0]], [[0, 1, 1, 0]], [[0, 1, 0, 0]]], bool)
    left, labels = pictures._uncovered(masks, [4, 2, 3])
    assert labels == [4, 2]
    assert np.array_equal(left, np.array([[[1, 1, 0, 0]], [[0, 0, 1, 0]]], bool))
    assert pictures._uncovered(np.zeros((0, 1, 4), bool), []) == ([], [])


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_labels_do_not_overlap(tmp_path, monkeypatch, spread):
    figures = []
    monkeypatch.setattr(pictures.plt, "close", figures.append)
    gmacs = [0.42, 0.36, 0.13, 0.48, 0.13, 0.13]
    box = [44.5, 45.5, 34.4, 45.7, 33.9, 34.1]
    rows = [row(key, spread * b, spread * b, g) for key, b, g in zip(KEYS, box, gmacs)]
    pictures.draw_ap_cost(tmp_path / "ap_cost.png", rows)
    assert cv2.imread(str(tmp_path / "ap_cost.png")) is not None
    renderer = figures[0].canvas.get_renderer()
    for axis in figures[0].axes:
        boxes = [super(type(t), t).get_window_extent(renderer) for t in axis.texts]
        assert len(boxes) == 6
        for index, one in enumerate(boxes):
            assert not any(one.overlaps(other) for other in boxes[index + 1 :])
    monkeypatch.undo()
    plt.close(figures[0])


# -- jobs


def python(code, *arguments):
    return [sys.executable, "-c", code, *map(str, arguments)]


def test_jobs_run_in_order_no_more_than_slots_and_after_those_they_wait_for(tmp_path, screen):
    log, done = tmp_path / "log", []
    # `a` and `c` end only after both have started, so each needs the other beside it.
    code = """
import sys, time
path, name = sys.argv[1:]
def write(event):
    with open(path, "a") as log:
        log.write(f"{event} {name}\\n")
write("start")
deadline = time.monotonic() + 30
while name in "ac" and time.monotonic() < deadline:
    if {"start a", "start c"} <= set(open(path).read().splitlines()):
        break
    time.sleep(0.05)
else:
    assert name not in "ac"
write("end")
"""

    def job(name, *after):
        command = python(code, log, name)
        return Job(name, command, tmp_path / name, after=after, done=lambda: done.append(name))

    run_jobs([job("a"), job("b", "c"), job("c"), job("d")], 2, screen)
    events = [line.split() for line in log.read_text().splitlines()]
    running, most = set(), 0
    for _, name in events:
        running ^= {name}
        most = max(most, len(running))
    assert most == 2 and sorted(done) == list("abcd")
    assert {name for _, name in events[:2]} == {"a", "c"}
    assert events.index(["end", "c"]) < events.index(["start", "b"])


def test_jobs_get_one_thread_and_an_empty_folder(tmp_path, screen):
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "metrics.json").write_text("of an earlier run")
    code = "import os, sys; print(os.environ['OMP_NUM_THREADS'], os.listdir(sys.argv[1]))"
    run_jobs([Job("job", python(code, folder), folder)], 1, screen)
    assert (folder / CONSOLE).read_text().strip() == f"1 ['{CONSOLE}']"


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


SLEEPER = """
import os, sys, time
open(sys.argv[1], "w").write(str(os.getpid()))
time.sleep(60)
"""


def wait_for(path):
    for _ in range(200):
        if path.exists() and path.read_text():
            return int(path.read_text())
        time.sleep(0.05)
    raise AssertionError(f"{path} was not written")


def test_a_failure_stops_the_others_and_names_log_and_error(tmp_path, screen):
    failing = f"""
import os, time
while not os.path.exists({str(tmp_path / "pid")!r}):
    time.sleep(0.05)
time.sleep(0.2)
raise KeyError("no such thing")
"""
    jobs = [
        Job("sleeper", python(SLEEPER, tmp_path / "pid"), tmp_path / "sleeper"),
        Job("bad", python(failing), tmp_path / "bad"),
    ]
    with pytest.raises(
        DemoError, match="bad failed; .*bad/console.txt': KeyError: 'no such thing'"
    ):
        run_jobs(jobs, 2, screen)
    assert not is_running(wait_for(tmp_path / "pid"))


def test_a_watch_that_objects_stops_the_jobs(tmp_path, screen):
    def watch():
        if (tmp_path / "pid").exists():
            raise DemoError("another AP than recorded")

    job = Job("sleeper", python(SLEEPER, tmp_path / "pid"), tmp_path / "sleeper", watch=watch)
    with pytest.raises(DemoError, match="another AP"):
        run_jobs([job], 1, screen)
    assert not is_running(wait_for(tmp_path / "pid"))


def test_a_killed_job_is_told_as_such(tmp_path, screen):
    code = "import os; os.kill(os.getpid(), 9)"
    with pytest.raises(DemoError, match="bad was ended by signal 9, perhaps for want of memory"):
        run_jobs([Job("bad", python(code), tmp_path / "bad")], 1, screen)


def test_a_job_that_waits_for_nothing_that_runs_is_an_error(tmp_path, screen):
    with pytest.raises(ValueError, match="b waits"):
        run_jobs([Job("b", python(""), tmp_path / "b", after=("a",))], 1, screen)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ending_the_demo_ends_what_it_started(tmp_path, number):
    code = f"""
import sys
from pathlib import Path
from projects.Shapes import demo
from projects.Shapes.jobs import Job, run_jobs

command = [sys.executable, "-c", {SLEEPER!r}, {str(tmp_path / "pid")!r}]
job = Job("sleeper", command, Path({str(tmp_path / "sleeper")!r}))
demo.run = lambda args, screen: run_jobs([job], 1, screen)
demo.main([])
"""
    process = subprocess.Popen(
        python(code), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    pid = wait_for(tmp_path / "pid")
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "demo.py: " in output and "Traceback" not in output
    assert not is_running(pid)


def test_progress_of_a_training(tmp_path):
    assert training_progress(tmp_path) == ""
    (tmp_path / "config.yaml").write_text("SOLVER:\n  MAX_ITER: 1200\n")
    line = json.dumps({"iteration": 59, "total_loss": 2.374, "eta_seconds": 783.5})
    (tmp_path / "metrics.json").write_text(f'{line}\n{{"iteration": 79, "total_lo')
    assert training_progress(tmp_path) == "60/1200, loss 2.37, 13:04 left"


def test_progress_of_an_evaluation(tmp_path):
    progress = partial(evaluation_progress, models=4)
    assert progress(tmp_path) == ""
    first = "Start inference on 9 batches\nInference done 8/9. Dataloading\nEvaluation results\n"
    (tmp_path / "log.txt").write_text(first)
    assert progress(tmp_path) == "8/9 images, model 1 of 4"
    (tmp_path / "log.txt").write_text(first + "Start inference on 9 batches\n")
    assert progress(tmp_path) == ""
    (tmp_path / "log.txt").write_text(2 * first)
    assert progress(tmp_path) == "8/9 images, model 2 of 4"


def test_last_error_passes_over_what_follows_it(tmp_path):
    log = tmp_path / "log"
    log.write_text("[10:00 d2.x]: ok\nTraceback\nValueError: too small\n[W1120] warning\n\n")
    assert last_error(log) == "ValueError: too small"
    log.write_text("[10:00 d2.x]: ok\ntrain_net.py: the file 'x' does not exist\n")
    assert last_error(log) == "train_net.py: the file 'x' does not exist"
    assert last_error(tmp_path / "absent") == "it printed nothing"


def test_commands_are_shown_as_typed(monkeypatch):
    monkeypatch.chdir(ROOT)
    command = [str(ROOT / ".venv/bin/python"), "train_net.py", "DATASETS.TEST", "()"]
    assert typed(command) == ".venv/bin/python train_net.py DATASETS.TEST '()'"


# -- the plan


def make_plan(tmp_path, screen, recorded, settings=()):
    rows = plan.model_rows(tmp_path, tmp_path / "checkpoints", settings)
    return plan.plan_jobs(
        tmp_path, tmp_path / "checkpoints", rows, list(settings), recorded, screen
    )


def test_student_is_measured_with_the_plain_config_of_its_baseline(tmp_path):
    rows = plan.model_rows(tmp_path, tmp_path / "checkpoints", ["SEED", "2"])
    assert [each["key"] for each in rows] == KEYS
    student, baseline = rows[-1], rows[-2]
    assert student["config"] == baseline["config"] == "configs/Shapes/lr.yaml"
    assert student["options"] == baseline["options"] == ["SEED", "2"]
    assert student["weights"] == str(tmp_path / "student" / "model_final.pth")


def test_plan_of_the_short_demo(tmp_path, screen, monkeypatch):
    monkeypatch.setattr(plan, "count_cores", lambda: 2)
    jobs = make_plan(tmp_path, screen, recorded={"hr": {}, "teacher": {}})
    assert [job.name for job in jobs[:3]] == ["student", "checkpoints", "LR baseline"]
    assert [job.after for job in jobs] == [(), (), (), ("LR baseline",), ("student",)]
    student, baseline = jobs[0].command, jobs[2].command
    assert str(tmp_path / "checkpoints" / "teacher.pth") in student
    assert not any(word.startswith("KD.") for word in baseline)
    monkeypatch.setattr(plan, "count_cores", lambda: 1)
    jobs = make_plan(tmp_path, screen, recorded={"hr": {}, "teacher": {}})
    assert jobs[0].name == "checkpoints"


def test_plan_of_the_full_demo(tmp_path, screen):
    jobs = {job.name: job for job in make_plan(tmp_path, screen, None, ["SOLVER.MAX_ITER", "3"])}
    assert jobs["student"].after == ("teacher",)
    assert jobs["teacher"].after == ("stock HR",)
    assert jobs["checkpoints"].after == ("teacher",)
    trained = [job for job in jobs.values() if "train_net.py" in job.command]
    assert len(trained) == 4
    assert all("SOLVER.MAX_ITER" in job.command for job in trained)


def test_lr_baseline_and_student_differ_in_the_distillation_alone(monkeypatch):
    monkeypatch.chdir(ROOT)
    baseline, student = (
        build_config(plan.CONFIGS[name], ["MODEL.DEVICE", "cpu"]) for name in ("lr", "student")
    )
    student.MODEL.META_ARCHITECTURE = baseline.MODEL.META_ARCHITECTURE
    student.KD, student.OUTPUT_DIR = baseline.KD, baseline.OUTPUT_DIR
    assert student == baseline


def test_models_have_the_classes_of_the_data(monkeypatch):
    monkeypatch.chdir(ROOT)
    for config in plan.CONFIGS.values():
        cfg = build_config(config, ["MODEL.DEVICE", "cpu"])
        assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == DATA["classes"]


# -- checkpoints and data


def write_records(folder, **results):
    folder.mkdir(exist_ok=True)
    for name, found in results.items():
        (folder / f"{name}.pth").touch()
        (folder / f"{name}.json").write_text(json.dumps({"command": "c", "results": found}))


def test_absent_checkpoint_is_told_with_the_way_out(tmp_path):
    with pytest.raises(DemoError, match=r"hr.pth' does not exist.*make demo-full"):
        records.read(tmp_path)


def test_record_without_all_branches_is_refused(tmp_path):
    write_records(tmp_path, hr={"hr": ap(44, 43)}, teacher={"hr": ap(1, 1), "lr": ap(1, 1)})
    with pytest.raises(DemoError, match="'.*teacher.json' lacks the AP"):
        records.read(tmp_path)


def test_record_is_completed_by_what_is_measured(tmp_path):
    write_records(tmp_path, hr={}, teacher={})
    rows = {key: ap(index, index) for index, key in enumerate(KEYS[:4])}
    records.complete(tmp_path, {"device": "no GPU", "rows": rows})
    found = records.read(tmp_path)
    assert found["hr"]["results"] == {"hr": ap(0, 0)}
    assert found["teacher"]["results"] == {"hr": ap(1, 1), "lr": ap(2, 2), "fused": ap(3, 3)}
    assert found["teacher"]["command"] == "c" and "no GPU" in found["hr"]["machine"]


def test_announcer_tells_each_model_once_and_checks_it(tmp_path, capsys):
    rows = plan.model_rows(tmp_path, tmp_path, [])[:4]
    recorded = {"hr": {"results": {"hr": ap(44, 43)}}}
    recorded["teacher"] = {"results": {name: ap(45, 44) for name in ("hr", "lr", "fused")}}
    announce = plan.Announcer(tmp_path, rows, Screen(), recorded)
    announce()
    results = {"rows": {"hr": ap(44.1, 43)}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    announce()
    announce()
    assert capsys.readouterr().out.count("stock HR, p2-p6: box AP 44.1") == 1
    results["rows"]["teacher-lr"] = ap(45, 40)
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(DemoError, match="teacher, LR branch has mask AP 40.0 here"):
        announce()


def test_other_data_in_the_folder_is_not_replaced_unasked(tmp_path, monkeypatch, screen):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    generate(tmp_path / "shapes", train=1, val=1, progress=False)
    with pytest.raises(DemoError, match=r"other arguments.*--overwrite.*DETECTRON2_DATASETS"):
        make_data(parse_arguments(["--train", "1", "--val", "1"]), screen)


# -- all of it


def run_demo(output, *arguments):
    """A demo with a few scenes and steps; (exit status, what it printed)."""
    few = ["--train", "6", "--val", "5", "--set", "SOLVER.IMS_PER_BATCH", "2"]
    command = [sys.executable, "projects/Shapes/demo.py", "--output", str(output), *few, *arguments]
    environment = {**os.environ, "DETECTRON2_DATASETS": str(output / "datasets")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def full_demo(tmp_path_factory):
    """The folder of a tiny `demo.py --full`, which leaves checkpoints, and what it printed."""
    output = tmp_path_factory.mktemp("demo")
    status, printed = run_demo(output, "--full", "--set", "SOLVER.MAX_ITER", "2")
    assert status == 0, printed
    return output, printed


def check_results(folder, printed, iterations):
    for name in RESULTS:
        assert (folder / name).stat().st_size > 0
    summary = json.loads((folder / "table.json").read_text())
    assert [each["key"] for each in summary["rows"]] == KEYS
    assert summary["run"]["iterations"] == iterations
    by_key = {each["key"]: each for each in summary["rows"]}
    for kind in ("box", "mask"):
        student, baseline, high = (by_key[key][kind]["AP"] for key in ("student", "lr", "hr"))
        expected = None if high <= baseline else (student - baseline) / (high - baseline)
        assert summary["gap_closed"][kind] == pytest.approx(expected)
    assert by_key["student"]["params_m"] == by_key["lr"]["params_m"] == by_key["hr"]["params_m"]
    assert by_key["teacher-fused"]["side"] == "128 + 64" and by_key["student"]["side"] == "64"
    text = (folder / "table.md").read_text()
    assert text in printed and all(each["model"] in text for each in summary["rows"])
    for name in ("scenes.png", "ap_cost.png"):
        assert cv2.imread(str(folder / name)).std() > 10


@pytest.mark.long
def test_full_demo(full_demo):
    output, printed = full_demo
    check_results(output / "demo-full", printed, iterations=2)
    found = records.read(output / "demo-full" / "checkpoints")
    assert "configs/Shapes/teacher.yaml" in found["teacher"]["command"]
    size = sum(path.stat().st_size for path in (output / "demo-full" / "checkpoints").iterdir())
    assert size < 10e6


@pytest.mark.long
def test_demo_from_checkpoints(full_demo):
    output, _ = full_demo
    checkpoints = output / "demo-full" / "checkpoints"
    status, printed = run_demo(
        output, "--checkpoints", str(checkpoints), "--set", "SOLVER.MAX_ITER", "3"
    )
    assert status == 0, printed
    assert "there already, kept" in printed and printed.count("as recorded") == 4
    check_results(output / "demo", printed, iterations=3)
    assert "loss_kd" in (output / "demo" / "student" / "metrics.json").read_text()
    assert "loss_kd" not in (output / "demo" / "lr" / "metrics.json").read_text()


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_demo_stops_where_a_checkpoint_is_not_what_was_recorded(full_demo, tmp_path):
    output, _ = full_demo
    for path in (output / "demo-full" / "checkpoints").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    record = json.loads((tmp_path / "hr.json").read_text())
    record["results"]["hr"]["segm"]["AP"] = 50.0
    (tmp_path / "hr.json").write_text(json.dumps(record))
    status, printed = run_demo(
        output, "--checkpoints", str(tmp_path), "--set", "SOLVER.MAX_ITER", "100000"
    )
    assert status == 1
    assert printed.splitlines()[-1].startswith("demo.py: stock HR, p2-p6 has mask AP ")
    assert not (output / "demo" / "table.md").exists()
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")]
    assert not any(str(output / "demo").encode() in command for command in commands)
