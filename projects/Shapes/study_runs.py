"""What is done of a study, the runs that the rest of it takes, and its results.json."""

import json
import sys
import time
from functools import partial
from pathlib import Path

from msad_kd.checkpoint.files import write_json
from msad_kd.utils.errors import InputError
from projects.Shapes import report, study_report
from projects.Shapes.costs import training_recipes
from projects.Shapes.jobs import DemoError, Job, clock, run_jobs, typed
from projects.Shapes.plan import measuring_job, read_results
from projects.Shapes.progress import gradient_ratio, iterations_done, training_progress

CELL = "cell.json"


def _trained_in(folder):
    """The fingerprint of the cell that a folder's run is of; None if none is recorded."""
    try:
        return json.loads((folder / CELL).read_text())["fingerprint"]
    except (OSError, ValueError, KeyError):
        return None


def _is_whole(weights):
    """Whether a training's last checkpoint was written to its end; then Detectron2 notes it."""
    if weights.name != "model_final.pth":
        return True  # a ladder's student, which is whole or not there
    try:
        return (weights.parent / "last_checkpoint").read_text().strip() == weights.name
    except OSError:
        return False


def _aside(cell, fingerprint):
    """Where the run of another fingerprint waits for being meant again."""
    return cell.folder.with_name(f"{cell.folder.name}.{fingerprint[:8]}")


class Study:
    """What is done of a grid, and the jobs for the rest of it."""

    def __init__(self, grid, cells, folder, screen, checkpoint_period):
        self.grid, self.cells, self.folder, self.screen = grid, cells, folder, screen
        self.checkpoint_period = checkpoint_period
        self.path = folder / "results.json"
        # "other": [key, result] of cells that are not what the grid means now, but may be again.
        self.results = {"cells": {}, "steps": {}, "other": []}
        self.todo, self.begun = {}, {}  # iterations of the cells to train; those done before
        self.start = time.time()

    def take(self, path):
        """Takes over the cells of a results.json that are what the grid means, and the others, too,
        if it is this study's own."""
        try:
            found = json.loads(Path(path).read_text())
            for key, result in [*found["cells"].items(), *found.get("other", ())]:
                if key in self.cells and result["fingerprint"] == self.cells[key].fingerprint:
                    self.results["cells"].setdefault(key, result)
                elif Path(path) == self.path and [key, result] not in self.results["other"]:
                    self.results["other"].append([key, result])
            # Times of one machine in one process; only their ratios count.
            self.results["steps"] = self.results["steps"] or found["steps"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"'{path}' is no results.json of a study: {error}") from error

    def plan(self, keys):
        """The jobs that the cells of these keys still need."""
        jobs, waits = [], {}
        self.start = time.time()

        def train(key):
            """Plans what makes a cell's checkpoint; returns the jobs to wait for."""
            if key not in waits:
                cell, waits[key] = self.cells[key], ()
                if cell.row.checkpoint or not self._is_trained(cell):
                    waits[key] = tuple(name for needed in cell.needs for name in train(needed))
                    if not cell.row.checkpoint:
                        jobs.append(self._training(cell, waits[key]))
                        waits[key] = (cell.title,)
            return waits[key]

        for key in keys:
            self._find_folder(self.cells[key])
            if key not in self.results["cells"]:
                jobs.append(self._measurement(self.cells[key], train(key)))
        return jobs

    def _find_folder(self, cell):
        """Puts a run of another training than is meant aside, and takes back that of this one."""
        found = _trained_in(cell.folder)
        if cell.row.checkpoint or found == cell.fingerprint:
            return
        for old, new, why in (
            (cell.folder, _aside(cell, found or "unknown"), "another training, put aside as"),
            (_aside(cell, cell.fingerprint), cell.folder, "meant again, taken back as"),
        ):
            if old.exists():
                if new.exists():
                    raise DemoError(f"'{old}' cannot become '{new}', which is there: move it away")
                old.rename(new)
                self.screen.say(f"'{old}': {why} '{new}'")

    def _is_trained(self, cell):
        self._find_folder(cell)
        if not cell.folder.exists():
            cell.folder.mkdir(parents=True)
            write_json(cell.folder / CELL, {"fingerprint": cell.fingerprint})
        return cell.weights.is_file() and _is_whole(cell.weights)

    def _training(self, cell, after):
        command = [sys.executable, "train_net.py", "--resume", "--config-file", cell.row.config]
        command += [*cell.options, "KD.TEACHER.EVAL_BEFORE_TRAIN", "False", "DATASETS.TEST", "()"]
        command += ["SOLVER.CHECKPOINT_PERIOD", str(self.checkpoint_period)]
        command += ["OUTPUT_DIR", str(cell.folder)]
        self.todo[cell.key] = cell.iterations
        self.begun[cell.key] = iterations_done(cell.folder, self.start)
        return Job(cell.title, command, cell.folder, after, training_progress, resumes=True)

    def _measurement(self, cell, after):
        folder = cell.folder / "evaluation"
        row = {"key": cell.key, "config": cell.row.test_config, "options": cell.test_options}
        row["weights"] = str(cell.weights)
        job = measuring_job(f"{cell.title}: AP", "evaluate", folder, [row], after=after)
        job.done = partial(self._finish, cell, job.folder)
        return job

    def _finish(self, cell, folder):
        measured = read_results(folder)
        found = measured["rows"][cell.key]
        command = ["python", "train_net.py", "--config-file", cell.row.config, *cell.options]
        self.results["cells"][cell.key] = {
            "fingerprint": cell.fingerprint,
            "command": "" if cell.row.checkpoint else typed(command),
            "iterations": cell.iterations,
            "machine": report.machine(measured["device"]),
            "gradient_ratio": None if cell.row.checkpoint else gradient_ratio(cell.folder),
            **found,
        }
        for old in cell.folder.glob("**/model_0*.pth"):
            old.unlink()  # no longer needed to resume
        aps = (f"{n} AP {found[k]['AP']:.1f}" for k, n in report.KINDS.items() if k in found)
        self.screen.say(f"{cell.title}: {', '.join(aps)}")
        self.write()

    def time_steps(self, keys):
        """Measures what a step of each training costs, of these cells and of all that are done.

        Ratios are fair only within one process, so where one is not known, all are timed again.
        """
        names = {self.cells[key].row.name for key in [*keys, *self.results["cells"]]}
        recipes = training_recipes(self.cells, names)
        if {each["key"] for each in recipes} <= self.results["steps"].get("seconds", {}).keys():
            return
        self.screen.say(f"Time of a step of {len(recipes)} trainings, in turn")
        job = measuring_job("steps", "steps", self.folder / "steps", recipes)
        job.done = lambda: self.results.update(
            steps=json.loads((job.folder / "results.json").read_text())
        )
        run_jobs([job], 1, self.screen)
        self.write()

    def overall(self):
        """How far the trainings are, and when they will be done."""
        done = sum(iterations_done(self.cells[key].folder, self.start) for key in self.todo)
        done_before, total = sum(self.begun.values()), sum(self.todo.values())
        if not total:
            return "measuring"
        left = "?"
        if done > done_before:
            left = clock((time.time() - self.start) * (total - done) / (done - done_before))
        return f"{done}/{total} iterations, {left} left"

    def write(self):
        """Writes results.json, the tables and the pictures."""
        write_json(self.path, self.results)
        self.tabulate()

    def tabulate(self):
        """Writes the tables and the pictures."""
        study_report.write(self.grid, self.cells, self.results, self.folder)
