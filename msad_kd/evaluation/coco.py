"""COCO's AP by whichever implementation is at hand; all give the same numbers.

faster-coco-eval is several times as fast as pycocotools and comes as a wheel; Detectron2's C++ is
in builds with a compiler only; pycocotools is always there.
"""

from __future__ import annotations

import itertools
import logging

from detectron2.evaluation import COCOEvaluator

from msad_kd.utils.errors import InputError

__all__ = ["IMPLEMENTATIONS", "MetricsEvaluator", "choose_implementation", "within_classes"]

FASTER, COMPILED, OFFICIAL = IMPLEMENTATIONS = ("faster-coco-eval", "detectron2", "pycocotools")
_WAYS_OUT = {
    FASTER: "pip install faster-coco-eval",
    COMPILED: "it takes a Detectron2 that was compiled",
}


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
    """The implementation for a value of TEST.COCO_EVALUATOR: for "auto" the fastest installed.

    Raises:
        InputError: if there is no such implementation, or it is not installed.
    """
    if wanted == "auto":
        return next(name for name in IMPLEMENTATIONS if _is_installed(name))
    if wanted not in IMPLEMENTATIONS:
        raise InputError(
            f"TEST.COCO_EVALUATOR is '{wanted}'; use auto or one of {', '.join(IMPLEMENTATIONS)}"
        )
    if not _is_installed(wanted):
        raise InputError(
            f"TEST.COCO_EVALUATOR is '{wanted}', which is not installed ({_WAYS_OUT[wanted]}); "
            "auto takes what there is"
        )
    return wanted


def within_classes(outputs: list[dict], classes: int) -> list[dict]:
    """A model's outputs without the instances of classes that the data set does not have.

    A model may have more classes than the data. Those without ground truth are in no AP, but
    Detectron2's evaluators stop at them.
    """
    kept = []
    for output in outputs:
        if "instances" in output and (output["instances"].pred_classes >= classes).any():
            instances = output["instances"]
            output = {**output, "instances": instances[instances.pred_classes < classes]}
        kept.append(output)
    return kept


class MetricsEvaluator(COCOEvaluator):
    """Detectron2's ``COCOEvaluator`` with a choice of what computes the AP of boxes and masks."""

    def __init__(
        self,
        dataset_name: str,
        *,
        implementation: str = "auto",
        masks: bool = True,
        **kwargs,
    ):
        """
        Args:
            dataset_name: as for ``COCOEvaluator``.
            implementation: "auto" or one of ``IMPLEMENTATIONS``.
            masks: whether the model predicts masks. This matters where it predicts nothing at
                all: the mask AP is then NaN, as the box AP is, and not absent.
            kwargs: further arguments of ``COCOEvaluator``.

        Raises:
            InputError: as ``choose_implementation``, and if faster-coco-eval is forced on a data
                set whose image ids are no integers.
        """
        chosen = choose_implementation(implementation)
        super().__init__(dataset_name, use_fast_impl=chosen == COMPILED, **kwargs)
        if chosen == FASTER and not all(isinstance(each, int) for each in self._coco_api.imgs):
            if implementation == FASTER:
                raise InputError(
                    f"data set '{dataset_name}': faster-coco-eval needs integers as image ids; set "
                    "TEST.COCO_EVALUATOR pycocotools"
                )
            chosen = OFFICIAL
        self._implementation = chosen
        self._use_fast_impl = chosen != OFFICIAL  # what Detectron2 logs as the "unofficial" API
        self._masks = masks
        self._stock_tasks = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        if names := self._metadata.get("thing_classes"):
            outputs = within_classes(outputs, len(names))
        super().process(inputs, outputs)

    def _tasks_from_predictions(self, predictions):
        return self._stock_tasks

    def _eval_predictions(self, predictions, img_ids=None):
        results = list(itertools.chain(*(each["instances"] for each in predictions)))
        if results:
            tasks = super()._tasks_from_predictions(results)
        else:
            tasks = ["bbox", "segm"] if self._masks else ["bbox"]
        ours = []
        if self._implementation == FASTER and self._do_evaluation and results:
            ours = [task for task in tasks if task != "keypoints"]
        self._stock_tasks = [task for task in tasks if task not in ours]
        logging.getLogger(__name__).info("COCO-style AP is computed by %s", self._implementation)
        # It maps the classes to the data set's (in these very dicts) and writes the results, too.
        super()._eval_predictions(predictions, img_ids)
        for task in ours:
            evaluation = self._evaluate_faster(results, task, img_ids)
            self._results[task] = self._derive_coco_results(
                evaluation, task, class_names=self._metadata.get("thing_classes")
            )

    def _evaluate_faster(self, results, task, img_ids):
        from faster_coco_eval import COCO, COCOeval_faster

        # As in Detectron2: without its box, the size of a result is that of its mask. Copies, since
        # loading adds fields.
        left_out = {"bbox"} if task == "segm" else set()
        results = [{k: v for k, v in each.items() if k not in left_out} for each in results]
        truth = COCO(self._coco_api.dataset)
        evaluation = COCOeval_faster(truth, truth.loadRes(results), task)
        evaluation.params.maxDets = self._max_dets_per_image
        if img_ids is not None:
            evaluation.params.imgIds = img_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return evaluation
