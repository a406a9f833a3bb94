"""Cityscapes: its own AP by cityscapesScripts, and COCO's AP on the same ground truth.

Both read the ``*_gtFine_instanceIds.png`` images, so that a prediction which is perfect for one is
perfect for the other; the polygons that Detectron2 trains on differ from them at the borders.
"""

from __future__ import annotations

import copy
import functools
import glob
import logging
import os
import types

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import CityscapesInstanceEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import create_small_table
from PIL import Image
from pycocotools import mask as mask_util

from msad_kd.checkpoint.files import write_json
from msad_kd.evaluation.coco import MetricsEvaluator, within_classes
from msad_kd.utils.errors import InputError

__all__ = ["CityscapesEvaluator", "CityscapesMetricsEvaluator", "cityscapes_as_coco"]

_SUFFIX = "_gtFine_instanceIds.png"


def _instance_images(dataset_name: str) -> list[str]:
    """The instance images of a data set, one a picture.

    Raises:
        InputError: if there is none.
    """
    folder = PathManager.get_local_path(MetadataCatalog.get(dataset_name).gt_dir)
    found = sorted(glob.glob(os.path.join(folder, "*", f"*{_SUFFIX}")))
    if not found:
        raise InputError(
            f"data set '{dataset_name}': there is no '*{_SUFFIX}' in the folders of '{folder}'; "
            "set DETECTRON2_DATASETS to the folder that has 'cityscapes'"
        )
    return found


class CityscapesEvaluator(CityscapesInstanceEvaluator):
    """Detectron2's evaluator, with the AP of each class, too.

    cityscapesScripts' functions compute it. Its one function that calls them all also writes
    ``matches.json`` into the current folder, and fails at it with numpy 2.4.
    """

    def __init__(self, dataset_name: str):
        super().__init__(dataset_name)
        self._dataset_name = dataset_name

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        super().process(inputs, within_classes(outputs, len(self._metadata.thing_classes)))

    def evaluate(self) -> dict | None:
        """
        Returns:
            on the main process {"segm": {"AP", "AP50", "AP-<class>", ...}} in percent; NaN for a
            class that does not occur.

        Raises:
            InputError: if the ground truth is absent.
        """
        comm.synchronize()
        if not comm.is_main_process():
            return None
        from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as scripts
        from cityscapesscripts.evaluation.instances2dict import instances2dict

        # numpy 2.4 dropped in1d; the numpy that these scripts see, and no other, has it.
        scripts.np = types.SimpleNamespace(**{**vars(np), "in1d": np.isin})
        truth = _instance_images(self._dataset_name)
        args = copy.copy(scripts.args)
        args.quiet = True
        args.predictionPath = os.path.abspath(self._temp_dir)
        args.predictionWalk = None
        scripts.setInstanceLabels(args)
        predictions = [scripts.getPrediction(image, args) for image in truth]
        matches = scripts.matchGtWithPreds(predictions, truth, instances2dict(truth), args)
        averages = scripts.computeAverages(scripts.evaluateMatches(matches, args), args)
        self._working_dir.cleanup()
        metrics = {"AP": 100 * averages["allAp"], "AP50": 100 * averages["allAp50%"]}
        for name, found in averages["classes"].items():
            metrics[f"AP-{name}"] = 100 * found["ap"]
        metrics = {name: float(value) for name, value in metrics.items()}
        logging.getLogger(__name__).info(
            "Cityscapes' own AP, by cityscapesScripts:\n%s", create_small_table(metrics)
        )
        return {"segm": metrics}


@functools.lru_cache
def cityscapes_as_coco(dataset_name: str) -> dict:
    """The ground truth of a Cityscapes data set in COCO format.

    Groups (such as ``cargroup``) are crowds. A category's id is its index in ``thing_classes``, an
    image's is a number, and its ``file_name`` is the picture's without a folder. It is read once a
    process, for that takes minutes with the real data.

    Raises:
        InputError: if the ground truth is absent.
    """
    from cityscapesscripts.helpers.labels import id2label

    names = MetadataCatalog.get(dataset_name).thing_classes
    content = {
        "images": [],
        "annotations": [],
        "categories": [{"id": index, "name": name} for index, name in enumerate(names)],
    }
    for number, path in enumerate(_instance_images(dataset_name), start=1):
        ids = np.asarray(Image.open(path))
        content["images"].append(
            {
                "id": number,
                "file_name": os.path.basename(path).replace(_SUFFIX, "_leftImg8bit.png"),
                "height": ids.shape[0],
                "width": ids.shape[1],
            }
        )
        for instance in np.unique(ids).tolist():
            # An instance is 1000 x its label and a number; a group, or stuff, is the label alone.
            label = id2label[instance // 1000 if instance >= 1000 else instance]
            if label.name not in names:
                continue
            mask = mask_util.encode(np.asfortranarray(ids == instance, dtype=np.uint8))
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": number,
                    "category_id": names.index(label.name),
                    "bbox": mask_util.toBbox(mask).tolist(),
                    "area": int(mask_util.area(mask)),
                    "iscrowd": int(instance < 1000),
                    "segmentation": {**mask, "counts": mask["counts"].decode()},
                }
            )
    return content


class CityscapesMetricsEvaluator(MetricsEvaluator):
    """COCO's metrics for Cityscapes: "bbox" and "segm_coco", since "segm" is Cityscapes' own AP."""

    def __init__(self, dataset_name: str, *, output_dir: str, **kwargs):
        """
        Args:
            dataset_name: with ``gt_dir`` and ``thing_classes`` in its metadata.
            output_dir: where the ground truth in COCO format is written, too.
            kwargs: further arguments of ``MetricsEvaluator``.

        Raises:
            InputError: if the ground truth is absent.
        """
        # Metadata of its own: those of the data set cannot take a second output folder's file.
        name = f"{dataset_name}_in_coco_format"
        path = os.path.join(output_dir, f"{name}.json")
        if name in MetadataCatalog.list():
            MetadataCatalog.remove(name)
        MetadataCatalog.get(name).set(
            json_file=path, thing_classes=MetadataCatalog.get(dataset_name).thing_classes
        )
        if comm.is_main_process():
            write_json(path, cityscapes_as_coco(dataset_name), indent=None)
        comm.synchronize()
        super().__init__(name, output_dir=output_dir, **kwargs)
        images = self._coco_api.imgs.items()
        self._numbers = {image["file_name"]: number for number, image in images}

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        names = [os.path.basename(each["file_name"]) for each in inputs]
        numbered = [{**x, "image_id": self._numbers[n]} for x, n in zip(inputs, names)]
        super().process(numbered, outputs)

    def evaluate(self, img_ids: list | None = None) -> dict:
        results = super().evaluate(img_ids)
        return {"segm_coco" if task == "segm" else task: each for task, each in results.items()}
