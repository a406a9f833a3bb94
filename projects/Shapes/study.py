#!/usr/bin/env python
"""The study: every method against every control, on several seeds.

    python projects/Shapes/study.py                  # all of study.yaml
    python projects/Shapes/study.py --tables fcos    # the rows of one table, and what they need
    python projects/Shapes/study.py --rows lr student-l1 --seeds 1

Each cell, a row with a seed, is an ordinary run of `train_net.py` in OUTPUT/ROW/seed_SEED, as many
at a time as there are cores, one thread each. Stopped, it goes on where it was when it is started
again; cells that are done are kept as long as `study.yaml` and the configs still mean the same.
Tables, pictures and `results.json` are written anew after each cell. Paths are relative to the
repository.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

if not __package__:  # run as a script, which does not put the repository on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from msad_kd.errors import InputError
from projects.Shapes import report, study_report
from projects.Shapes.cells import make_cells, training_recipes
from projects.Shapes.generate import generate
from projects.Shapes.grid import REFERENCES, read_grid
from projects.Shapes.jobs import DemoError, Job, Screen, clock, count_cores, run_jobs, typed
from projects.Shapes.measure import write_json
from projects.Shapes.plan import measuring_job, read_results
from projects.Shapes.progress import iterations_done, training_progress

ROOT = Path(__file__).resolve().parents[2]
CELL = "cell.json"


def count(text):
    """A whole number of at least 1, from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number of 1 or more")
    return int(text)


def parse_arguments(arguments=None):
    """The command line."""
    parser = argparse.ArgumentParser(description="Run the study of study.yaml, and tabulate it.")
    add = parser.add_argument
    add("--grid", default="projects/Shapes/study.yaml", help="what to run")
    add("--output", default="output/shapes/study", help="folder of the runs and the results")
    add("--tables", nargs="+", metavar="TABLE", help="only the rows of these tables")
    add("--rows", nargs="+", metavar="ROW", help="only these rows")
    add("--seeds", nargs="+", type=count, metavar="SEED", help="only these seeds")
    add("--slots", type=count, default=count_cores(), help="runs at a time (default: one a core)")
    add("--checkpoint-period", type=count, default=500, help="iterations that a stop costs at most")
    add("--reuse", metavar="FILE", help="the results.json of another run, to take done cells from")
    add("--report", action="store_true", help="run nothing, tabulate what is there")
    add("--overwrite", action="store_true", help="replace a data set made with other arguments")
    add(
        "--set",
        nargs=2,
        action="extend",
        default=[],
        metavar=("KEY", "VALUE"),
        dest="settings",
        help="a config key for all cells, for a trial run; may be given several times",
    )
    return parser.parse_args(arguments)


def choose(cells, grid, args):
    """The keys of the cells that were asked for.

    Raises:
        InputError: a row or table is unknown, or a seed is of no row that was chosen.
    """
    tables = {table["name"]: table for table in grid.tables}
    for kind, asked, known in (("row", args.rows, grid.rows), ("table", args.tables, tables)):
        for name in asked or ():
            if name not in known:
                raise InputError(f"there is no {kind} '{name}'; known: {', '.join(known)}")
    names = set(args.rows or ())
    for name in args.tables or ():
        table = tables[name]
        references = (table[key] for key in REFERENCES if key in table)
        names |= {*table["rows"], *references}
    chosen = {key: cell for key, cell in cells.items() if not names or cell.row.name in names}
    for seed in args.seeds or ():
        if seed not in {cell.seed for cell in chosen.values()}:
            raise InputError(f"no row that was chosen has the seed {seed}")
    return [
        key
        for key, cell in chosen.items()
        if not args.seeds or not cell.row.seeds or cell.seed in args.seeds
    ]


class Study:
    """What is done of a grid, and the jobs for the rest of it."""

    def __init__(self, grid, cells, folder, screen, checkpoint_period):
        self.grid, self.cells, self.folder, self.screen = grid, cells, folder, screen
        self.checkpoint_period = checkpoint_period
        self.path = folder / "results.json"
        self.results = {"cells": {}, "steps": {}}
        self.todo, self.begun = {}, {}  # iterations of the cells to train; those done before
        self.start = time.time()

    def take(self, path):
        """Takes over the cells of a results.json that are still what the grid means."""
        try:
            found = json.loads(Path(path).read_text())
            for key, result in found["cells"].items():
                if key in self.cells and result["fingerprint"] == self.cells[key].fingerprint:
                    self.results["cells"].setdefault(key, result)
            self.results["steps"] |= found["steps"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"'{path}' is no results.json of a study: {error}") from error

    def plan(self, keys):
        """The jobs that the cells of these keys still need."""
        jobs, trained = [], set()
        self.start = time.time()

        def train(key):
            cell = self.cells[key]
            if key in trained or cell.row.checkpoint or self._is_trained(cell):
                return
            for needed in cell.needs:
                train(needed)
            trained.add(key)
            after = tuple(f"{self.cells[k].title}" for k in cell.needs if k in trained)
            jobs.append(self._training(cell, after))

        for key in keys:
            if key not in self.results["cells"]:
                train(key)
                after = (self.cells[key].title,) if key in trained else ()
                jobs.append(self._measurement(self.cells[key], after))
        return jobs

    def _is_trained(self, cell):
        record = cell.folder / CELL
        try:
            same = json.loads(record.read_text())["fingerprint"] == cell.fingerprint
        except (OSError, ValueError, KeyError):
            same = False
        if not same:  # of another training than is meant now
            shutil.rmtree(cell.folder, ignore_errors=True)
            cell.folder.mkdir(parents=True)
            write_json(record, {"fingerprint": cell.fingerprint})
        return cell.weights.is_file()

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
            **found,
        }
        for old in cell.folder.glob("**/model_0*.pth"):
            old.unlink()  # no longer needed to resume
        aps = (f"{n} AP {found[k]['AP']:.1f}" for k, n in report.KINDS.items() if k in found)
        self.screen.say(f"{cell.title}: {', '.join(aps)}")
        self.write()

    def time_steps(self, keys):
        """Measures what a step of each training costs, as far as that is not known."""
        recipes = training_recipes(self.cells, {self.cells[key].row.name for key in keys})
        if all(each["key"] in self.results["steps"].get("seconds", {}) for each in recipes):
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
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.results)
        study_report.write(self.grid, self.cells, self.results, self.folder)


def run(args, screen):
    """The study from data to tables.

    Raises:
        DemoError, InputError: something went wrong that the person can be told in a sentence.
    """
    grid, folder = read_grid(args.grid), Path(args.output)
    cells = make_cells(grid, folder, args.settings)
    keys = choose(cells, grid, args)
    study = Study(grid, cells, folder, screen, args.checkpoint_period)
    for path in (study.path, args.reuse):
        if path and (path is args.reuse or path.is_file()):
            study.take(path)
    if not args.report:
        options = dict(grid.data)
        root = Path(os.getenv("DETECTRON2_DATASETS", "datasets"))
        data = root / options.pop("folder", "shapes")
        screen.say(f"Data: {', '.join(f'{k} {v}' for k, v in options.items())} in '{data}'")
        try:
            generate(data, **options, overwrite=args.overwrite)
        except (ValueError, OSError) as error:
            raise DemoError(f"{error} (DETECTRON2_DATASETS says where the folder is)") from None
        jobs = study.plan(keys)
        done = sum(key in study.results["cells"] for key in keys)
        screen.say(f"{len(keys)} cells, {done} of them done; {args.slots} runs at a time")
        run_jobs(jobs, args.slots, screen, study.overall)
        study.time_steps(keys)
    study.write()
    screen.say(f"Written to '{folder}': {', '.join(study_report.FILES)}")


def main(arguments=None):
    """Runs the command line; an expected error ends it with one sentence."""
    args = parse_arguments(arguments)
    os.chdir(ROOT)
    # So that the trainings are stopped when the study is, whoever ends it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("study.py: terminated; it can be resumed"))
    screen = Screen()
    try:
        run(args, screen)
    except (DemoError, InputError) as error:
        screen.say("Stopped")
        sys.exit(f"study.py: {error}")
    except KeyboardInterrupt:
        screen.say("Interrupted")
        sys.exit("study.py: interrupted; started again, it goes on where it was")


if __name__ == "__main__":
    main()
