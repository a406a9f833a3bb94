"""The state of a study: what is done, the jobs for the rest, and results.json."""

import json
import shlex
import sys
import time
from functools import partial
from pathlib import Path

from tqdm import tqdm

from msad_kd.checkpoint.files import write_json
from msad_kd.utils.errors import InputError
from projects.study import progress, reports
from projects.study.jobs import Job, run_jobs

CELL = "cell.json"
TOLERANCE = 0.2  # AP


class Study:
    """A grid's cells and their results.

    `results` is the content of results.json: "cells" has the results of the cells that are done,
    "other" [key, result] of cells that the grid no longer means but may mean again.
    """

    def __init__(self, grid, cells, folder, screen, num_gpus=0):
        """Read the results that are there."""
        self.grid, self.cells, self.folder, self.screen = grid, cells, Path(folder), screen
        self.num_gpus = num_gpus  # of each training
        self.path = self.folder / "results.json"
        self.results = {"cells": {}, "other": []}
        self.resumed_at = {}  # key of each cell to train: the iterations before this run
        if self.path.is_file():
            self._read_results()

    def _read_results(self):
        try:
            content = json.loads(self.path.read_text())
            for key, result in [*content["cells"].items(), *content.get("other", ())]:
                if key in self.cells and result["fingerprint"] == self.cells[key].fingerprint:
                    self.results["cells"].setdefault(key, result)
                elif [key, result] not in self.results["other"]:
                    self.results["other"].append([key, result])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"'{self.path}' is no results.json of a study: {error}") from error

    def plan(self, keys):
        """Return the jobs that the cells of these keys still need, in the order of the keys."""
        jobs, waits = [], {}
        self.start = time.time()

        def train(key):
            """Plan what makes a cell's checkpoint; return the names of the jobs to wait for."""
            cell = self.cells[key]
            if key not in waits:
                waits[key] = ()
                if not (cell.row.trained and self._is_trained(cell)):
                    waits[key] = tuple(name for needed in cell.needs for name in train(needed))
                    if cell.labels and not cell.labels.file.exists():
                        if cell.labels.title not in [job.name for job in jobs]:
                            jobs.append(self._labelling(cell.labels, waits[key]))
                        waits[key] = (cell.labels.title, *waits[key])
                    if cell.row.trained:
                        jobs.append(self._training(cell, waits[key]))
                        waits[key] = (cell.title,)
            return waits[key]

        for key in keys:
            self._find_folder(self.cells[key])
            if key not in self.results["cells"]:
                jobs.append(self._measurement(self.cells[key], train(key)))
        return jobs

    def _find_folder(self, cell):
        """Set the run of another training aside, and take the run of this one back."""
        try:
            known = json.loads((cell.folder / CELL).read_text())
            found = known["fingerprint"]
        except (OSError, ValueError, KeyError):
            known, found = {}, "unknown"
        if not cell.row.trained or found == cell.fingerprint:
            return
        aside, own = (f"{cell.folder}.{name[:8]}" for name in (found, cell.fingerprint))
        other = f" ({_differing(known['meaning'], cell.meaning)})" if "meaning" in known else ""
        for old, new, why in (
            (cell.folder, Path(aside), f"is another training{other}; set aside as"),
            (Path(own), cell.folder, "is meant again; taken back as"),
        ):
            if old.exists():
                if new.exists():
                    raise InputError(f"'{old}' cannot become '{new}', which exists: move it away")
                old.rename(new)
                self.screen.say(f"'{old}' {why} '{new}'")

    def _is_trained(self, cell):
        self._find_folder(cell)
        if not cell.folder.exists():
            known = {"fingerprint": cell.fingerprint, "meaning": cell.meaning}
            write_json(cell.folder / CELL, known)
        # Detectron2 names a whole checkpoint here. A ladder's student.pth is whole or absent.
        last, name = cell.weights.with_name("last_checkpoint"), cell.weights.name
        whole = name == "student.pth" or last.is_file() and last.read_text().strip() == name
        return cell.weights.is_file() and whole

    def _labelling(self, labels, after):
        command = [sys.executable, "tools/label_images.py", *labels.command]
        return Job(labels.title, command, labels.file.parent, after, so_far=labels.so_far)

    def _training(self, cell, after):
        command = [sys.executable, "train_net.py", "--resume", "--config-file", cell.row.config]
        command += ["--num-gpus", str(self.num_gpus)] * bool(self.num_gpus)
        command += ["SOLVER.CHECKPOINT_PERIOD", str(cell.saved_every), *cell.options]
        command += ["KD.TEACHER.EVAL_BEFORE_TRAIN", "False", "DATASETS.TEST", "()"]
        command += ["TEST.EXPECTED_RESULTS", "[]"]  # nothing is tested yet
        command += ["OUTPUT_DIR", str(cell.folder)]
        self.resumed_at[cell.key] = progress.iterations_done(cell.folder)
        return Job(cell.title, command, cell.folder, after)

    def _measurement(self, cell, after):
        folder = cell.folder / "evaluation"
        job = self._measuring_job("evaluate", f"{cell.title}: AP", folder, [cell])
        job.after, job.done = after, partial(self.finish, cell, folder)
        return job

    def _measuring_job(self, task, name, folder, cells, **keywords):
        """Return a run of measure.py."""
        models = {}
        for cell in cells:
            models[cell.key] = {"config": cell.row.test_config, "options": cell.test_options}
            models[cell.key]["weights"] = str(cell.weights)
        keywords |= {"models": models, "detections": self.grid.detections}
        write_json(folder / "task.json", keywords)
        command = [sys.executable, "-m", "projects.study.measure", task, str(folder)]
        return Job(name, command, folder)

    def finish(self, cell, folder):
        """Record what measure.py has found of a cell."""
        measured = json.loads((folder / "results.json").read_text())
        result = measured["models"][cell.key]
        kinds = {kind: name for kind, name in reports.KINDS.items() if kind in result}
        said = ", ".join(f"{name} AP {result[kind]['AP']:.1f}" for kind, name in kinds.items())
        if cell.row.recorded:
            verify(cell, result)
            said += f", as recorded (within {TOLERANCE})"
        self.screen.say(f"{cell.title}: {said}")
        facts = {"fingerprint": cell.fingerprint, "machine": measured["machine"], "command": ""}
        if cell.row.trained:
            command = ["python", "train_net.py", "--config-file", cell.row.config, *cell.options]
            facts |= {"command": shlex.join(command), "iterations": cell.iterations}
            facts["training_seconds"] = progress.training_seconds(cell.folder)
            facts["total_seconds"] = self._total_seconds(cell)
            facts["gradient_ratio"] = progress.gradient_ratio(cell.folder)
            for old in cell.folder.glob("**/model_0*.pth*"):
                if not old.parent.name.startswith("previous_run"):
                    old.unlink()  # no longer needed to resume
        self.results["cells"][cell.key] = {**facts, **result}
        self.write()

    def _total_seconds(self, cell):
        """Return how long a training took, with those of the checkpoints that it uses.

        None: one of these was trained elsewhere, and has no log here.
        """
        used, queue = {}, [cell]  # a checkpoint that is used twice was trained once
        while queue:
            each = queue.pop()
            used[each.key] = each
            queue += map(self.cells.get, each.needs)
        if any(any(each.meaning.get("files", ())) for each in used.values()):
            return None  # it starts from a file that is no row's
        times = [self._training_seconds(each) for each in used.values()]
        return None if None in times else sum(times)

    def _training_seconds(self, cell):
        if cell.row.checkpoint_of:
            return 0
        known = self.results["cells"].get(cell.key, {})
        if cell.row.checkpoint:
            return known.get("total_seconds")
        return known.get("training_seconds") or progress.training_seconds(cell.folder) or None

    def compare(self):
        """Measure the comparison's models in turn, if all are done; write and return its table."""
        names = [*self.grid.comparison, *self.grid.scenes.values()]
        seeds = {name: (self.grid.rows[name].seeds or [0])[0] for name in names}
        cells = {name: self.cells[f"{name}/{seed}"] for name, seed in seeds.items()}
        if not all(c.weights.is_file() and c.key in self.results["cells"] for c in cells.values()):
            return None
        scenes = {title: cells[row].key for title, row in self.grid.scenes.items()}
        folder = self.folder / "comparison"
        job = self._measuring_job("compare", "costs", folder, cells.values(), scenes=scenes)
        run_jobs([job], 1, self.screen)  # alone, so that nothing disturbs the clock
        measured = json.loads((folder / "results.json").read_text())
        lines = [
            {"row": name, "title": cells[name].row.title, **self.results["cells"][cells[name].key]}
            | measured["models"][cells[name].key]
            for name in self.grid.comparison
        ]
        return reports.write_comparison(self.folder, lines, measured)

    def overall(self):
        """Return how far all trainings are together, and the time left."""
        cells = [self.cells[key] for key in self.resumed_at]
        total, before = sum(cell.iterations for cell in cells), sum(self.resumed_at.values())
        done = sum(progress.iterations_done(cell.folder) for cell in cells)
        seconds = time.time() - self.start
        left = "?"
        if done > before:
            left = tqdm.format_interval(seconds * (total - done) / (done - before))
        return f"{done}/{total} iterations, {left} left" if done < total else "measuring"

    def write(self, results=True):
        """Write the tables, the pictures and, if asked for, results.json."""
        if results:
            write_json(self.path, self.results, indent=1)  # as committed
        reports.write(self.grid, self.cells, self.results, self.folder)


def verify(cell, result):
    """Check that a checkpoint has the AP that was recorded beside it, within `TOLERANCE`."""
    record = cell.weights.with_suffix(".json")
    if not record.is_file():
        raise InputError(f"'{record}', which says what AP the checkpoint has, is missing")
    results = json.loads(record.read_text())["results"]
    if cell.row.recorded not in results:
        raise InputError(
            f"'{record}' has no results of '{cell.row.recorded}': {', '.join(results)}"
        )
    for kind, recorded in results[cell.row.recorded].items():
        if kind not in result:
            words = f"no {reports.KINDS[kind]} AP here, but one in '{record}'"
            raise InputError(f"{cell.row.title} has {words}: settings (--set) have changed")
        here, there = result[kind]["AP"], recorded["AP"]
        if not abs(here - there) <= TOLERANCE:
            raise InputError(
                f"{cell.row.title} has {reports.KINDS[kind]} AP {here:.1f} here, but '{record}' "
                f"says {there:.1f}: checkpoint, data, settings (--set) or installation have changed"
            )


def _differing(one, other):
    """Name the keys in which two meanings of a cell differ."""
    names = []
    for part in sorted({*one, *other}):
        a, b = one.get(part), other.get(part)
        if part in ("test", "train") and a and b:
            names += sorted(key for key in {*a, *b} if a.get(key) != b.get(key))
        elif a != b:
            names.append({"files": "weights"}.get(part, part))
    return f"other {', '.join(dict.fromkeys(names))}"
