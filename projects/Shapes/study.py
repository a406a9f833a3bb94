#!/usr/bin/env python
"""The study: every method against every control, on several seeds.

    python projects/Shapes/study.py                  # all of study.yaml
    python projects/Shapes/study.py --tables fcos    # the rows of one table, and what they need
    python projects/Shapes/study.py --rows lr student-l1 --seeds 1

Each cell, a row with a seed, is an ordinary run of `train_net.py` in OUTPUT/ROW/seed_SEED, as many
at a time as there are cores, one thread each. Stopped, it goes on where it was when it is started
again. A cell that is done counts as long as `study.yaml` and the configs mean the same; of one that
they no longer mean, the result is kept in `results.json` and the run in ROW/seed_SEED.FINGERPRINT,
and both are taken back when it is meant again. Tables, pictures and `results.json` are written anew
after each cell. Paths are relative to the repository.
"""

import argparse
import contextlib
import os
import sys
from pathlib import Path

if not __package__:  # run as a script, which does not put the repository on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from msad_kd.utils.errors import InputError
from projects.Shapes import study_report
from projects.Shapes.cells import data_of, make_cells
from projects.Shapes.grid import REFERENCES, read_grid
from projects.Shapes.jobs import DemoError, count_cores, run_jobs
from projects.Shapes.program import add_common, locked, make_data, run_program
from projects.Shapes.study_runs import Study

ROOT = Path(__file__).resolve().parents[2]


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
    add("--report", action="store_true", help="run nothing, only tabulate what is there")
    add_common(parser)
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
    # Names of rows, and those of their seeds that a table shows.
    asked = [(args.rows, None)] if args.rows else []
    for table in map(tables.get, args.tables or ()):
        references = [table[key] for key in REFERENCES if key in table]
        asked.append(([*table["rows"], *references], table.get("seeds")))
    chosen = {
        key: cell
        for key, cell in cells.items()
        if not asked
        or any(
            cell.row.name in names and (not seeds or not cell.row.seeds or cell.seed in seeds)
            for names, seeds in asked
        )
    }
    for seed in args.seeds or ():
        if seed not in {cell.seed for cell in chosen.values()}:
            raise InputError(f"no row that was chosen has the seed {seed}")
    return [
        key
        for key, cell in chosen.items()
        if not args.seeds or not cell.row.seeds or cell.seed in args.seeds
    ]


def run(args, screen):
    """The study from data to tables.

    Raises:
        DemoError, InputError: something went wrong that the person can be told in a sentence.
    """
    grid, folder = read_grid(args.grid), Path(args.output)
    cells = make_cells(grid, folder, args.settings)
    keys = choose(cells, grid, args)
    study = Study(grid, cells, folder, screen, args.checkpoint_period)
    with contextlib.nullcontext() if args.report else locked(folder):
        for path in (study.path, args.reuse):
            if path and (path is args.reuse or path.is_file()):
                study.take(path)
        if args.report:
            folder.mkdir(parents=True, exist_ok=True)
            study.tabulate()
        else:
            make_data(*data_of(grid), args.overwrite, screen)
            if any(cells[key].row.fresh for key in keys):
                make_data(*data_of(grid, fresh=True), args.overwrite, screen)
            jobs = study.plan(keys)
            done = sum(key in study.results["cells"] for key in keys)
            screen.say(f"{len(keys)} cells, {done} of them done; {args.slots} runs at a time")
            run_jobs(jobs, args.slots, screen, study.overall)
            study.time_steps(keys)
            study.write()
    files = study_report.FILES if args.report else ("results.json", *study_report.FILES)
    screen.say(f"Written to '{folder}': {', '.join(files)}")


def main(arguments=None):
    """Runs the command line; an expected error ends it with one sentence."""
    args = parse_arguments(arguments)
    os.chdir(ROOT)
    stopped = "started again, it goes on where it was"
    run_program("study.py", run, args, stopped, (DemoError, InputError))


if __name__ == "__main__":
    main()
