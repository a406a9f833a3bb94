"""Reads an annotation file: parse, check, and leave out what cannot be used."""

import gc
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from detectron2.utils.file_io import PathManager

from msad_kd.data.annotations.annotation_checks import AnnotationChecks
from msad_kd.data.annotations.findings import (
    DOUBTFUL,
    EMPTY,
    INVALID,
    MENDED,
    PLURALS,
    REFUSED,
    STRANGE,
    Findings,
    summarise,
)
from msad_kd.data.annotations.image_checks import check_categories, check_images, check_structure
from msad_kd.utils.errors import InputError

_logger = logging.getLogger(__name__)

_CATEGORY_FIELDS = ("id", "name", "supercategory", "keypoints", "skeleton")


def check_content(content: Any) -> Findings:
    """Check the content of an annotation file, and normalise it in place.

    Records that are not usable stay in the content; see ``Findings``.
    """
    findings = Findings(content if isinstance(content, dict) else {})
    if check_structure(findings):
        check_categories(findings)
        check_images(findings)
        AnnotationChecks(findings).run()
    return findings


def read_annotations(json_file: str, name: str, invalid: str = "error") -> dict:
    """Read an annotation file in COCO format, check every record and normalise it.

    Args:
        json_file: the annotation file.
        name: the data set's name, for messages.
        invalid: DATASETS.INVALID_ANNOTATIONS: "error" refuses a file with faulty images or
            annotations, "drop" leaves them out with a warning.

    Returns:
        The file's content: "images" with id, file_name, height and width; "annotations" with id
        (from 1, unique), image_id, category_id, bbox (x, y, width, height), area, iscrowd and
        perhaps segmentation, keypoints and num_keypoints; "categories" with id and name.

    Raises:
        InputError: if the file cannot be used; the message names records and causes.
    """
    source = f"data set '{name}': '{json_file}'"
    with _without_garbage_collection():
        findings = check_content(parse_json(json_file, source))
        return _usable_content(findings, source, invalid == "drop")


def read_kept(json_file: str, name: str, invalid: str = "error") -> dict:
    """Do what ``read_annotations`` does, and keep the content of the last files in memory.

    A training's evaluations read the same file again and again. What is returned must stay as it
    is, and is read again if the file changes.
    """
    json_file = PathManager.get_local_path(json_file)
    status = os.stat(json_file)
    return _read_once(json_file, name, invalid, (status.st_mtime_ns, status.st_size))


@lru_cache(maxsize=4)
def _read_once(json_file: str, name: str, invalid: str, _version: tuple[int, int]) -> dict:
    return read_annotations(json_file, name, invalid)


def _usable_content(findings: Findings, source: str, drop: bool) -> dict:
    problems, usable = findings.problems, findings.usable

    def of(*severities):
        return [problem for problem in problems if problem.severity in severities]

    refused = of(REFUSED)
    if faulty := refused or ([] if drop else of(INVALID)):
        remedy = "" if refused else ", or set DATASETS.INVALID_ANNOTATIONS drop"
        mark = "" if faulty[0].record == "file" else ":"
        raise InputError(f"{source}{mark} {summarise(faulty)}; mend the file{remedy}")
    for problem in of(DOUBTFUL) if drop else ():
        usable[problem.record][problem.rows] = False
    if not usable["image"].any():
        raise InputError(f"{source}: no image is usable; {summarise(problems)}")
    if mended := of(MENDED):
        _logger.info("%s was normalised: %s", source, summarise(mended))
    if doubtful := of(STRANGE) if drop else of(STRANGE, DOUBTFUL):
        _logger.warning("%s: %s; check the file", source, summarise(doubtful))
    if dropped := of(INVALID, EMPTY, DOUBTFUL) if drop else of(EMPTY):
        counts = (f"{(~usable[x]).sum()} {PLURALS[x]}" for x in ("image", "annotation"))
        words = ", ".join(counts), summarise(dropped)
        _logger.warning("%s: %s are left out: %s", source, *words)
    return usable_content(findings)


def usable_content(findings: Findings) -> dict:
    """Return what ``check_content`` has checked and normalised, without what is not usable."""
    content, usable = findings.content, findings.usable
    kept = {
        plural: [entry for entry, good in zip(content[plural], usable[key]) if good]
        for key, plural in PLURALS.items()
    }
    kept["categories"] = [{k: x[k] for k in _CATEGORY_FIELDS if k in x} for x in kept["categories"]]
    return kept


def parse_json(json_file: str, source: str) -> Any:
    """Read a JSON file.

    Raises:
        InputError: if it cannot be read; the message begins with ``source``.
    """
    if not PathManager.isfile(json_file):  # opening a pipe would wait for ever
        state = "is no regular file" if PathManager.exists(json_file) else "does not exist"
        raise InputError(f"{source} {state}")
    try:
        with PathManager.open(json_file, "rb") as file:
            return json.loads(file.read())
    except (OSError, ValueError) as error:  # no JSON, no text, or an integer of 5,000 digits
        raise InputError(f"{source} cannot be read as JSON: {error}") from error
    except RecursionError as error:
        raise InputError(f"{source} cannot be read as JSON: it is nested too deep") from error


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Turn the collector off: it would go through millions of new lists time and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
