"""Generates the Shapes data set: instance segmentation scenes, the same on every run.

    python projects/Shapes/generate.py --output datasets/shapes --train 300 --val 1000

writes COCO format (`annotations/instances_{train,val}.json`, images in `train/` and `val/`),
Cityscapes' layout below `cityscapes/` (`--format cityscapes`; with `DETECTRON2_DATASETS` set to the
output folder, Detectron2's builtin Cityscapes names read it), or both. The folder appears only when
it is complete; `shapes.json` in it holds the arguments it was made with.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import sys
from pathlib import Path

from tqdm import tqdm

if not __package__:  # run as a script, which does not put the repository on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from projects.Shapes.placement import CLASS_NAMES, SceneOptions
from projects.Shapes.scenes import draw_scene

FORMATS = ("coco", "cityscapes", "both")
ARGUMENTS_FILE = "shapes.json"
# To be raised when the same arguments give another data set than before.
VERSION = 1


def _writer_classes(format):
    """The writers of a format; imported here since only Cityscapes' needs cityscapesScripts."""
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, not '{format}'")
    writers = []
    if format != "cityscapes":
        from projects.Shapes.coco_format import CocoWriter

        writers.append(CocoWriter)
    if format != "coco":
        from projects.Shapes.cityscapes_format import CityscapesWriter

        writers.append(CityscapesWriter)
    return writers


def _differences(folder, arguments):
    """How the arguments that made `folder` differ from these, in words; empty if they do not."""
    try:
        made_with = json.loads((folder / ARGUMENTS_FILE).read_text())
    except (OSError, ValueError):
        # Such a folder is never replaced, not even with overwrite: it holds something else.
        raise FileExistsError(
            f"'{folder}' holds no readable {ARGUMENTS_FILE}, so it is no Shapes data set: "
            f"choose another output folder"
        ) from None
    names = sorted(made_with.keys() | arguments.keys())
    return ", ".join(
        f"{name} {made_with.get(name)} instead of {arguments.get(name)}"
        for name in names
        if made_with.get(name) != arguments.get(name)
    )


def _restore(folder):
    """Undoes a replacement that was cut off after `folder` had made way for the new one."""
    old = folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():
        old.rename(folder)


@contextlib.contextmanager
def _replacing(folder):
    """Gives an empty folder beside `folder` that takes its place if the block ends well.

    Whatever happens, `folder` is what it was or all that it is to be; what a killed run left
    behind is tidied up first.

    Raises:
        BlockingIOError: another process is at it.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    old = folder.with_name(f".{folder.name}.old")
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        # The lock goes with the process, so it tells a running one from one that was killed.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise BlockingIOError(f"another process is writing '{folder}'") from None
    try:
        _empty(partial)
        shutil.rmtree(old, ignore_errors=True)
        yield partial
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        _restore(folder)
        raise
    finally:
        os.close(lock)


def _empty(folder):
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def complete_arguments(*, train=300, val=1000, seed=0, format="coco", **scene_options):
    """All that decides what a data set is, defaults and VERSION included, as JSON reads it back.

    Raises:
        ValueError: an argument is out of its range.
    """
    if min(train, val) < 1 or seed < 0:
        raise ValueError(f"train, val >= 1 and seed >= 0 are needed, not {train}, {val}, {seed}")
    arguments = {"version": VERSION, "seed": seed, "format": format, "train": train, "val": val}
    arguments |= dataclasses.asdict(SceneOptions(**scene_options))
    return json.loads(json.dumps(arguments))  # in which tuples are lists


def generate(
    output="datasets/shapes",
    *,
    train=300,
    val=1000,
    seed=0,
    format="coco",
    overwrite=False,
    progress=True,
    **scene_options,
):
    """Writes the data set, unless it is there already.

    Args:
        output: the folder to make.
        train, val: the numbers of scenes. The first scenes of a larger set are those of a smaller.
        seed: non-negative integer.
        format: one of FORMATS.
        overwrite: replace a data set that was made with other arguments.
        progress: show a progress bar.
        scene_options: the fields of `SceneOptions`.

    Returns:
        True if it was written, False if it was there.

    Raises:
        ValueError: an argument is out of its range.
        FileExistsError: `output` holds another data set, or something that is none.
        BlockingIOError: another process is writing to `output`.
    """
    options = SceneOptions(**scene_options)
    counts = {"train": train, "val": val}
    arguments = complete_arguments(seed=seed, format=format, **counts, **scene_options)
    writer_classes = _writer_classes(format)
    output = Path(output)
    _restore(output)
    if output.exists():
        differences = _differences(output, arguments)
        if not differences:
            return False
        if not overwrite:
            raise FileExistsError(
                f"'{output}' was made with other arguments ({differences}): choose another output "
                f"folder, or --overwrite to replace it"
            )
    with _replacing(output) as folder:
        with tqdm(total=train + val, unit="scene", disable=not progress) as bar:
            for split, count in counts.items():
                writers = [writer_class(folder, split, options) for writer_class in writer_classes]
                for index in range(count):
                    scene = draw_scene(seed, split, index, options)
                    for writer in writers:
                        writer.add(index, scene)
                    bar.update()
                for writer in writers:
                    writer.close()
        (folder / ARGUMENTS_FILE).write_text(json.dumps(arguments, indent=2) + "\n")
    return True


def parse_arguments(arguments=None):
    """The command line as the keyword arguments of `generate`."""
    default = SceneOptions()
    parser = argparse.ArgumentParser(
        description="Generate the Shapes data set.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output", default="datasets/shapes", help="the folder to make")
    add("--train", type=int, default=300, help="number of training scenes")
    add("--val", type=int, default=1000, help="number of validation scenes")
    add("--size", type=int, nargs="+", default=default.size, help="side, or height and width, px")
    add("--seed", type=int, default=0, help="of everything random")
    add("--difficulty", type=float, default=default.difficulty, help="0 to 1")
    add("--classes", type=int, default=default.classes, help=f"1 to {len(CLASS_NAMES)}")
    reach = "px of an image of side 128, of the circle of equal area"
    add("--min-radius", type=float, default=default.min_radius, help=reach)
    add("--max-radius", type=float, default=default.max_radius, help=reach)
    add("--min-shapes", type=int, default=default.min_shapes, help="in a scene")
    add("--max-shapes", type=int, default=default.max_shapes, help="in a scene")
    add(
        "--hue-spread",
        type=float,
        default=default.hue_spread,
        help="degrees around a class's own hue; at 180 the colour tells nothing",
    )
    add("--format", choices=FORMATS, default="coco", help="what to write")
    add("--overwrite", action="store_true", help="replace a data set made with other arguments")
    parsed = vars(parser.parse_args(arguments))
    size = tuple(parsed["size"])
    parsed["size"] = size * 2 if len(size) == 1 else size
    return parsed


def main(arguments=None):
    """Runs the command line; an expected error ends it with one sentence."""
    keywords = parse_arguments(arguments)
    try:
        written = generate(**keywords)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"generate.py: {error}")
    print(f"'{keywords['output']}' " + ("is complete" if written else "is there already: kept"))


if __name__ == "__main__":
    main()
