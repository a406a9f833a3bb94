"""The demo: a low-resolution Mask R-CNN, distilled, against the same one trained without a teacher.

    python projects/Shapes/demo.py            # the teacher and the HR model from their checkpoints
    python projects/Shapes/demo.py --full     # these are trained, too: hours on a CPU

It generates the data, verifies the checkpoints, trains the student and its two controls, the LR
baseline and the student's own recipe without a teacher, measures all models, and leaves a table,
two pictures and each run's log in the output folder. Paths are relative to the repository.
"""

import argparse
import os
import sys
from pathlib import Path

if not __package__:  # run as a script, which does not put the repository on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from projects.Shapes import records, report
from projects.Shapes.jobs import count_cores, run_jobs, typed
from projects.Shapes.plan import TRAINED, measuring_job, model_rows, plan_jobs, read_results
from projects.Shapes.program import add_common, locked, make_data, run_program
from projects.Shapes.progress import read_settings

ROOT = Path(__file__).resolve().parents[2]
DATA = {
    "train": 300,
    "val": 1000,
    "classes": 5,
    "difficulty": 0.1,
    "hue_spread": 50.0,
    "min_radius": 6.0,
    "max_radius": 30.0,
    "max_shapes": 8,
}
RESULTS = ("table.md", "table.json", "scenes.png", "ap_cost.png")


def parse_arguments(arguments=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Distil a low-resolution Mask R-CNN on the Shapes data and compare it."
    )
    add = parser.add_argument
    add("--full", action="store_true", help="train the HR model and the teacher, too: hours")
    add("--output", default="output/shapes", help="results go to demo or demo-full in this folder")
    add("--checkpoints", default="projects/Shapes/checkpoints", help="folder of hr and teacher")
    add("--train", type=int, default=DATA["train"], help="number of training scenes")
    add("--val", type=int, default=DATA["val"], help="number of validation scenes")
    add_common(parser)
    return parser.parse_args(arguments)


def summarise(args, folder, rows, data, screen):
    """The content of `table.json`."""
    accuracy = {}
    for place in ("known", *(f"{key}-evaluation" for key in TRAINED)):
        accuracy |= read_results(folder / place)["rows"]
    latency = read_results(folder / "latency")
    for row in rows:
        found = accuracy[row["key"]]
        row |= {report.KINDS.get(name, name): each for name, each in found.items()}
        row |= latency["rows"][row["key"]]
    settings = {key: read_settings(folder / key) for key in TRAINED}
    student = settings["student"]
    return {
        "rows": rows,
        "gap_closed": report.close_gaps(rows),
        "run": {
            "iterations": student["SOLVER"]["MAX_ITER"],
            "batch_size": student["SOLVER"]["IMS_PER_BATCH"],
            "seed": student["SEED"],
            "learning_rate": {key: each["SOLVER"]["BASE_LR"] for key, each in settings.items()},
            "train_sides": {key: each["INPUT"]["MIN_SIZE_TRAIN"] for key, each in settings.items()},
            "full": args.full,
            "data": data,
            "device": latency["device"],
            "machine": report.machine(latency["device"]),
            "seconds": screen.seconds(),
        },
    }


def run(args, screen):
    """The demo from data to table, alone in its folder.

    Raises:
        DemoError: something went wrong that the person can be told in a sentence.
    """
    folder = Path(args.output) / ("demo-full" if args.full else "demo")
    with locked(folder):
        run_in(folder, args, screen)


def run_in(folder, args, screen):
    """The same, in a folder that is this run's."""
    checkpoints = folder / "checkpoints" if args.full else Path(args.checkpoints)
    cores = count_cores()
    screen.say(
        "Shapes demo: a low-resolution Mask R-CNN, with and without distillation, on "
        f"{cores} core{'s' * (cores != 1)}; "
        + ("hours on a CPU" if args.full else "at most 15 minutes on two")
    )
    recorded = None if args.full else records.read(checkpoints)
    data = {**DATA, "train": args.train, "val": args.val}
    make_data("shapes", data, args.overwrite, screen)
    for name in RESULTS:  # if this run fails, those of an earlier one shall not pass for its own
        (folder / name).unlink(missing_ok=True)
    rows = model_rows(folder, checkpoints, args.settings)

    jobs = plan_jobs(folder, checkpoints, rows, args.settings, recorded, screen)
    screen.say("Trainings, one thread each (OMP_NUM_THREADS=1):")
    for job in jobs:
        if "train_net.py" in job.command:
            screen.say(f"  {typed(job.command)}")
    run_jobs(jobs, cores, screen)
    # Alone, so that nothing disturbs the clock.
    run_jobs([measuring_job("latency", "latency", folder / "latency", rows)], 1, screen)

    summary = summarise(args, folder, rows, data, screen)
    text = report.markdown(summary)
    from msad_kd.checkpoint.files import write_json  # this and matplotlib take seconds to import
    from projects.Shapes import pictures

    write_json(folder / "table.json", summary)
    (folder / "table.md").write_text(text)
    pictures.draw_ap_cost(folder / "ap_cost.png", rows)
    (folder / "latency" / "scenes.png").replace(folder / "scenes.png")
    screen.say("Done\n")
    print(text)
    names = ", ".join(f"'{folder / name}'" for name in RESULTS)
    print(f"Written: {names}; each run's log is in its folder there.")


def main(arguments=None):
    """Runs the command line; an expected error ends it with one sentence."""
    args = parse_arguments(arguments)
    os.chdir(ROOT)
    run_program("demo.py", run, args, "what it had started is stopped")


if __name__ == "__main__":
    main()
