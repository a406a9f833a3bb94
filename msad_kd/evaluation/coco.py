"""COCO's AP by the fastest implementation that is installed; all give the same numbers.

``max_dets_per_image`` limits the detections of an image. ``build_evaluator`` raises it to
TEST.DETECTIONS_PER_IMAGE if that is above 100; Detectron2 always takes 100.

hotcoco is written in Rust, many times as fast as pycocotools, and comes as a wheel. Only a compiled
Detectron2 has its C++ code. pycocotools is always installed.
"""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.util import find_spec

from detectron2.data import Metadata, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, coco_evaluation

from msad_kd.data.annotations import read_kept
from msad_kd.data.coco_format import class_order
from msad_kd.data.dict_checks import explain_missing_data
from msad_kd.evaluation.rle import instances_to_coco_json
from msad_kd.utils.compat import coco_eval_class, coco_ground_truth
from msad_kd.utils.errors import InputError
from msad_kd.utils.replaced import replaced

_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # of keypoints, Detectron2 has no APs
HOTCOCO, COMPILED, OFFICIAL = IMPLEMENTATIONS = ("hotcoco", "detectron2", "pycocotools")


def _is_installed(implementation: str) -> bool:
    try:
        if implementation == HOTCOCO:
            return find_spec(HOTCOCO) is not None
        if implementation == COMPILED:
            from detectron2.evaluation.fast_eval_api import COCOeval_opt  # noqa: F401
    except ImportError:
        return False
    return True


def _forget_hotcoco() -> None:
    if HOTCOCO in sys.modules:
        sys.modules[HOTCOCO] = None  # what Python takes for a module that is not installed


# A fork copies no threads. In a child of a process that has used hotcoco, it would wait for ever
# for those of the parent.
os.register_at_fork(after_in_child=_forget_hotcoco)


def choose_implementation(wanted: str) -> str:
    """Return the implementation for a value of TEST.COCO_EVALUATOR; "auto" is the fastest.

    Raises:
        InputError: if the implementation is unknown or not installed.
    """
    if wanted == "auto":
        return next(name for name in IMPLEMENTATIONS if _is_installed(name))
    if wanted not in IMPLEMENTATIONS:
        raise InputError(f"TEST.COCO_EVALUATOR is '{wanted}'; use auto or one of {IMPLEMENTATIONS}")
    if not _is_installed(wanted):
        raise InputError(
            f"TEST.COCO_EVALUATOR is '{wanted}', which is not installed (pip install {HOTCOCO}, or "
            "compile Detectron2); auto takes the fastest that is installed"
        )
    return wanted


def within_classes(outputs: list[dict], classes: int) -> list[dict]:
    """Drop the instances of classes that the data set does not have from a model's outputs.

    A model may have more classes than the data. They count in no AP, but Detectron2's evaluators
    fail on them.
    """
    kept = []
    for output in outputs:
        if "instances" in output and (output["instances"].pred_classes >= classes).any():
            instances = output["instances"]
            output = {**output, "instances": instances[instances.pred_classes < classes]}
        kept.append(output)
    return kept


def _ground_truth(path: str, dataset_name: str, invalid: str) -> dict:
    """Return the ground truth in a file, as a copy: what computes AP writes into annotations."""
    content = read_kept(path, dataset_name, invalid)
    return {key: [dict(entry) for entry in content[key]] for key in content}


class AnyCOCOEvaluator(COCOEvaluator):
    """Detectron2's ``COCOEvaluator`` with a choice of what computes AP."""

    def __init__(
        self,
        dataset_name: str,
        *,
        implementation: str = "auto",
        masks: bool = True,
        keypoints: bool = False,
        classes: Sequence[str] = (),
        invalid: str = "error",
        **kwargs,
    ):
        """Build the evaluator.

        Args:
            dataset_name: as for ``COCOEvaluator``.
            implementation: "auto" or one of ``IMPLEMENTATIONS``.
            masks: whether the model predicts masks: mask AP is NaN if it finds nothing at all.
            keypoints: the same for keypoints.
            classes: the names of the model's classes, in its order; by default those in the data
                set's metadata, or those of its file.
            invalid: what becomes of annotations that mean nothing; see ``read_annotations``.
            **kwargs: further arguments of ``COCOEvaluator``.

        Raises:
            InputError: as ``choose_implementation``; if annotations lack the masks or keypoints;
                and if hotcoco is required for a data set that it cannot read, as its ids are not
                whole numbers from 0.
        """
        chosen = choose_implementation(implementation)
        metadata = MetadataCatalog.get(dataset_name)
        if not metadata.get("json_file") and not metadata.get("thing_classes"):
            raise InputError(
                f"data set '{dataset_name}' does not name its classes, so it cannot be evaluated; "
                "set thing_classes of its metadata"
            )
        with (
            explain_missing_data((dataset_name,)),
            coco_ground_truth(lambda path: _ground_truth(path, dataset_name, invalid)),
        ):
            super().__init__(dataset_name, use_fast_impl=chosen == COMPILED, **kwargs)
        self._do_evaluation = bool(self._coco_api.anns)
        if not self._do_evaluation:  # those of a test set may be secret
            logging.getLogger(__name__).warning(
                f"Data set '{dataset_name}' has no annotations: the detections are written, and no "
                "AP is computed"
            )
        self._check_annotations({"segmentation": masks, "keypoints": keypoints})
        self._name_classes(classes or self._metadata.get("thing_classes"))
        self._eval_class = None
        if chosen == HOTCOCO:
            import hotcoco

            try:
                self._coco_api = hotcoco.COCO(self._coco_api.dataset)
                self._eval_class = hotcoco.COCOeval
            except (ValueError, TypeError) as error:  # ids that are texts or below 0, above all
                if implementation == HOTCOCO:
                    raise InputError(
                        f"data set '{dataset_name}': hotcoco cannot read it ({error}); set "
                        "TEST.COCO_EVALUATOR pycocotools"
                    ) from error
                chosen = OFFICIAL
        self._use_fast_impl = chosen != OFFICIAL
        self._implementation = chosen
        self._tasks_of_model = ["bbox"] + ["segm"] * masks + ["keypoints"] * keypoints

    def metric_names(self) -> list[str]:
        """Return the names of all that ``evaluate`` computes, such as "bbox/AP-car"."""
        tasks = self._tasks_of_model if self._do_evaluation else []
        classes = [f"AP-{name}" for name in self._class_names()]
        return [
            f"{task}/{name}"
            for task in tasks
            for name in (*_METRICS, *classes)
            if (task, name) != ("keypoints", "APs")
        ]

    def _class_names(self) -> list[str]:
        """Return the names of the file's categories in their order; none if there is only one."""
        ids = self._metadata.thing_dataset_id_to_contiguous_id
        names = [self._metadata.thing_classes[ids[key]] for key in sorted(ids)]
        return names if len(names) > 1 else []

    def _check_annotations(self, predicted: dict[str, bool]) -> None:
        """Refuse ground truth that lacks what a model predicts; hotcoco takes boxes as masks."""
        for key, option in (("segmentation", "MASK_ON"), ("keypoints", "KEYPOINT_ON")):
            lacking = [x["id"] for x in self._coco_api.dataset["annotations"] if not x.get(key)]
            if predicted[key] and lacking:
                raise InputError(
                    f"data set '{self._metadata.name}': {len(lacking)} of its annotations have no "
                    f"{key}, e.g. that with id {lacking[0]}, so their AP cannot be measured; add "
                    f"them, or set MODEL.{option} False"
                )

    def _name_classes(self, classes: Sequence[str] | None) -> None:
        """Map the model's classes by name to the file's categories, and add those that it lacks."""
        categories = self._coco_api.dataset["categories"]
        classes, ids = class_order(categories, self._metadata.name, classes or None)
        absent = ids.keys() - {category["id"] for category in categories}
        for category in ({"id": key, "name": classes[ids[key]]} for key in sorted(absent)):
            categories.append(category)
            self._coco_api.cats[category["id"]] = category
        new = {"thing_classes": classes, "thing_dataset_id_to_contiguous_id": ids}
        self._metadata = Metadata(**{**vars(self._metadata), **new})

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Collect the outputs of a batch."""
        outputs = within_classes(outputs, len(self._metadata.thing_classes))
        with replaced(coco_evaluation, instances_to_coco_json=instances_to_coco_json):
            super().process(inputs, outputs)

    def _tasks_from_predictions(self, predictions):
        if not predictions:
            return self._tasks_of_model
        return super()._tasks_from_predictions(predictions)

    def _derive_coco_results(self, coco_eval, iou_type, class_names=None):
        # Detectron2 takes the classes to be in the order of the file's ids.
        names = self._class_names()
        results = super()._derive_coco_results(coco_eval, iou_type, class_names=names)
        if coco_eval is None:  # without detections Detectron2 leaves the classes out
            results |= {f"AP-{name}": float("nan") for name in names}
        return results

    def _eval_predictions(self, predictions, img_ids=None):
        logging.getLogger(__name__).info("COCO-style AP is computed by %s", self._implementation)
        fast = self._eval_class
        patch = coco_eval_class(fast) if fast else contextlib.nullcontext()
        with patch, warnings.catch_warnings():
            # Detectron2 sets this limit on purpose.
            warnings.filterwarnings("ignore", "hotcoco: max_dets differ")
            super()._eval_predictions(predictions, img_ids)
