"""The checkpoints of the stock HR model and the teacher, and what is recorded beside each: the
command and the seed that made it, the machine, and its AP, by branch where it has several."""

import json

from projects.Shapes import report
from projects.Shapes.jobs import DemoError, typed
from projects.Shapes.progress import read_settings

BRANCHES = {"hr": ("hr",), "teacher_jitter": ("hr", "lr", "fused")}


def read(folder):
    """What was recorded of the checkpoints in a folder: {"hr": ..., "teacher_jitter": ...}.

    Raises:
        DemoError: a checkpoint, or what was recorded of it, is absent or cannot be read.
    """
    records = {}
    for name in BRANCHES:
        path = folder / f"{name}.json"
        for each in (folder / f"{name}.pth", path):
            if not each.is_file():
                raise DemoError(
                    f"'{each}' does not exist: restore it, or train all with `make demo-full`"
                )
        try:
            record = json.loads(path.read_text())
            for branch in BRANCHES[name]:
                float(record["results"][branch]["bbox"]["AP"])
                float(record["results"][branch]["segm"]["AP"])
        except (ValueError, KeyError, TypeError):
            raise DemoError(
                f"'{path}' lacks the AP that '{name}.pth' has to give: restore it"
            ) from None
        records[name] = record
    return records


def write_checkpoint(name, job, folder):
    """Exports what a training job made, in half precision, as the committed checkpoints are."""
    from msad_kd.checkpoint.files import write_json
    from msad_kd.checkpoint.strip import strip_checkpoint  # Detectron2 takes seconds to import

    folder.mkdir(parents=True, exist_ok=True)
    strip_checkpoint(str(job.folder / "model_final.pth"), str(folder / f"{name}.pth"), half=True)
    seed = read_settings(job.folder)["SEED"]
    record = {"command": typed(["python", *job.command[1:]]), "seed": seed}
    write_json(folder / f"{name}.json", record)


def complete(folder, results):
    """Adds machine and results to what `write_checkpoint` wrote."""
    from msad_kd.checkpoint.files import write_json

    for name in BRANCHES:
        path = folder / f"{name}.json"
        record = json.loads(path.read_text())
        record["machine"] = report.machine(results["device"])
        record["results"] = {
            key.partition("-")[2] or key: {kind: found[kind] for kind in report.KINDS}
            for key, found in results["rows"].items()
            if key.startswith(name)
        }
        write_json(path, record)
