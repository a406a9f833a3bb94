"""Generate the Shapes data set: instance segmentation scenes that are the same on every machine.

    python projects/Shapes/generate.py --output datasets/shapes --train 300 --val 1000

writes COCO format (`annotations/instances_{train,val}.json`, images in `train/` and `val/`), the
layout of Cityscapes below `cityscapes/` (`--format cityscapes`), or both. Detectron2's builtin
Cityscapes names find the latter when `DETECTRON2_DATASETS` is the output folder. The folder appears
only when it is complete. Its `shapes.json` holds the arguments it was made with.
"""

import argparse
import contextlib
import dataclasses
import json
import shutil
import sys
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

if not __package__:  # Run as a script, which does not put the repository on the path.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from projects.Shapes.coco_format import CocoWriter
from projects.Shapes.placement import CLASS_NAMES, SceneOptions
from projects.Shapes.scenes import SPLITS, draw_scene

FORMATS = ("coco", "cityscapes", "both")
ARGUMENTS_FILE = "shapes.json"
# Raise it when the same arguments give another data set than before.
VERSION = 1
_BESIDE = ("lock", "partial", "old")  # `.NAME.lock` and so on, beside the folder NAME


def complete_arguments(*, train=300, val=1000, seed=0, format="coco", **scene_options):
    """Return every argument that decides what a data set is, as JSON reads it back.

    Args:
        train, val: numbers of scenes. A smaller set is the beginning of a larger one.
        seed: non-negative integer.
        format: one of FORMATS.
        scene_options: fields of `SceneOptions`.

    Raises:
        ValueError: an argument is out of its range.
    """
    if min(train, val) < 1 or seed < 0:
        raise ValueError(
            f"train and val must be at least 1 and seed at least 0, not {train}, {val}, {seed}"
        )
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, not '{format}'")
    arguments = {"version": VERSION, "seed": seed, "format": format, "train": train, "val": val}
    arguments |= dataclasses.asdict(SceneOptions(**scene_options))
    return json.loads(json.dumps(arguments))  # JSON turns tuples into lists


def generate(output="datasets/shapes", *, overwrite=False, progress=True, **arguments):
    """Write the data set unless it is there already.

    Args:
        output: folder to make.
        overwrite: replace a data set that was made with other arguments.
        progress: show a progress bar.
        arguments: those of `complete_arguments`.

    Returns:
        True if it was written, False if it was there.

    Raises:
        ValueError: an argument is out of its range.
        FileExistsError: `output` holds another data set or something else.
        filelock.Timeout: another process is writing to `output`.
    """
    arguments = complete_arguments(**arguments)
    options = {field.name: arguments[field.name] for field in dataclasses.fields(SceneOptions)}
    options = SceneOptions(**options | {"size": tuple(arguments["size"])})
    counts = {split: arguments[split] for split in SPLITS}
    writer_classes = [CocoWriter] if arguments["format"] != "cityscapes" else []
    if arguments["format"] != "coco":  # this import needs cityscapesScripts
        from projects.Shapes.cityscapes_format import CityscapesWriter

        writer_classes.append(CityscapesWriter)
    output = Path(output).expanduser()
    if output.exists():
        differences = _differences(output, arguments)
        if not differences:
            return False
        if not overwrite:
            raise FileExistsError(
                f"'{output}' was made with other arguments ({differences}); choose another output "
                "folder, or replace it with --overwrite"
            )
    bar = tqdm(total=sum(counts.values()), unit="scene", disable=not progress)
    with bar, _replacing(output) as folder:
        for split, count in counts.items():
            writers = [writer_class(folder, split, options) for writer_class in writer_classes]
            for index in range(count):
                scene = draw_scene(arguments["seed"], split, index, options)
                for writer in writers:
                    writer.add(index, scene)
                bar.update()
            for writer in writers:
                writer.close()
        (folder / ARGUMENTS_FILE).write_text(json.dumps(arguments, indent=2) + "\n")
    return True


def _differences(folder, arguments):
    """Describe how the arguments that made `folder` differ from these; empty if they do not."""
    try:
        made_with = json.loads((folder / ARGUMENTS_FILE).read_text())
    except (OSError, ValueError):
        # Such a folder holds something else, so not even --overwrite replaces it.
        raise FileExistsError(
            f"'{folder}' holds no readable {ARGUMENTS_FILE}, so it is not a Shapes data set; "
            "choose another output folder"
        ) from None
    return ", ".join(
        f"{name} {made_with.get(name)} instead of {arguments.get(name)}"
        for name in sorted(made_with.keys() | arguments.keys())
        if made_with.get(name) != arguments.get(name)
    )


@contextlib.contextmanager
def _replacing(folder):
    """Yield an empty folder that takes the place of `folder` when the block ends without error."""
    lock, partial, old = (folder.with_name(f".{folder.name}.{x}") for x in _BESIDE)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock, blocking=False):
        for leftover in (partial, old):  # of a killed run
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial)
            raise
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def parse_arguments(arguments=None):
    """Return the command line as the keyword arguments of `generate`."""
    default = SceneOptions()
    parser = argparse.ArgumentParser(
        description="Generate the Shapes data set.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output", default="datasets/shapes", help="folder to make")
    add("--train", type=int, default=300, help="number of training scenes")
    add("--val", type=int, default=1000, help="number of validation scenes")
    add("--size", type=int, nargs="+", default=default.size, help="side, or height and width, px")
    add("--seed", type=int, default=0, help="seed of everything random")
    for name, meaning in (
        ("difficulty", "0 to 1: less contrast, more noise, clutter and occlusion"),
        ("classes", f"number of classes, 1 to {len(CLASS_NAMES)}"),
        ("min_radius", "least radius of a shape, px of an image of side 128"),
        ("max_radius", "greatest radius of a shape, px of an image of side 128"),
        ("min_shapes", "least number of shapes in a scene"),
        ("max_shapes", "greatest number of shapes in a scene"),
        ("hue_spread", "degrees around the hue of a class; at 180 the hue tells nothing"),
    ):
        value = getattr(default, name)
        add(f"--{name.replace('_', '-')}", type=type(value), default=value, help=meaning)
    add("--format", choices=FORMATS, default="coco", help="what to write")
    add("--overwrite", action="store_true", help="replace a data set made with other arguments")
    keywords = vars(parser.parse_args(arguments))
    size = tuple(keywords["size"])
    keywords["size"] = size * 2 if len(size) == 1 else size
    return keywords


def main(arguments=None):
    """Run the command line; an expected error ends it with one sentence."""
    keywords = parse_arguments(arguments)
    try:
        written = generate(**keywords)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"generate.py: {error}")
    print(f"'{keywords['output']}' {'is complete' if written else 'is there already: kept'}")


if __name__ == "__main__":
    main()
