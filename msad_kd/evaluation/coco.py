"""COCO's AP by the fastest implementation that is installed; all give the same numbers.

faster-coco-eval is several times as fast as pycocotools and comes as a wheel. Only a compiled
Detectron2 has its C++ code. pycocotools is always installed.
"""

import contextlib
import logging

from detectron2.evaluation import COCOEvaluator

from msad_kd.utils.compat import coco_eval_class
from msad_kd.utils.errors import InputError

FASTER, COMPILED, OFFICIAL = IMPLEMENTATIONS = ("faster-coco-eval", "detectron2", "pycocotools")


def _is_installed(implementation: str) -> bool:
    try:
        if implementation == FASTER:
            import faster_coco_eval  # noqa: F401
        elif implementation == COMPILED:
            from detectron2.evaluation.fast_eval_api import COCOeval_opt  # noqa: F401
    except ImportError:
        return False
    return True


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
            f"TEST.COCO_EVALUATOR is '{wanted}', which is not installed (pip install {FASTER}, or "
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


class AnyCOCOEvaluator(COCOEvaluator):
    """Detectron2's ``COCOEvaluator`` with a choice of what computes AP."""

    def __init__(
        self, dataset_name: str, *, implementation: str = "auto", masks: bool = True, **kwargs
    ):
        """Build the evaluator.

        Args:
            dataset_name: as for ``COCOEvaluator``.
            implementation: "auto" or one of ``IMPLEMENTATIONS``.
            masks: whether to report mask AP (as NaN) if the model finds nothing at all.
            **kwargs: further arguments of ``COCOEvaluator``.

        Raises:
            InputError: as ``choose_implementation``, and if faster-coco-eval is required for a
                data set whose image ids are not integers.
        """
        chosen = choose_implementation(implementation)
        super().__init__(dataset_name, use_fast_impl=chosen == COMPILED, **kwargs)
        if chosen == FASTER and not all(isinstance(image, int) for image in self._coco_api.imgs):
            if implementation == FASTER:
                raise InputError(
                    f"data set '{dataset_name}': faster-coco-eval needs integers as image ids; set "
                    "TEST.COCO_EVALUATOR pycocotools"
                )
            chosen = OFFICIAL
        self._use_fast_impl = chosen != OFFICIAL
        self._implementation, self._masks = chosen, masks
        self._patch = contextlib.nullcontext()
        if chosen == FASTER:
            from faster_coco_eval import COCO, COCOeval_faster

            self._coco_api = COCO(self._coco_api.dataset)
            self._patch = coco_eval_class(COCOeval_faster)

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Collect the outputs of a batch."""
        if names := self._metadata.get("thing_classes"):
            outputs = within_classes(outputs, len(names))
        super().process(inputs, outputs)

    def _tasks_from_predictions(self, predictions):
        if not predictions:
            return ["bbox", "segm"] if self._masks else ["bbox"]
        return super()._tasks_from_predictions(predictions)

    def _eval_predictions(self, predictions, img_ids=None):
        logging.getLogger(__name__).info("COCO-style AP is computed by %s", self._implementation)
        with self._patch:
            super()._eval_predictions(predictions, img_ids)
