"""Cityscapes: its own AP by cityscapesScripts, and COCO's AP on the same ground truth.

Both read the ``*_gtFine_instanceIds.png`` images, so a prediction that is perfect for one is
perfect for the other. The polygons that Detectron2 trains on differ from these images at borders.
"""

import copy
import functools
import glob
import logging
import math
import os
import shutil

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import CityscapesInstanceEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import create_small_table
from PIL import Image
from pycocotools import mask as mask_util

from msad_kd.checkpoint.files import write_json
from msad_kd.data.cityscapes_files import IMAGE, INSTANCES
from msad_kd.data.images import image_size
from msad_kd.evaluation.coco import AnyCOCOEvaluator, within_classes
from msad_kd.utils.compat import numpy_with_in1d
from msad_kd.utils.errors import InputError


def _instance_images(dataset_name: str) -> list[str]:
    """Return the paths of a data set's instance images, or raise an InputError if it has none."""
    folder = PathManager.get_local_path(MetadataCatalog.get(dataset_name).gt_dir)
    paths = sorted(glob.glob(os.path.join(folder, "*", f"*{INSTANCES}")))
    if not paths:
        raise InputError(
            f"data set '{dataset_name}': there is no '*{INSTANCES}' in the folders of '{folder}'; "
            "set DETECTRON2_DATASETS to the folder that has 'cityscapes'"
        )
    return paths


def _check_pairs(dataset_name: str) -> None:
    paths = _instance_images(dataset_name)
    truth = {os.path.basename(x).removesuffix(INSTANCES): x for x in paths}
    folder = MetadataCatalog.get(dataset_name).get("image_dir")
    if folder is None:
        return  # no data set of Detectron2
    folder = PathManager.get_local_path(folder)
    files = glob.glob(os.path.join(folder, "*", f"*{IMAGE}"))
    images = {os.path.basename(x).removesuffix(IMAGE): x for x in files}
    scenes = images.keys() | truth.keys()
    for there, suffix in ((truth, INSTANCES), (images, IMAGE)):
        if lost := scenes - there.keys():
            raise InputError(
                f"data set '{dataset_name}': {len(lost)} of the {len(scenes)} scenes have "
                f"no '*{suffix}', e.g. '{min(lost)}{suffix}'; copy the missing files"
            )
    for scene, path in truth.items():
        size, other = _size_of(path, os.stat(path).st_mtime_ns), image_size(images[scene])[::-1]
        if size != other:
            words = "{} x {} px, and its image {} x {} px".format(*size, *other)
            raise InputError(f"data set '{dataset_name}': '{path}' has {words}; replace it")


@functools.lru_cache(maxsize=10_000)
def _size_of(path: str, _modified: int) -> tuple[int, int]:
    """Return the width and height of an image, all of which is there."""
    try:
        with Image.open(path) as image:
            image.verify()
        return image.size
    except (OSError, SyntaxError, ValueError) as error:  # the last two: of a broken PNG
        raise InputError(f"'{path}' cannot be read ({error}); replace it") from error


class CityscapesEvaluator(CityscapesInstanceEvaluator):
    """Detectron2's evaluator, which reports the AP of each class as well.

    It calls the functions of cityscapesScripts one by one: their common entry point also writes
    ``matches.json`` into the current folder.
    """

    def __init__(self, dataset_name: str, output_dir: str = ""):
        """Build the evaluator, and check that each image has its instance image.

        Args:
            dataset_name: the data set.
            output_dir: the folder for the predictions if there is no AP; "" keeps none.

        Raises:
            InputError: if an image or an instance image is missing, or differs in its size, or if
                the processes are on several machines.
        """
        if comm.get_local_size() != comm.get_world_size():
            raise InputError(
                f"'{dataset_name}' cannot be evaluated on several machines, as Detectron2 gathers "
                'masks in /tmp: train with DATASETS.TEST "()", and use --eval-only on one machine'
            )
        super().__init__(dataset_name)
        self._output_dir = output_dir
        _check_pairs(dataset_name)

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Collect the outputs of a batch."""
        super().process(inputs, within_classes(outputs, len(self._metadata.thing_classes)))

    def metric_names(self) -> list[str]:
        """Return the names of all that ``evaluate`` computes."""
        classes = [f"AP-{name}" for name in self._metadata.thing_classes]
        return [f"segm/{name}" for name in ("AP", "AP50", *classes)]

    def evaluate(self) -> dict | None:
        """Compute AP on the main process; return None on others.

        Returns:
            {"segm": {"AP", "AP50", "AP-<class>", ...}} in percent, NaN for classes without objects.
        """
        comm.synchronize()
        if not comm.is_main_process():
            return None
        from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as scripts
        from cityscapesscripts.evaluation.instances2dict import instances2dict

        truth = _instance_images(self._metadata.name)
        args = copy.copy(scripts.args)
        args.quiet, args.predictionWalk = True, None
        args.predictionPath = os.path.abspath(self._temp_dir)
        with numpy_with_in1d(scripts):
            scripts.setInstanceLabels(args)
            predictions = [scripts.getPrediction(image, args) for image in truth]
            matches = scripts.matchGtWithPreds(predictions, truth, instances2dict(truth), args)
            averages = scripts.computeAverages(scripts.evaluateMatches(matches, args), args)
        if math.isnan(averages["allAp"]) and self._output_dir:
            folder = os.path.join(self._output_dir, "cityscapes")
            shutil.copytree(self._temp_dir, folder, dirs_exist_ok=True)
            logging.getLogger(__name__).warning(
                f"Data set '{self._metadata.name}' has no objects, so there is no AP; the "
                f"predictions are in '{folder}', as Cityscapes' server reads them"
            )
        self._working_dir.cleanup()
        metrics = {"AP": averages["allAp"], "AP50": averages["allAp50%"]}
        metrics |= {f"AP-{name}": values["ap"] for name, values in averages["classes"].items()}
        metrics = {name: 100 * float(value) for name, value in metrics.items()}
        message = "Cityscapes' own AP, by cityscapesScripts:\n%s"
        logging.getLogger(__name__).info(message, create_small_table(metrics))
        return {"segm": metrics}


def cityscapes_as_coco(dataset_name: str) -> dict:
    """Return the ground truth of a Cityscapes data set in COCO format.

    Groups (such as ``cargroup``) become crowds. A category's id is its index in ``thing_classes``,
    and ``file_name`` has no folder. Reading the real data takes minutes, so the result is kept
    until a file changes.
    """
    files = _instance_images(dataset_name)
    versions = tuple((path, os.stat(path).st_mtime_ns) for path in files)
    return _convert(versions, tuple(MetadataCatalog.get(dataset_name).thing_classes))


@functools.lru_cache(maxsize=4)
def _convert(versions: tuple[tuple[str, int], ...], names: tuple[str, ...]) -> dict:
    from cityscapesscripts.helpers.labels import id2label

    images, annotations = [], []
    for number, (path, _) in enumerate(versions, start=1):
        ids = np.asarray(Image.open(path))
        height, width = ids.shape
        file = os.path.basename(path).replace(INSTANCES, IMAGE)
        images.append({"id": number, "file_name": file, "height": height, "width": width})
        for instance in np.unique(ids).tolist():
            # An instance is 1000 x label + number; a group, or stuff, is the label alone.
            crowd = instance < 1000
            label = id2label[instance if crowd else instance // 1000].name
            if label not in names:
                continue
            mask = mask_util.encode(np.asfortranarray(ids == instance, dtype=np.uint8))
            annotation = {
                "id": len(annotations) + 1,
                "image_id": number,
                "category_id": names.index(label),
                "bbox": mask_util.toBbox(mask).tolist(),
                "area": int(mask_util.area(mask)),
                "iscrowd": int(crowd),
                "segmentation": {**mask, "counts": mask["counts"].decode()},
            }
            annotations.append(annotation)
    categories = [{"id": index, "name": name} for index, name in enumerate(names)]
    return {"images": images, "annotations": annotations, "categories": categories}


class CityscapesCOCOEvaluator(AnyCOCOEvaluator):
    """COCO's metrics for Cityscapes: "bbox" and "segm_coco", since "segm" is Cityscapes' own AP."""

    def __init__(self, dataset_name: str, *, output_dir: str, **kwargs):
        """Write the ground truth in COCO format to ``output_dir``, and build the evaluator.

        Args:
            dataset_name: a data set with ``gt_dir`` and ``thing_classes`` in its metadata.
            output_dir: the folder for the ground truth and the results.
            **kwargs: further arguments of ``AnyCOCOEvaluator``.
        """
        # The next evaluator may have another folder, but metadata cannot be changed, only removed.
        name = f"{dataset_name}_in_coco_format"
        path = os.path.join(output_dir, f"{name}.json")
        if name in MetadataCatalog.list():
            MetadataCatalog.remove(name)
        classes = MetadataCatalog.get(dataset_name).thing_classes
        MetadataCatalog.get(name).set(json_file=path, thing_classes=classes)
        if comm.is_main_process():
            write_json(path, cityscapes_as_coco(dataset_name), indent=None)
        comm.synchronize()
        super().__init__(name, output_dir=output_dir, **kwargs)
        images = self._coco_api.imgs.values()
        self._image_ids = {image["file_name"]: image["id"] for image in images}

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Collect the outputs of a batch; the file's name decides the image's id."""
        names = [os.path.basename(sample["file_name"]) for sample in inputs]
        samples = [{**x, "image_id": self._image_ids[name]} for x, name in zip(inputs, names)]
        super().process(samples, outputs)

    def metric_names(self) -> list[str]:
        """Return the names of all that ``evaluate`` computes."""
        return [name.replace("segm/", "segm_coco/") for name in super().metric_names()]

    def evaluate(self, img_ids: list | None = None) -> dict:
        """Compute AP; see the class for the names of the tasks."""
        results = super().evaluate(img_ids)
        return {"segm_coco" if task == "segm" else task: x for task, x in results.items()}
