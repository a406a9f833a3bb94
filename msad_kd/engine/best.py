"""Keeps the best checkpoint, and ends a training that no longer improves."""

import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.engine.hooks import BestCheckpointer, EvalHook
from detectron2.evaluation import DatasetEvaluator

from msad_kd.checkpoint.checkpointer import BEST, TrainingCheckpointer
from msad_kd.checkpoint.files import write_json
from msad_kd.evaluation.build import metric_names
from msad_kd.utils.errors import InputError
from msad_kd.utils.processes import in_main_process

RECORD = "model_best.json"  # beside the checkpoint: what is known of it after a resume
TASKS = ("segm", "bbox", "keypoints")  # the first one that is evaluated says which model is best

_logger = logging.getLogger(__name__)


def check_metric(cfg: CfgNode, evaluators: dict[str, DatasetEvaluator]) -> None:
    """Check TEST.BEST_METRIC before the training, as far as what it names is computed here.

    Args:
        cfg: the config of the run.
        evaluators: those of DATASETS.TEST, by the name of the data set.

    Raises:
        InputError: if the evaluations will not give it.
    """
    metric = cfg.TEST.BEST_METRIC
    if not metric or cfg.TEST.EVAL_PERIOD == 0 or not cfg.DATASETS.TEST:
        return
    if metric == "validation/total_loss" and not cfg.TEST.LOSS:
        raise InputError(f"TEST.BEST_METRIC is '{metric}', which needs TEST.LOSS True")
    names = {x: metric_names(y) for x, y in evaluators.items()}
    if None in names.values() or len(names) < len(cfg.DATASETS.TEST):
        return
    known = [(f"{x}/" if len(names) > 1 else "") + y for x in names for y in names[x]]
    known += ["validation/total_loss"] * cfg.TEST.LOSS
    # Hooks of others may compute more.
    if metric not in known and metric.split("/")[-2:-1] in [[x] for x in (*TASKS, "segm_coco")]:
        raise InputError(_say_unknown(metric, known))


def _say_unknown(metric: str, known: Iterable[str]) -> str:
    shown = ", ".join(sorted(x for x in known if re.search(r"/(AP\w*|total_loss)$", x)))
    advice = f"; {'name one of these, or ' * bool(shown)}leave the key empty" if metric else ""
    return f"TEST.BEST_METRIC is '{metric}', and the evaluation gives {shown or 'no AP'}{advice}"


class EndOfTraining(BaseException):  # no Exception: Detectron2 logs the traceback of those
    """Ends the loop of a trainer, whose ``max_iter`` is now the iterations that are done."""


class KeepBest(BestCheckpointer):
    """Detectron2's ``BestCheckpointer``, except that it survives a resume and knows TEST.PATIENCE.

    It has to stand after the hooks that evaluate, in all processes. An evaluation that a run was
    killed in is done again when the run is resumed, so that none is missed.
    """

    def __init__(self, cfg: CfgNode, checkpointer: TrainingCheckpointer):
        metric = cfg.TEST.BEST_METRIC
        # The AP of a class is no loss, even if its name contains "loss", as a glossy ibis does.
        mode = "min" if "loss" in metric and "/AP" not in metric else "max"
        super().__init__(cfg.TEST.EVAL_PERIOD, checkpointer, metric, mode, BEST)
        self.patience, self.record = cfg.TEST.PATIENCE, Path(cfg.OUTPUT_DIR, RECORD)
        names = cfg.DATASETS.TEST
        self.prefix = f"{names[0]}/" if len(names) > 1 else ""
        self.since: list[int] = []  # the evaluations since the best one, by iterations done
        self._lacking = self._over = False

    def resume(self, done: int) -> bool:
        """Read the record of a run that has done so many iterations; all processes call this.

        Returns:
            Whether TEST.PATIENCE has ended the run.
        """

        def read():
            try:
                record = json.loads(self.record.read_text())
                best = record["value"], record["iteration"]
                if best[0] is not None:  # it is until an evaluation finds something
                    best = float(best[0]), int(best[1])
                since = [x for x in map(int, record["since"]) if x <= done]
                if self._val_metric in ("", record["metric"]):
                    self._val_metric, self.since = record["metric"], since
                    self.best_metric, self.best_iter = best
            except FileNotFoundError:
                pass  # not evaluated yet
            except (ValueError, KeyError, TypeError):
                _logger.warning(f"'{self.record}' cannot be read: which model is best is not known")
            evaluated = max(self.best_iter or 0, *self.since, 0)
            return done % self._period == 0 and evaluated < done, self._is_over()

        self._lacking, over = in_main_process(read)
        if over:
            _logger.warning(
                f"The run had ended after {done} iterations (TEST.PATIENCE {self.patience}): "
                "nothing is left to train; set it to more to go on"
            )
        return over

    def before_train(self):
        """Evaluate what was not evaluated when the run was killed."""
        trainer = self.trainer
        if not self._lacking or trainer.start_iter >= trainer.max_iter:
            return
        _logger.info(f"The evaluation after {trainer.start_iter} iterations is missing: now")
        trainer.iter = trainer.storage.iter = trainer.start_iter - 1
        for hook in self._evaluations():
            hook._do_eval()
        self.after_step()
        trainer.iter = trainer.storage.iter = trainer.start_iter

    def after_step(self):
        """Keep the model if it is the best so far, and end the training if patience is over."""
        super().after_step()
        if not self._over:
            return
        trainer = self.trainer
        trainer.max_iter = trainer.iter + 1
        for hook in self._evaluations():
            hook._func = lambda: None  # the last evaluation is done
        self._checkpointer.save("model_final", iteration=trainer.iter)
        raise EndOfTraining

    def _evaluations(self) -> list[EvalHook]:
        hooks = self.trainer._hooks
        return [hook for hook in hooks if isinstance(hook, EvalHook) and hook._period > 0]

    def _is_over(self) -> bool:
        return 0 < self.patience <= len(self.since)

    def _best_checking(self):
        self._over = in_main_process(self._check)

    def _check(self) -> bool:
        """Keep the model if it is the best; return whether patience is over."""
        done = self._done()
        # Known already: the last one of a run, or, after a resume, those up to the best one.
        if done <= (self.best_iter or 0) or done in self.since:
            return False
        metrics, before = self.trainer.storage.latest(), self.best_iter
        keys = [f"{self.prefix}{task}/AP" for task in TASKS]
        self._val_metric = self._val_metric or next((x for x in keys if x in metrics), "")
        if self._val_metric not in metrics:
            words = _say_unknown(self._val_metric, metrics)
            if self._val_metric:
                raise InputError(words)
            _logger.warning(f"{words}: no best model is kept")
            return False
        super()._best_checking()
        if self.best_iter == before:
            self.since.append(done)
        best = {"metric": self._val_metric, "value": self.best_metric, "iteration": self.best_iter}
        write_json(self.record, {**best, "since": self.since})
        over = self._is_over() and done < self.trainer.max_iter
        if over:
            _logger.info(
                f"{self._val_metric} has not improved in {self.patience} evaluations: the training "
                f"ends after {done} iterations (TEST.PATIENCE)"
            )
        return over

    def _update_best(self, val: float, iteration: int) -> bool:
        better = super()._update_best(val, self._done())
        self.since = [] if better else self.since
        return better

    def _done(self) -> int:
        return min(self.trainer.iter + 1, self.trainer.max_iter)
