"""Checks of an annotation file's structure, categories and images."""

from types import NoneType

import numpy as np
from PIL import Image

from msad_kd.data.annotations.columns import whole_number, whole_numbers
from msad_kd.data.annotations.findings import PLURALS, REFUSED, Findings


def check_structure(findings: Findings) -> bool:
    """Check that the lists of records are there, and return whether they are."""
    content = findings.content
    content.setdefault("annotations", [])  # files of test images have none
    for record, plural in PLURALS.items():
        records = content[plural] if isinstance(content.get(plural), list) else None
        if records is None or not (records or record == "annotation"):
            findings.refuse(f"is not in COCO format: it has no list of {plural}")
            continue
        findings.usable[record] = np.ones(len(records), dtype=bool)
        wrong = [not isinstance(entry, dict) for entry in records]
        # Without a category, the others cannot be numbered.
        severity = {"severity": REFUSED} if record == "category" else {}
        findings.add(record, wrong, "it should be a dict", **severity)
    return len(findings.usable) == len(PLURALS)


def _repeated(values: list) -> list[bool]:
    """Return a mask of the values that stood earlier in the list, too; None never counts."""
    seen, again = {None}, []
    for value in values:
        again.append(value is not None and value in seen)
        seen.add(value)
    return again


def check_categories(findings: Findings) -> None:
    """Check ids and names; ids become integers. Any fault refuses the file."""
    ids, fits = whole_numbers(findings.column("category", "id"))
    findings.add("category", ~fits, "id should be a whole number", REFUSED, "id")
    names = findings.column("category", "name")
    wrong = [not isinstance(name, str) or not name.strip() for name in names]
    findings.add("category", wrong, "name should be a text", REFUSED, "name")
    usable = findings.usable["category"].copy()
    for key, values in (("id", ids.tolist()), ("name", names)):
        again = _repeated([value if good else None for value, good in zip(values, usable)])
        findings.add("category", again, f"another category has the same {key}", REFUSED)
    for row in np.flatnonzero(usable):
        findings.content["categories"][row]["id"] = int(ids[row])


def check_images(findings: Findings) -> None:
    """Check ids, file names and sizes; ids become integers unless all are texts."""
    records = findings.content["images"]
    ids = findings.column("image", "id")
    if set(map(type, ids)) - {NoneType} != {str}:  # None: missing, or no image at all
        ids = [whole_number(value) for value in ids]
    wrong = [value in (None, "") for value in ids]
    findings.add("image", wrong, "id should be a whole number, or all ids texts", key="id")
    findings.add("image", _repeated(ids), "another image has the same id", REFUSED)
    files = findings.column("image", "file_name")
    wrong = [not isinstance(file, str) or not file.strip("/. ") for file in files]
    findings.add("image", wrong, "file_name should be a text", key="file_name")
    sizes = []
    for key in ("height", "width"):
        values, fits = whole_numbers(findings.column("image", key))
        wrong = ~fits | (values < 1)
        findings.add("image", wrong, f"{key} should be a whole number above 0", key=key)
        sizes.append(values)
    if Image.MAX_IMAGE_PIXELS is not None:  # Pillow raises above twice this number
        limit = 2 * Image.MAX_IMAGE_PIXELS
        words = f"height x width is above {limit}, the pixels that Pillow opens"
        findings.add("image", sizes[0].astype(float) * sizes[1] > limit, words)
    files = [file if good else None for file, good in zip(files, findings.usable["image"])]
    findings.add("image", _repeated(files), "another image has the same file_name")
    for row in np.flatnonzero(findings.usable["image"]).tolist():
        height, width = (int(values[row]) for values in sizes)
        records[row].update(id=ids[row], height=height, width=width)
