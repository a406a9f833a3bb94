"""The report of check_dataset.py: what was found, tables of classes and sizes, and a picture."""

import os
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from matplotlib.figure import Figure
from tabulate import tabulate

from msad_kd import InputError
from msad_kd.checkpoint.files import replacing, write_json
from msad_kd.data.statistics import LIMITS, Objects, collect_objects, resize_scales

HEADINGS = {
    "error": "Errors, which stop a training (mend them, or leave records out by "
    "DATASETS.INVALID_ANNOTATIONS drop)",
    "warning": "Warnings",
    "note": "Notes (nothing has to be done)",
}


@dataclass
class Size:
    """A size to which images are resized."""

    label: str  # what the size is, or ""
    short: float  # px; the shorter side
    longest: float = np.inf  # px; the limit of the longer side
    factor: float | None = None  # resizes by this factor instead

    def sides(self, objects: Objects) -> np.ndarray:
        """Return the sides (N,) that objects have at this size, in pixels."""
        if self.factor is not None:
            return objects.sides * self.factor
        return objects.sides * resize_scales(objects.image_sides, self.short, self.longest)


@dataclass
class DataSet:
    """What could be read of a data set."""

    name: str
    source: str
    role: str  # "TRAIN", "TEST", "UNLABELED" or ""
    dicts: list[dict]
    classes: list[str]

    def __post_init__(self):
        self.objects = collect_objects(self.dicts)
        counts = np.bincount(self.objects.classes, minlength=len(self.classes))
        self.counts = dict(zip(self.classes, counts.tolist()))  # class to number of objects
        sizes = [(x["width"], x["height"]) for x in self.dicts if "height" in x and "width" in x]
        self.image_sizes = np.array(sizes).reshape(-1, 2)

    def describe(self) -> dict:
        """Return counts of what is usable, by the headings of their table."""
        annotations = [x for entry in self.dicts for x in entry.get("annotations", ())]
        pointed = sum(any(x.get("keypoints", ())[2::3]) for x in annotations)
        lowest, middle, highest = (
            f(self.image_sizes.min(axis=1)) if len(self.image_sizes) else 0
            for f in (np.min, np.median, np.max)
        )
        return {
            "data set": f"{self.name}{f' ({self.role})' if self.role else ''}",
            "images": len(self.dicts),
            "without objects": sum(not entry.get("annotations") for entry in self.dicts),
            "annotations": len(annotations),
            "masks": sum("segmentation" in x for x in annotations),
            **({"with keypoints": pointed} if pointed else {}),
            "crowds": sum(bool(x.get("iscrowd", 0)) for x in annotations),
            "shorter sides (px)": f"{lowest} to {highest}, median {middle:g}",
        }


@dataclass
class Report:
    """All that was found."""

    remarks: list[dict] = field(default_factory=list)  # level, words and the names of all records
    data_sets: list[DataSet] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)  # ascending

    def add(self, level: str, words: str, records: list[str] = ()) -> None:
        """Note something that was found; ``level`` is a key of HEADINGS."""
        self.remarks.append({"level": level, "words": words, "records": list(records)})

    @contextmanager
    def catching(self, level: str = "error"):
        """Turn an ``InputError`` into a remark, unless the same was said before."""
        try:
            yield
        except InputError as error:
            if str(error) not in [remark["words"] for remark in self.remarks]:
                self.add(level, str(error))

    def compare(self, unlabeled: list[dict]) -> None:
        """Note classes without objects, and what differs between training and test data.

        ``unlabeled``: the dicts of DATASETS.UNLABELED.
        """
        train = [data_set for data_set in self.data_sets if data_set.role != "TEST"]
        taught = {name for x in train for name, count in x.counts.items() if count}
        dicts = [entry for x in train for entry in x.dicts] + unlabeled
        files = {os.path.realpath(entry["file_name"]) for entry in dicts}
        for x in self.data_sets:
            present = {name for name, count in x.counts.items() if count}
            if x.role == "TEST":
                own = {os.path.realpath(entry["file_name"]) for entry in x.dicts}
                differences = {
                    "has no category, so no AP, for": taught - set(x.classes),
                    "has objects of classes that no training image has:": taught
                    and present - taught,
                    "has images that are training images, too:": own & files,
                }
                if x.dicts and not present:
                    self.add("warning", f"data set '{x.name}' has no objects, so there is no AP")
            else:
                differences = {"has no object of": taught and set(x.classes) - present}
                if x.dicts and not present:
                    self.add("error", f"data set '{x.name}': no image has an object to train on")
            for words, names in differences.items():
                if names:
                    listed = ", ".join(sorted(names)[:10]) + (", ..." if len(names) > 10 else "")
                    self.add("warning", f"data set '{x.name}' {words} {listed}", sorted(names))

    def size_rows(self) -> list[dict]:
        """Return, for every data set and size, how many objects are below each of LIMITS."""
        rows = []
        for data_set in self.data_sets:
            for size in self.sizes if len(data_set.objects.sides) else ():
                sides = size.sides(data_set.objects)
                row = {"data_set": data_set.name, "short_side": round(size.short, 1)}
                row |= {"size": size.label, "objects": len(sides)}
                row |= {f"below_{limit}_px": int((sides < limit).sum()) for limit in LIMITS}
                rows.append({**row, "median_side": round(float(np.median(sides)), 1)})
        return rows

    def text(self) -> str:
        """Return the whole report."""
        files = [f"{data_set.name}: {data_set.source}" for data_set in self.data_sets]
        counts = [data_set.describe() for data_set in self.data_sets]
        parts = ["\n".join(files), tabulate(counts, headers="keys", intfmt=",")] if counts else []
        totals = Counter()
        for data_set in self.data_sets:
            totals.update(data_set.counts)
        cells = [
            [name, *(x.counts.get(name, "no category") for x in self.data_sets)]
            for name, total in totals.most_common()
            if total
        ]
        if cells:
            header = ["class", *(f"objects of {x.name}" for x in self.data_sets)]
            parts += [tabulate(cells, header, disable_numparse=[0])]
            parts += [
                "The shorter sides of objects' boxes when images are resized to a short side:"
            ]
            parts += [self._size_table()]
        for level, heading in HEADINGS.items():
            if words := [x["words"] for x in self.remarks if x["level"] == level]:
                parts.append("\n".join([f"{heading}:", *(f"  - {sentence}" for sentence in words)]))
        found = Counter(remark["level"] for remark in self.remarks)
        errors, warnings = (f"{found[x]} {x}{'s' * (found[x] != 1)}" for x in ("error", "warning"))
        return "\n\n".join([*parts, f"{errors}, {warnings}\n"])

    def _size_table(self) -> str:
        cells = []
        for row in self.size_rows():
            name, short, label, count, *below, median = row.values()
            shares = [f"{number:,} ({number / count:.0%})" for number in below]
            cells.append([name, f"{short:.0f}", label, f"{count:,}", *shares, f"{median:.1f}"])
        header = ["data set", "short side (px)", "size", "objects"]
        header += [f"below {limit} px" for limit in LIMITS] + ["median (px)"]
        align = ["left", "right", "left", *["right"] * (len(header) - 3)]
        return tabulate(cells, header, colalign=align, disable_numparse=True)

    def draw(self, path: str) -> None:
        """Draw the sizes and classes of the objects."""
        data_sets = [x for x in self.data_sets if len(x.objects.sides)]
        first = data_sets[0]
        figure = Figure(figsize=(9, 7), layout="constrained")
        axes = figure.subplot_mosaic([["sizes", "below"], ["classes", "classes"]])
        self._draw_sizes(axes["sizes"], first)
        shorts = [size.short for size in self.sizes]
        for limit in LIMITS:
            shares = [100 * np.mean(x.sides(first.objects) < limit) for x in self.sizes]
            axes["below"].plot(shorts, shares, marker="o", label=f"below {limit} px")
        axes["below"].set(title=f"Small objects of {first.name}", ylim=(0, None))
        axes["below"].set(xlabel="short side of the resized image (px)", ylabel="objects (%)")
        axes["below"].legend()
        self._draw_classes(axes["classes"], data_sets)
        for axis in axes.values():
            axis.grid(color="#dddddd", lw=0.6, axis="y")
            axis.set_axisbelow(True)
        figure.savefig(path, dpi=110, format="png")

    def _draw_classes(self, axis, data_sets: list[DataSet]) -> None:
        counts = data_sets[0].counts
        names = sorted(counts, key=lambda name: -counts[name])[:20]
        width = 0.8 / len(data_sets)
        for place, data_set in enumerate(data_sets):
            middle = np.arange(len(names)) + (place - (len(data_sets) - 1) / 2) * width
            numbers = [data_set.counts.get(name, 0) for name in names]
            axis.bar(middle, numbers, width, label=data_set.name)
        slant = {"rotation": 30, "ha": "right"} if len(names) > 8 else {}
        axis.set_xticks(range(len(names)), [name[:18] for name in names], **slant)
        axis.set(ylabel="objects", yscale="symlog")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        more = f" (the 20 most frequent of {len(counts)})" if len(counts) > 20 else ""
        axis.set_title(f"Objects of each class{more}", loc="left")
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)

    def _draw_sizes(self, axis, data_set: DataSet) -> None:
        named = [size for size in self.sizes if size.label]
        sides = [size.sides(data_set.objects) for size in named]
        highest = np.log2(max(map(np.max, sides))) + 0.5
        bins = 2 ** np.arange(0, max(highest, 4), 0.5)
        for size, values in zip(named, sides):
            label = f"{size.label}: {size.short:.0f} px"
            axis.hist(values.clip(min=1), bins, histtype="stepfilled", alpha=0.5, label=label)
        for limit in LIMITS:
            axis.axvline(limit, color="black", ls="--", lw=1)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set(title=f"Sizes of the objects of {data_set.name}", ylabel="objects")
        axis.set_xlabel("shorter side of the resized box (px)")
        axis.set_ylim(top=1.45 * axis.get_ylim()[1])  # room for the legend
        axis.legend(title="short side of images", loc="upper right")

    def write(self, folder: str) -> None:
        """Write report.txt, report.json and, if there are objects, sizes.png."""
        os.makedirs(folder, exist_ok=True)
        classes = {data_set.name: data_set.counts for data_set in self.data_sets}
        content = {"remarks": self.remarks, "classes": classes, "sizes": self.size_rows()}
        write_json(os.path.join(folder, "report.json"), content, indent=1)
        with replacing(os.path.join(folder, "report.txt")) as part:
            part.write_text(self.text())
        if self.size_rows():
            self.draw(os.path.join(folder, "sizes.png"))
