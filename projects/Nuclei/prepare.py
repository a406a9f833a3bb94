"""Convert the nuclei images of the 2018 Data Science Bowl to COCO format.

    python projects/Nuclei/prepare.py stage1_train.zip --output datasets/nuclei

reads `<id>/images/<id>.png` and `<id>/masks/*.png` from a folder or a zip and writes
`annotations/instances_{train,val,test}.json` and RGB images in `train/`, `val/` and `test/`;
`instances_train_10.json` and `instances_train_30.json` have 10 and 30 % of the training images. The
split of an image depends on its id alone. The output folder appears only when it is complete.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image
from pycocotools import mask as mask_util
from tqdm import tqdm

SPLITS = {"train": 0.5, "val": 0.7, "test": 1.0}  # the upper end of its range of hashes
SHARES = (10, 30)  # per cent of the training images, for trainings with few labels
# Names that start with a dot are what a Mac adds to a zip.
PNG = re.compile(r"(?:^|/)([^/]+)/(images|masks)/[^/.][^/]*\.png$")


def position_of(image_id):
    """Return where a hash of its id puts an image, from 0 to 1."""
    return int(hashlib.sha256(image_id.encode()).hexdigest(), 16) / 2**256


def split_of(image_id):
    """Return the split of an image."""
    return next(split for split, end in SPLITS.items() if position_of(image_id) <= end)


@contextlib.contextmanager
def open_source(source):
    """Yield the names of a source's files and a function that opens one of them."""
    if source.is_dir():
        names = [path.relative_to(source).as_posix() for path in source.rglob("*.png")]
        yield names, lambda name: open(source / name, "rb")
    elif zipfile.is_zipfile(source):
        try:
            with zipfile.ZipFile(source) as archive:
                # Read whole, its checksum is compared.
                yield archive.namelist(), lambda name: io.BytesIO(archive.read(name))
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            raise ValueError(f"zip '{source}' is damaged ({error}); download it again") from error
    else:
        raise ValueError(f"'{source}' is neither a folder nor a zip; download stage1_train first")


def group_by_image(names):
    """Return {image id: {"images": [name], "masks": [name, ...]}}, all sorted."""
    groups = {}
    for name in sorted(names):
        if match := PNG.search(name):
            groups.setdefault(match[1], {"images": [], "masks": []})[match[2]].append(name)
    if not groups:
        raise ValueError("no <id>/images/<id>.png found; the source should be stage1_train")
    for image_id, files in groups.items():
        if len(files["images"]) != 1:
            raise ValueError(f"'{image_id}' has {len(files['images'])} images instead of one")
    return dict(sorted(groups.items()))


def read_image(open_file, name, mode):
    """Return an image in a mode of Pillow; a ValueError names one that is broken."""
    with open_file(name) as file:
        try:
            return Image.open(file).convert(mode)
        except (OSError, SyntaxError) as error:  # Pillow raises the second for a bad PNG
            raise ValueError(f"'{name}' cannot be read: {error}") from error


def read_masks(names, open_file, shape, report):
    """Yield every usable mask of an image as compressed RLE.

    An empty mask and one of another size than the image, (H, W) = `shape`, are left out. A pixel
    that several masks cover belongs to the first of them. `report` gets a sentence for each.
    """
    taken = np.zeros(shape, bool)
    for name in names:
        mask = np.asarray(read_image(open_file, name, "L")) > 0
        if mask.shape != shape:
            report(f"{name}: size {mask.shape} instead of {shape}, mask left out")
            continue
        if not mask.any():
            report(f"{name}: empty, mask left out")
            continue
        if shared := np.count_nonzero(mask & taken):
            mask = mask & ~taken
            result = "these removed" if mask.any() else "mask left out"
            report(f"{name}: {shared} pixels overlap with other masks, {result}")
        taken |= mask
        if mask.any():
            rle = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
            yield {"size": rle["size"], "counts": rle["counts"].decode()}


def write_split(folder, split, groups, open_file, report, progress):
    """Write the images and the annotation file of one split."""
    images, annotations = [], []
    (folder / split).mkdir()
    for image_id, files in groups.items():
        progress.update()
        image = read_image(open_file, files["images"][0], "RGB")  # without the alpha channel
        masks = list(read_masks(files["masks"], open_file, image.size[::-1], report))
        if not masks:
            report(f"{image_id}: no usable mask, image left out")
            continue
        number, name = len(images) + 1, f"{image_id}.png"
        image.save(folder / split / name)
        size = {"width": image.width, "height": image.height}
        images.append({"id": number, "file_name": name, **size})
        for rle in masks:
            annotation = {"id": len(annotations) + 1, "image_id": number, "category_id": 1}
            shape = {"area": int(mask_util.area(rle)), "bbox": mask_util.toBbox(rle).tolist()}
            annotations.append({**annotation, **shape, "iscrowd": 0, "segmentation": rle})
    categories = [{"id": 1, "name": "nucleus"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return content


def write_shares(folder, content):
    """Write the first of the training images by their hashes, each share within the larger ones."""
    for share in SHARES:
        end = SPLITS["train"] * share / 100
        images = [e for e in content["images"] if position_of(Path(e["file_name"]).stem) <= end]
        chosen = {entry["id"] for entry in images}
        labels = [label for label in content["annotations"] if label["image_id"] in chosen]
        part = json.dumps({**content, "images": images, "annotations": labels})
        (folder / "annotations" / f"instances_train_{share}.json").write_text(part)


def prepare(source, output, report=tqdm.write):
    """Convert a folder or zip; `output` must not exist and appears when it is complete."""
    source, output = Path(source).expanduser(), Path(output).expanduser()
    if output.exists():
        raise FileExistsError(f"'{output}' exists already: remove it or choose another folder")
    part = output.with_name(f".{output.name}.part")
    output.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output.with_name(f".{output.name}.lock"), blocking=False)
    with lock, open_source(source) as (names, open_file):
        groups = group_by_image(names)
        shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
        (part / "annotations").mkdir(parents=True)
        with tqdm(total=len(groups), unit="image", disable=None) as progress:
            for split in SPLITS:
                chosen = {key: files for key, files in groups.items() if split_of(key) == split}
                content = write_split(part, split, chosen, open_file, report, progress)
                if split == "train":
                    write_shares(part, content)
    part.rename(output)


def main(arguments=None):
    """Run the command line; an expected error ends it with one sentence."""
    parser = argparse.ArgumentParser(description="Convert stage1_train to COCO format.")
    output = Path(os.getenv("DETECTRON2_DATASETS") or "datasets", "nuclei")
    parser.add_argument("source", help="the folder or zip of stage1_train")
    parser.add_argument("--output", default=output, help="the folder to make (%(default)s)")
    parsed = parser.parse_args(arguments)
    try:
        prepare(parsed.source, parsed.output)
    except Timeout:
        sys.exit(f"prepare.py: another one is writing to '{parsed.output}'; wait for its end")
    except (ValueError, OSError) as error:
        sys.exit(f"prepare.py: {error}")
    print(f"'{parsed.output}' is complete")


if __name__ == "__main__":
    main()
