"""Checks of all annotations of a file, a field at a time, which also normalise them.

N annotations. Places: a record's place in its list; W, H: width and height of an image.
"""

from collections import Counter
from itertools import chain

import numpy as np
from pycocotools import mask as mask_util

from msad_kd.data.annotations.columns import as_table, positions, reduce_rows
from msad_kd.data.annotations.findings import (
    DOUBTFUL,
    EMPTY,
    INVALID,
    MENDED,
    PLURALS,
    STRANGE,
    Findings,
)
from msad_kd.data.annotations.segmentations import mask_areas, polygon_bounds

TINY = 1e-5  # pixels; a box with a shorter side has no width or no height


def compressed(rle: dict) -> dict:
    """Return an RLE in the compressed form, as Detectron2's ``load_coco_json`` does."""
    if isinstance(rle["counts"], list):
        return mask_util.frPyObjects(rle, *rle["size"])
    return rle


class AnnotationChecks:
    """Checks annotations in place; the categories and images have to be checked before."""

    def __init__(self, findings: Findings):
        self.findings = findings
        self.records: list[dict] = findings.content["annotations"]
        self.usable = findings.usable["annotation"]  # (N,), changed in place

    def run(self) -> None:
        """Check and normalise every field of every annotation."""
        if self.records:
            self._check_references()
            self._check_flags()
            self._check_segmentations()
            with np.errstate(all="ignore"):  # NaN and infinite are among the values
                self._check_boxes()
                self._check_areas()
            self._check_keypoints()
            self._check_copies()
            self._check_ids()

    def _column(self, key: str) -> list:
        return self.findings.column("annotation", key)

    def _add(self, rows, words: str, severity=INVALID, key: str | None = None) -> None:
        self.findings.add("annotation", rows, words, severity, key)

    def _set(self, key: str, rows, values) -> None:
        for row, value in zip(rows, values):
            self.records[row][key] = value

    def _check_references(self) -> None:
        self.places = {}
        for record, key in (("image", "image_id"), ("category", "category_id")):
            entries = self.findings.content[PLURALS[record]]
            ids = [entry.get("id") if isinstance(entry, dict) else None for entry in entries]
            ids = [value if isinstance(value, (int, float, str)) else None for value in ids]
            places, same = positions(ids, self._column(key))
            self._add(places < 0, f"no {record} has its {key}", key=key)
            self.places[record] = places
            if not same:
                rows = np.flatnonzero(self.usable)
                self._set(key, rows, [ids[place] for place in places[rows]])
        # The annotations of an image that is not usable are left out with it.
        self.usable &= self.findings.usable["image"][self.places["image"]]
        sizes = zip(self.findings.column("image", "width"), self.findings.column("image", "height"))
        sizes = np.array([(w or np.nan, h or np.nan) for w, h in sizes], dtype=float)
        self.sizes = sizes[self.places["image"]]  # (N, 2): W and H

    def _check_flags(self) -> None:
        flags = self._column("iscrowd")
        if set(map(type, flags)) != {int} or not {0, 1}.issuperset(flags):
            known = {None: 0, False: 0, True: 1}  # 0, 1, 0.0 and 1.0 are equal to the last two
            flags = [None if isinstance(x, (list, dict)) else known.get(x) for x in flags]
            self._add([flag is None for flag in flags], "iscrowd should be 0 or 1", key="iscrowd")
            rows = np.flatnonzero(self.usable)
            self._set("iscrowd", rows, [flags[row] for row in rows])
        self.crowd = np.array([flag or 0 for flag in flags])
        ignored = list(map(bool, self._column("ignore")))
        self._add(ignored, "ignore is set, which Detectron2 does not support")

    def _check_segmentations(self) -> None:
        values = self._column("segmentation")
        self.spans = np.full((len(values), 4), np.nan)  # x, y, x, y of what polygons span
        self.mask_areas = np.full(len(values), np.nan)
        lists, dicts, others = [], [], []
        kinds = {list: lists, dict: dicts}
        for row, value in enumerate(values):
            if value is None or value == []:
                if isinstance(self.records[row], dict):
                    self.records[row].pop("segmentation", None)
            else:
                kinds.get(type(value), others).append(row)
        self._add(others, "segmentation should be a list of polygons or an RLE", key="segmentation")
        self._check_polygons(np.array(lists, dtype=np.int64), values)
        self._check_rles(np.array(dicts, dtype=np.int64), values)

    def _check_polygons(self, rows: np.ndarray, values: list) -> None:
        polygons = list(chain.from_iterable(values[row] for row in rows))
        owners = np.repeat(rows, [len(values[row]) for row in rows])
        sizes = np.array([len(p) if type(p) is list else -1 for p in polygons], dtype=np.int64)
        key = "segmentation"
        self._add(owners[sizes < 0], "a polygon should be a list of numbers", key=key)
        self._add(owners[sizes % 2 == 1], "a polygon has an odd number of numbers", key=key)
        fits = (sizes >= 6) & (sizes % 2 == 0)
        full = np.zeros(len(values), dtype=bool)
        full[owners[fits]] = True
        self._add(rows[~full[rows]], "a polygon should have at least 6 numbers", key=key)
        short = np.unique(owners[(sizes < 6) & full[owners]])
        short = short[self.usable[short]]
        self._add(short, "polygons with fewer than 6 numbers are left out", MENDED)
        self._set(key, short, [[p for p in values[row] if len(p) >= 6] for row in short])
        spans, areas = polygon_bounds([p for p, fit in zip(polygons, fits) if fit])
        owners = owners[fits]
        finite = np.isfinite(spans).all(axis=1)
        self._add(owners[~finite], "a polygon should hold finite numbers", key=key)
        full_rows, counts = np.unique(owners, return_counts=True)  # owners are in order
        for column, operation in enumerate((np.minimum, np.minimum, np.maximum, np.maximum)):
            self.spans[full_rows, column] = reduce_rows(operation, spans[:, column], counts)
        self.mask_areas[full_rows] = reduce_rows(np.add, areas, counts)
        self._check_inside(self.spans, key)

    def _check_inside(self, corners: np.ndarray, key: str) -> None:
        """Refuse corners x, y, x, y outside of the image, or farther out than its own size."""
        low, high, sizes = corners[:, :2], corners[:, 2:], self.sizes
        self._add(
            ((low > sizes) | (high < 0)).any(axis=1), f"{key} lies outside the image", key=key
        )
        far = ((low < -sizes) | (high > 2 * sizes)).any(axis=1)
        self._add(far, f"{key} reaches far out of the image", key=key)

    def _check_rles(self, rows: np.ndarray, values: list) -> None:
        key = "segmentation"
        rows = rows[self.usable[rows]]
        sizes = self.sizes[rows, ::-1].astype(int).tolist()
        wrong = [values[row].get("size") != size for row, size in zip(rows, sizes)]
        wrong = np.array(wrong, dtype=bool)
        self._add(rows[wrong], "the RLE's size should be the image's [height, width]", key=key)
        rows = rows[~wrong]
        counts = [values[row].get("counts") for row in rows]
        areas = mask_areas(counts, self.sizes[rows].prod(axis=1))
        self._add(rows[np.isnan(areas)], "the RLE's counts do not make up the image", key=key)
        self._add(rows[areas == 0], "the RLE covers nothing", key=key)
        self.mask_areas[rows] = areas
        for row, size in zip(rows, self.sizes[rows, ::-1].astype(int).tolist()):
            values[row]["size"] = size  # integers, where it was 64.0

    def _check_boxes(self) -> None:
        values = self._column("bbox")
        there = np.array([box is not None for box in values])
        given = np.flatnonzero(there)
        fits, numbers = as_table([values[row] for row in given], 4)
        self._add(given[~fits], "bbox should be 4 numbers", key="bbox")
        boxes = np.full((len(values), 4), np.nan)
        boxes[given[fits]] = numbers
        missing = ~there & self.usable
        masked = missing & ~np.isnan(self.mask_areas)
        self._add(missing & ~masked, "bbox is missing, and there is no segmentation")
        self._add(masked, "bbox is missing, and was taken from the segmentation", MENDED)
        for row in np.flatnonzero(masked):
            mask = self.records[row]["segmentation"]
            if isinstance(mask, dict):
                boxes[row] = mask_util.toBbox(compressed(mask))
            else:
                boxes[row, :2] = self.spans[row, :2]
                boxes[row, 2:] = self.spans[row, 2:] - self.spans[row, :2]
            self.records[row]["bbox"] = boxes[row].tolist()
        self.boxes, sides = boxes, boxes[:, 2:]
        self._add(~np.isfinite(boxes).all(axis=1), "bbox should be finite", key="bbox")
        self._add((sides < 0).any(axis=1), "bbox has a negative width or height", key="bbox")
        self._add((sides < TINY).all(axis=1), "bbox has neither width nor height", key="bbox")
        # COCO's own training file has two of these.
        self._add((sides < TINY).any(axis=1), "bbox has no width or no height", EMPTY, key="bbox")
        self._check_inside(np.concatenate([boxes[:, :2], boxes[:, :2] + sides], axis=1), "bbox")
        self._check_meaning(boxes)

    def _check_meaning(self, boxes: np.ndarray) -> None:
        """Note boxes that together look as if they were not x, y, width, height in pixels."""
        out = "reaches out of the image, as if it were two corners, or height and width exchanged"
        ends = boxes[:, :2] + boxes[:, 2:]
        for rows, share, words in (
            ((boxes <= 1).all(axis=1), 0.5, "lies within one pixel, as if sides were from 0 to 1"),
            ((ends > 1.1 * self.sizes).any(axis=1), 0.25, out),
        ):
            if (rows & self.usable).sum() >= max(10, share * self.usable.sum()):
                words += "; COCO's is [x, y, width, height] in pixels"
                self._add(rows, f"bbox {words}", STRANGE, key="bbox")

    def _check_areas(self) -> None:
        values = self._column("area")
        numbers = [
            x if type(x) is float or type(x) is int and abs(x) < 2**63 else 0 for x in values
        ]
        areas = np.array(numbers, dtype=float)
        largest = 9 * self.sizes.prod(axis=1)  # of the largest box that is accepted
        wrong = ~((areas > 0) & (areas <= largest)) & self.usable
        missing = np.array([value is None for value in values])
        self._add(wrong & missing, "area is missing, and was computed", MENDED)
        self._add(wrong & ~missing, "area is wrong, and was computed", MENDED)
        box_areas = self.boxes[:, 2:].prod(axis=1)
        computed = np.where(self.mask_areas > 0, self.mask_areas, box_areas)
        self._set("area", np.flatnonzero(wrong), computed[wrong].tolist())

    def _check_keypoints(self) -> None:
        values = self._column("keypoints")
        given = [row for row, value in enumerate(values) if value not in (None, [])]
        if not given:
            return
        given, values_given = np.array(given), [values[row] for row in given]
        lengths = Counter(len(value) for value in values_given if isinstance(value, list))
        common = max((n for n in lengths if n % 3 == 0), key=lengths.get, default=3)
        fits, points = as_table(values_given, common)
        words = "keypoints should be x, y, visibility of each, as many in every annotation"
        self._add(given[~fits], words, key="keypoints")
        visibility = points[:, 2::3]
        wrong = ~np.isfinite(points).all(axis=1) | ~np.isin(visibility, (0, 1, 2)).all(axis=1)
        words = "keypoints should be finite, and the visibility 0, 1 or 2"
        self._add(given[fits][wrong], words, key="keypoints")
        visible = np.zeros(len(values), dtype=np.int64)
        visible[given[fits]] = (visibility > 0).sum(axis=1)
        numbers = self._column("num_keypoints")
        for row in np.flatnonzero(self.usable).tolist():
            if not values[row]:  # Detectron2 and COCO's evaluation need as many everywhere
                self.records[row]["keypoints"] = [0] * common
            if type(numbers[row]) is not int or numbers[row] != visible[row]:
                self.records[row]["num_keypoints"] = int(visible[row])

    def _check_copies(self) -> None:
        rows = np.flatnonzero(self.usable)
        columns = [self.places["image"], self.places["category"], self.crowd, self.boxes]
        table = np.column_stack(columns)[rows]
        # Copies have the same sum, and hardly any others: these are compared one by one.
        sums = (table * np.random.default_rng(0).random(table.shape[1])).sum(axis=1)
        _, place, counts = np.unique(sums, return_inverse=True, return_counts=True)
        seen, again = set(), []
        for index in np.flatnonzero(counts[place] > 1).tolist():
            mask = self.records[rows[index]].get("segmentation")
            key = (*table[index].tolist(), repr(mask))
            again += [rows[index]] if key in seen else []
            seen.add(key)
        self._add(again, "it repeats another annotation", DOUBTFUL)

    def _check_ids(self) -> None:
        ids = self._column("id")
        kept = [value for value, good in zip(ids, self.usable) if good]
        whole = set(map(type, kept)) <= {int} and all(0 < value < 2**53 for value in kept)
        if not whole or len(set(kept)) < len(kept):
            self._add(
                self.usable, "ids are not unique numbers from 1; all are numbered anew", MENDED
            )
            rows = np.flatnonzero(self.usable).tolist()
            self._set("id", rows, range(1, len(rows) + 1))
