#!/usr/bin/env python
"""Run a study: train and measure the rows of a grid on several seeds, and tabulate them.

    python projects/study/run.py --grid projects/Shapes/study.yaml --tables fcos

Each cell, a row with a seed, is an ordinary run of train_net.py in OUTPUT/ROW/seed_SEED, with one
thread. A study that was stopped goes on when it is started again. If grid or configs change, the
run is set aside as seed_SEED.FINGERPRINT, and taken back when it is meant again. Paths are relative
to the repository.
"""

import argparse
import contextlib
import importlib
import os
import signal
import sys
from pathlib import Path

import torch

if not __package__:  # run as a script, which does not put the repository on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from msad_kd.config.imports import add_code_options, import_modules
from msad_kd.data.coco_format import datasets_folder
from msad_kd.utils.arguments import positive
from msad_kd.utils.errors import InputError, in_one_sentence
from projects.study.cells import make_cells
from projects.study.grid import read_grid
from projects.study.jobs import Screen, count_cores, locked, run_jobs
from projects.study.study import Study

ROOT = Path(__file__).resolve().parents[2]


def parse_arguments(arguments=None):
    """Read the command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--grid", required=True, help="the grid file; projects/study/grid.py says what is in it")
    add("--output", help="folder of the runs and the results (default: the grid's)")
    add("--tables", nargs="+", metavar="TABLE", help="only the rows of these tables")
    add("--rows", nargs="+", metavar="ROW", help="only these rows")
    add("--seeds", nargs="+", type=positive, metavar="SEED", help="only these seeds")
    add("--slots", type=positive, default=count_cores(), help="runs at a time (default: the cores)")
    add("--num-gpus", type=int, default=min(1, torch.cuda.device_count()),
        help="GPUs of each training (then one runs at a time); 0 trains on the CPU")  # fmt: skip
    add("--report", action="store_true", help="run nothing, only tabulate what is there")
    add("--overwrite", action="store_true", help="replace data sets made with other arguments")
    add("--set", nargs=2, action="extend", default=[], metavar=("KEY", "VALUE"), dest="settings",
        help="a config key for all trainings, for a trial; may be given several times")  # fmt: skip
    add_code_options(parser)
    return parser.parse_args(arguments)


def choose(cells, grid, args):
    """Return the keys of the cells that the command line asks for."""
    tables = {table.name: table for table in grid.tables}
    for kind, names, known in (("row", args.rows, grid.rows), ("table", args.tables, tables)):
        for name in names or ():
            if name not in known:
                raise InputError(f"there is no {kind} '{name}'; known: {', '.join(known)}")
    rows = args.rows or ([] if args.tables else grid.rows)
    wanted = {(row, seed) for row in rows for seed in grid.rows[row].seeds or [0]}
    for table in map(tables.get, args.tables or ()):
        for row in table.all_rows():
            seeds = grid.rows[row].seeds or [0]
            wanted |= {(row, seed) for seed in seeds if seed in [0, *(table.seeds or seeds)]}
    keys = [key for key, cell in cells.items() if (cell.row.name, cell.seed) in wanted]
    known = {cells[key].seed for key in keys}
    if unknown := {*(args.seeds or ())} - known:
        raise InputError(f"no row that was chosen has the seed {min(unknown)}")
    return [key for key in keys if not args.seeds or cells[key].seed in [0, *args.seeds]]


def make_data(grid, cells, keys, overwrite, screen):
    """Generate the data sets that cells, and the cells they need, read, unless they exist."""
    used, keys = set(), list(keys)
    for key in keys:  # grows while it is read
        used |= {*cells[key].data}
        keys += [needed for needed in cells[key].needs if needed not in keys]
    for name in sorted(used):
        folder = Path(datasets_folder()) / name
        screen.say(f"Data: '{folder}'")
        generate = importlib.import_module(grid.generator).generate
        try:
            generate(folder, **grid.data[name], overwrite=overwrite, progress=False)
        except (ValueError, OSError) as error:
            raise InputError(f"{error} (DETECTRON2_DATASETS says where the folder is)") from None


def run(args, screen):
    """Run a study from its data to its tables."""
    import_modules()
    if not args.num_gpus:  # as many runs as cores would share one GPU
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    grid = read_grid(args.grid)
    folder = Path(args.output or grid.output)
    cells = make_cells(grid, folder, args.settings, max(args.num_gpus, 1))
    keys = choose(cells, grid, args)
    with contextlib.nullcontext() if args.report else locked(folder):
        study = Study(grid, cells, folder, screen, args.num_gpus)
        if args.report:
            study.write(results=False)
        else:
            make_data(grid, cells, keys, args.overwrite, screen)
            jobs = study.plan(keys)
            done = sum(key in study.results["cells"] for key in keys)
            slots = 1 if args.num_gpus else args.slots
            screen.say(f"{len(keys)} cells, {done} of them done; {slots} runs at a time")
            run_jobs(jobs, slots, screen, study.overall)
            study.write()
            if grid.comparison:
                print(f"\n{study.compare() or 'The comparison waits for other rows.'}\n")
    screen.say(f"Tables and pictures are in '{folder}'")


def main(arguments=None, name="run.py"):
    """Run the command line; an expected error, a signal or Ctrl-C ends it with one sentence.

    ``name``: of the command that was typed.
    """
    args = parse_arguments(arguments)
    os.chdir(ROOT)
    stopped = f"{name}: stopped; started again, it goes on where it was"
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda *_: sys.exit(stopped))
    try:
        with in_one_sentence(name):
            run(args, Screen())
    except KeyboardInterrupt:
        sys.exit(stopped)


if __name__ == "__main__":
    main()
