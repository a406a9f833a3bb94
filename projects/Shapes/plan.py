"""What the demo compares, and the trainings and evaluations that takes."""

import json
import sys
from functools import partial

from projects.Shapes import records, report
from projects.Shapes.jobs import Job, count_cores
from projects.Shapes.progress import evaluation_progress, training_progress

TEACHER = "teacher_jitter"
NAMES = {
    "hr_start": "stock HR, first part",
    "hr": "stock HR",
    "teacher": "teacher, first part",
    TEACHER: "teacher",
    "lr": "LR baseline",
    "lr-from-teacher": "LR from the teacher",  # from its weights; the student's strictest control
    "student": "student",
}
CONFIGS = {name: f"configs/Shapes/{name}.yaml" for name in NAMES}
# With images of several sizes, as this teacher has had.
CONFIGS["lr-from-teacher"] = "configs/Shapes/lr_from_teacher.yaml"
CONFIGS["student"] = "configs/Shapes/student_jitter.yaml"
ORIGINS = {"hr": "hr_start", "teacher": "hr_start", TEACHER: "teacher"}  # what each goes on from
# By the demo, whether or not the others come from checkpoints.
TRAINED = ("lr", "lr-from-teacher", "student")


def model_rows(folder, checkpoints, settings):
    """The table's rows, each with what `measure.py` makes its model of.

    The student's config is that of the LR baseline: it is a stock model.

    Args:
        folder: where the demo trains.
        checkpoints: the folder of `hr.pth` and the teacher's.
        settings: KEY VALUE pairs on top of each config.
    """

    def row(key, model, config, weights, *options):
        return {
            "key": key,
            "model": model,
            "config": CONFIGS[config],
            "weights": str(weights),
            "options": [*settings, *options],
        }

    hr, teacher = checkpoints / "hr.pth", checkpoints / f"{TEACHER}.pth"
    branch = "MODEL.MULTI_RESOLUTION.TEST_BRANCH"
    return [
        row("hr", "stock HR, p2-p6", "hr", hr),
        row(f"{TEACHER}-hr", "teacher, HR branch", TEACHER, teacher, branch, "hr"),
        row(f"{TEACHER}-lr", "teacher, LR branch", TEACHER, teacher, branch, "lr"),
        row(f"{TEACHER}-fused", "teacher, fused", TEACHER, teacher, branch, "fused"),
        *(row(key, NAMES[key], "lr", folder / key / "model_final.pth") for key in TRAINED),
    ]


def training_job(name, folder, settings, extra=(), **keywords):
    """An ordinary run of `train_net.py`; what it trained is measured afterwards, not by the run."""
    run = folder / name
    command = [sys.executable, "train_net.py", "--config-file", CONFIGS[name], *settings, *extra]
    command += ["DATASETS.TEST", "()", "OUTPUT_DIR", str(run)]
    return Job(NAMES[name], command, run, progress=training_progress, **keywords)


def measuring_job(name, task, folder, rows, **keywords):
    """A run of `measure.py`."""
    content = json.dumps({"task": task, "folder": str(folder), "rows": rows})
    progress = partial(evaluation_progress, models=len(rows))
    command = [sys.executable, "projects/Shapes/measure.py", content]
    return Job(name, command, folder, progress=progress, **keywords)


def read_results(folder):
    """What `measure.py` has written so far."""
    path = folder / "results.json"
    return json.loads(path.read_text()) if path.exists() else {"rows": {}}


class Announcer:
    """Tells the AP of each model as soon as it is measured; checks it where it was recorded."""

    def __init__(self, folder, rows, screen, recorded=None):
        self.folder, self.screen, self.recorded = folder, screen, recorded
        self.rows = {row["key"]: row for row in rows}
        self.told = set()

    def __call__(self):
        for key, results in read_results(self.folder)["rows"].items():
            if key not in self.told:
                self.told.add(key)
                self.screen.say(self._sentence(self.rows[key], results))

    def _sentence(self, row, results):
        if self.recorded:
            checkpoint, _, branch = row["key"].partition("-")
            there = self.recorded[checkpoint]["results"][branch or checkpoint]
            return report.verify(row["model"], row["weights"], results, there)
        box, mask = results["bbox"]["AP"], results["segm"]["AP"]
        return f"{row['model']}: box AP {box:.1f}, mask AP {mask:.1f}"


def evaluation_job(name, folder, rows, screen, recorded=None, **keywords):
    """A run of `measure.py` that is told of, and checked, model by model."""
    watch = Announcer(folder, rows, screen, recorded)
    return measuring_job(name, "evaluate", folder, rows, watch=watch, **keywords)


def plan_jobs(folder, checkpoints, rows, settings, recorded, screen):
    """All that runs side by side, the trainings and the evaluations, in the order of starting.

    Args:
        folder, checkpoints, settings: as in `model_rows`.
        rows: from `model_rows`.
        recorded: what the checkpoints have to give; None if they are to be trained.
        screen: to tell of results.
    """
    known = rows[: -len(TRAINED)]
    teacher = str(checkpoints / f"{TEACHER}.pth")
    kd = ["KD.TEACHER.WEIGHTS", teacher]
    # The demo evaluates the teacher itself; once is enough.
    kd += ["KD.TEACHER.EVAL_BEFORE_TRAIN", "False"]
    if settings:
        kd += ["KD.TEACHER.OPTS", repr(settings)]
    student = training_job("student", folder, settings, kd)
    baseline = training_job("lr", folder, settings)
    control = training_job("lr-from-teacher", folder, settings, ["MODEL.WEIGHTS", teacher])
    evaluations = [
        evaluation_job(
            f"{row['model']}, evaluation",
            folder / f"{row['key']}-evaluation",
            [row],
            screen,
            after=(row["model"],),
        )
        for row in rows[-len(TRAINED) :]
    ]
    check = evaluation_job("checkpoints", folder / "known", known, screen, recorded)
    if recorded:
        # The student takes longest. With a single core, what may stop the demo comes first.
        first = [check, student] if count_cores() == 1 else [student, check]
        return [*first, baseline, control, *evaluations]
    parts = {"hr_start": training_job("hr_start", folder, settings)}
    for name, origin in ORIGINS.items():
        start = ["MODEL.WEIGHTS", str(folder / origin / "model_final.pth")]
        parts[name] = training_job(name, folder, settings, start, after=(NAMES[origin],))
    for name in ("hr", TEACHER):
        parts[name].done = partial(records.write_checkpoint, name, parts[name], checkpoints)
    student.after = control.after = (NAMES[TEACHER],)
    check.after = (NAMES[TEACHER], NAMES["hr"])
    check.done = lambda: records.complete(checkpoints, read_results(check.folder))
    return [*parts.values(), student, baseline, control, check, *evaluations]
