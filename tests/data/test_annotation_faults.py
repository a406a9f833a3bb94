"""Mutated annotation files: refused in one sentence, or normalised to something sound."""

import contextlib
import copy
import io
import json
import math
import random
import time

import numpy as np
import pytest
from annotation_files import HEIGHT, WIDTH, valid_content
from detectron2.data import transforms as T
from detectron2.data.detection_utils import (
    annotations_to_instances,
    transform_instance_annotations,
)
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from msad_kd.data.annotations import read_annotations
from msad_kd.data.coco_format import load_checked
from msad_kd.utils.errors import InputError

VALUES = [
    *(None, True, False, 0, 1, 2, -1, 0.5, 1e-9, 1e9, 1e308, -1e308, 10**25, 10**400),
    *(math.nan, math.inf, -math.inf, "", "text", "3", "7", "-1", "é\0\ud800", [], {}, [[]], [{}]),
    *([1, 2, 3], [[1, 2, 3]], [[1, 1, 9, 1, 9, 9]], [10, 5, 20, 20], {"size": [40, 60]}),
    *({"size": [10**5, 10**5], "counts": [10**10]}, {"size": [40, 60], "counts": "0" * 99}),
    {"size": [40, 60], "counts": [1200, 1200]},
]


def places_in(content, path=()):
    """Every path of a content."""
    if path:
        yield path
    if isinstance(content, (dict, list)):
        for key in content if isinstance(content, dict) else range(len(content)):
            yield from places_in(content[key], (*path, key))


def holder_of(content, path):
    """The list or dict that holds what a path leads to."""
    for key in path[:-1]:
        content = content[key]
    return content


def mutate(content, rng):
    """Change one place of a content."""
    # Deep places are most; every depth gets its turn.
    paths = [path for path in places_in(content)]
    depth = rng.choice(sorted({len(path) for path in paths}))
    path = rng.choice([path for path in paths if len(path) == depth])
    holder, key = holder_of(content, path), path[-1]
    kind = rng.choice(["delete", "value", "value", "value", "nest", "swap", "repeat", "scale"])
    if kind == "delete":
        del holder[key]
    elif kind == "value":
        holder[key] = copy.deepcopy(rng.choice(VALUES))
    elif kind == "nest":
        for _ in range(rng.choice([1, 1, 2, 300])):
            holder[key] = rng.choice([[holder[key]], {"a": holder[key]}])
    elif kind == "swap":
        other = rng.choice([path for path in paths if len(path) == depth])
        value = copy.deepcopy(holder_of(content, other)[other[-1]])
        holder[key] = value
    elif kind == "repeat" and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    elif type(holder[key]) in (int, float):
        holder[key] *= rng.choice([-1, 0, 0.5, 1000, 1e-12])
    else:
        holder[key] = str(holder[key])


def mutated_text(seed):
    """A valid file with one to three changes."""
    rng = random.Random(seed)
    content = valid_content(keypoints=rng.random() < 0.3)
    for _ in range(rng.choice([1, 1, 2, 3])):
        if isinstance(content, dict) and content:
            with contextlib.suppress(OverflowError):  # 10**400 times a float
                mutate(content, rng)
    text = json.dumps(content)
    if seed % 20 == 0:  # the text itself: shortened, or with another letter
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice(["", chr(rng.randrange(256)) + text[at + 1 :]])
    return text


def check_soundness(content):
    """Check what ``read_annotations`` promises, and that a perfect prediction has AP 100."""
    images = {image["id"]: image for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    ids = [annotation["id"] for annotation in content["annotations"]]
    assert len(images) == len(content["images"]) and len(set(ids)) == len(ids)
    assert all(type(number) is int and number >= 1 for number in ids)
    assert len({category["name"] for category in content["categories"]}) == len(categories)
    for annotation in content["annotations"]:
        image = images[annotation["image_id"]]
        assert annotation["category_id"] in categories and annotation["iscrowd"] in (0, 1)
        assert type(annotation["iscrowd"]) is int
        x, y, width, height = annotation["bbox"]
        assert all(map(math.isfinite, annotation["bbox"])) and min(width, height) > 0
        assert -image["width"] <= x <= image["width"] and x + width <= 2 * image["width"]
        assert -image["height"] <= y <= image["height"] and y + height <= 2 * image["height"]
        assert 0 < annotation["area"] < math.inf
    objects = [x for x in content["annotations"] if not x["iscrowd"]]
    if not objects:
        return
    keys = ("image_id", "category_id", "bbox")
    coco = COCO()
    coco.dataset = copy.deepcopy(content)
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        predictions = coco.loadRes([{**{k: x[k] for k in keys}, "score": 1.0} for x in objects])
        evaluation = COCOeval(coco, predictions, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1)


def check_dicts(dicts):
    """Check that Detectron2 makes instances of the dicts."""
    for entry in dicts:
        size = entry["height"], entry["width"]
        if np.prod(size) > 1e6:  # its masks are checked, but too large to draw here
            continue
        objects = entry["annotations"]
        if not all("segmentation" in x for x in objects):  # see check_masks
            objects = [{k: v for k, v in x.items() if k != "segmentation"} for x in objects]
        moved = [
            transform_instance_annotations(x, T.TransformList([T.NoOpTransform()]), size)
            for x in objects
        ]
        instances = annotations_to_instances(moved, size, mask_format="bitmask")
        assert len(instances) == len(entry["annotations"])


def run(seeds, folder):
    """Read a mutated file for each seed; return how many were used and how many refused."""
    for name in ("7.png", "9.png"):
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / name)
    path = folder / "mutated.json"
    outcomes = {"used": 0, "refused": 0}
    for seed in seeds:
        path.write_text(mutated_text(seed), errors="surrogatepass")
        invalid = "drop" if seed % 3 else "error"
        start = time.monotonic()
        try:
            content = read_annotations(str(path), "mutated", invalid)
            check_soundness(content)
            check_dicts(load_checked(str(path), str(folder), f"mutated{seed}", invalid))
            outcomes["used"] += 1
        except InputError as error:
            assert (
                "data set 'mutated" in str(error)
                and "mutated.json'" in str(error)
                and len(str(error)) < 2000
            ), seed
            outcomes["refused"] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        assert time.monotonic() - start < 20, seed
    return outcomes


def test_a_hundred_mutated_files(tmp_path):
    assert min(run(range(100), tmp_path).values()) > 20


@pytest.mark.long
def test_two_thousand_mutated_files(tmp_path):
    assert min(run(range(100, 2100), tmp_path).values()) > 400


def test_the_checks_of_this_file_can_fail():
    check_soundness(valid_content())
    for key, value in (("id", 0), ("bbox", [0, 0, 0, 5]), ("area", 0), ("iscrowd", True)):
        content = valid_content()
        content["annotations"][0][key] = value
        with pytest.raises(AssertionError):
            check_soundness(content)
