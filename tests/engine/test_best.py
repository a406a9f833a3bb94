"""The best checkpoint, and the end of a training that no longer improves."""

import json
import logging
import operator
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.evaluation import DatasetEvaluator
from helpers import NO_TEST, differing, tensors_of, train

from msad_kd import KDTrainer
from msad_kd.checkpoint.reading import read_checkpoint
from msad_kd.engine import validation
from msad_kd.engine.best import KeepBest
from msad_kd.utils.errors import InputError

EACH = ["TEST.EVAL_PERIOD", 1, "SOLVER.CHECKPOINT_PERIOD", 1]
TWO_SETS = ["DATASETS.TEST", ("tiny_val", "tiny_train")]
NAN = float("nan")


@pytest.fixture
def evaluations(monkeypatch):
    """evaluations(values): let AP have these values in turn; returns those that were used."""

    def give(*values, metrics=lambda ap: {"bbox": {"AP": ap}, "segm": {"AP": ap}}):
        made, rest = [], iter(values)

        def evaluate(cls, cfg, model, evaluators=None):
            made.append(next(rest))
            torch.rand(1)  # as an evaluation does
            return metrics(made[-1])

        monkeypatch.setattr(KDTrainer, "test", classmethod(evaluate))
        return made

    return give


def record(cfg):
    return json.loads(Path(cfg.OUTPUT_DIR, "model_best.json").read_text())


def weights(cfg, name):
    return read_checkpoint(str(Path(cfg.OUTPUT_DIR, name)), "testing")["model"]


def test_the_best_model_is_kept_and_no_run_is_resumed_from_it(config, evaluations):
    evaluations(NAN, 3.0, 5.0, 5.0)
    cfg = config("lr", *EACH)
    trainer = train(cfg)
    best = {"metric": "segm/AP", "value": 5.0, "iteration": 3, "since": [4]}
    assert record(cfg) == best
    same = differing(weights(cfg, "model_best.pth"), weights(cfg, "model_0000002.pth"))
    assert same == [] != differing(weights(cfg, "model_best.pth"), weights(cfg, "model_final.pth"))
    folder = Path(cfg.OUTPUT_DIR)
    assert (folder / "model_best.pth.sha256").is_file()
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    assert trainer.checkpointer.find().name == "model_final.pth"
    start = KDTrainer(config("lr", "MODEL.WEIGHTS", str(folder / "model_best.pth")))
    start.resume_or_load(resume=False)
    kept = weights(cfg, "model_best.pth")
    assert differing(dict(start.model.state_dict()), kept) == [] and start.start_iter == 0


@pytest.mark.parametrize(
    ("keys", "metrics", "metric"),
    [
        ([], lambda ap: {"keypoints": {"AP": ap}, "bbox": {"AP": ap}}, "bbox/AP"),
        (TWO_SETS, lambda ap: {"tiny_val": {"bbox": {"AP": ap}}}, "tiny_val/bbox/AP"),
        pytest.param(
            ["TEST.BEST_METRIC", "bbox/APs"],
            lambda ap: {"bbox": {"AP": 0, "APs": ap}},
            "bbox/APs",
            marks=pytest.mark.long,
        ),
    ],
)
def test_the_metric(config, evaluations, keys, metrics, metric):
    evaluations(2.0, metrics=metrics)
    cfg = config("lr", *EACH, "SOLVER.MAX_ITER", 1, *keys)
    train(cfg)
    assert record(cfg) == {"metric": metric, "value": 2.0, "iteration": 1, "since": []}


def test_the_least_loss_is_the_best(config, evaluations, monkeypatch):
    evaluations(*[1.0] * 4)
    losses = iter([3.0, 1.0, 2.0, 4.0])
    monkeypatch.setattr(
        validation, "compute_losses", lambda *_: {"validation": {"total_loss": next(losses)}}
    )
    cfg = config("lr", *EACH, "TEST.LOSS", True, "TEST.BEST_METRIC", "validation/total_loss")
    train(cfg)
    best = {"metric": "validation/total_loss", "value": 1.0, "iteration": 2, "since": [3, 4]}
    assert record(cfg) == best


def test_evaluations_repeated_up_to_the_best_one_do_not_try_patience(config, evaluations):
    """Checkpoints are rarer than evaluations: a resumed run repeats some."""
    keys = ["TEST.EVAL_PERIOD", 1, "SOLVER.CHECKPOINT_PERIOD", 2, "TEST.PATIENCE", 1]
    cfg = config("lr", *keys, "SOLVER.MAX_ITER", 6)
    evaluations(1.0, 2.0, 3.0, 4.0, 3.0)
    train(cfg)
    whole, folder = record(cfg), Path(cfg.OUTPUT_DIR)
    (folder / "model_final.pth").unlink()
    (folder / "model_0000003.pth").unlink()
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    (folder / "model_best.json").write_text(json.dumps({**whole, "since": []}))
    made = evaluations(3.0, 4.0, 3.0)
    train(cfg, resume=True)
    assert made == [3.0, 4.0, 3.0] and record(cfg) == whole


@pytest.mark.parametrize(
    ("keys", "metric", "words"),
    [
        (
            [],
            "bbox/ap",
            "'bbox/ap', and the evaluation gives bbox/AP, bbox/AP50, .*, segm/APs; name",
        ),
        (TWO_SETS, "bbox/AP", "'bbox/AP', and the evaluation gives tiny_train/bbox/AP, "),
        ([], "keypoints/AP", "'keypoints/AP', and the evaluation gives bbox/AP, "),
        ([], "validation/total_loss", "'validation/total_loss', which needs TEST.LOSS True"),
        (["TEST.LOSS", True], "bbox/AP60", "'bbox/AP60', and .*, validation/total_loss; name one"),
    ],
)
def test_an_unknown_metric_is_refused_before_the_training(config, keys, metric, words):
    wrong = ["TEST.BEST_METRIC", metric]
    with pytest.raises(InputError, match=f"TEST.BEST_METRIC is {words}"):
        KDTrainer(config("lr", *EACH, *wrong, *keys))
    KDTrainer(config("lr", *EACH, *wrong, *NO_TEST))  # which evaluates nothing


@pytest.mark.parametrize("metric", ["mine/score", "validation/centerness_loss"])
def test_hooks_of_others_may_compute_more(config, metric):
    KDTrainer(config("lr", *EACH, "TEST.BEST_METRIC", metric, "TEST.LOSS", True))


class OtherTrainer(KDTrainer):
    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        return DatasetEvaluator()  # nobody knows what it computes


@pytest.mark.parametrize(
    ("metric", "better"),
    [("bbox/AP-glossy ibis", operator.gt), ("mine/loss", operator.lt), ("mine/F1", operator.gt)],
)
def test_whether_more_is_better(config, metric, better):
    assert KeepBest(config("lr", *EACH, "TEST.BEST_METRIC", metric), None)._compare is better


def test_a_metric_that_another_evaluator_does_not_give(config, evaluations, caplog):
    evaluations(*[1.0] * 4)
    with pytest.raises(InputError, match="BEST_METRIC is 'bbox/ap', .* gives bbox/AP, segm/AP;"):
        train(config("lr", *EACH, "TEST.BEST_METRIC", "bbox/ap"), trainer=OtherTrainer)
    evaluations(*[1.0] * 3, metrics=lambda ap: {"accuracy": ap})
    train(config("lr", *EACH, "TEST.PATIENCE", 1, "SOLVER.MAX_ITER", 2))
    assert "gives no AP: no best model is kept" in caplog.text
    caplog.clear()
    train(config("lr", "TEST.PATIENCE", 1, "SOLVER.MAX_ITER", 1))
    assert "TEST.PATIENCE is not used" in caplog.text


def test_patience_ends_a_run_as_its_last_iteration_would(config, evaluations, caplog):
    made = evaluations(4.0, 3.0, 2.0)
    cfg = config("lr", *EACH, "SOLVER.MAX_ITER", 8, "TEST.PATIENCE", 2)
    with caplog.at_level(logging.INFO):
        trainer = train(cfg)
    assert len(made) == 3
    assert caplog.text.count("TEST.PATIENCE") == 1 and "Traceback" not in caplog.text
    folder = Path(cfg.OUTPUT_DIR)
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    assert differing(weights(cfg, "model_final.pth"), weights(cfg, "model_0000002.pth")) == []
    evaluations(2.0)
    (folder / "model_final.pth").unlink()  # killed between the record and the last file
    (folder / "last_checkpoint").write_text("model_0000002.pth")
    again = KDTrainer(cfg)
    again.resume_or_load(resume=True)
    results = again.train()
    assert again.start_iter == again.max_iter == 3
    assert results["bbox"]["AP"] == 2.0 and record(cfg)["since"] == [2, 3]
    assert differing(tensors_of(again.model), tensors_of(trainer.model)) == []
    assert (folder / "model_final.pth").is_file() and not (folder / "model_0000003.pth").exists()
    evaluations(1.0, 1.0)
    cfg = config("lr", *EACH, "SOLVER.MAX_ITER", 8, "TEST.PATIENCE", 3, "OUTPUT_DIR", str(folder))
    train(cfg, resume=True)  # more patience goes on
    assert record(cfg)["since"] == [2, 3, 4]


def test_evaluations_that_found_nothing_count_after_a_resume(config, evaluations):
    evaluations(NAN, NAN)
    cfg = config("lr", *EACH, "SOLVER.MAX_ITER", 2, "TEST.PATIENCE", 3)
    train(cfg)
    assert record(cfg) == {"metric": "segm/AP", "value": None, "iteration": None, "since": [1, 2]}
    made = evaluations(NAN, NAN, NAN)
    more = ["SOLVER.MAX_ITER", 8, "OUTPUT_DIR", cfg.OUTPUT_DIR]
    train(config("lr", *EACH, "TEST.PATIENCE", 3, *more), resume=True)
    assert record(cfg)["since"] == [1, 2, 3] and len(made) == 1


def test_expected_results_are_verified_when_patience_ends_a_run(config, evaluations):
    evaluations(5.0, 4.0)
    expected = ["TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 9.0, 0.1]]"]
    with pytest.raises(SystemExit):
        train(config("lr", *EACH, "TEST.PATIENCE", 1, *expected))


@pytest.mark.parametrize("recorded", [pytest.param(True, marks=pytest.mark.long), False])
def test_a_run_killed_after_its_evaluation_misses_none(config, evaluations, tmp_path, recorded):
    """Killed after step 2: with the record of its evaluation, or before it was written."""
    made = evaluations(4.0, 6.0, 5.0, 1.0)
    keys = [*EACH, "SOLVER.MAX_ITER", 8, "TEST.PATIENCE", 2]
    whole = train(config("lr", *keys)).cfg
    folder, source = tmp_path / "killed", Path(whole.OUTPUT_DIR)
    folder.mkdir()
    shutil.copy(source / "model_0000001.pth", folder)
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    shutil.copy(source / "model_best.pth", folder)  # that of step 2
    since = record(whole)
    if not recorded:
        since = {**since, "value": 4.0, "iteration": 1}
    (folder / "model_best.json").write_text(json.dumps(since))
    again = evaluations(*made[2 if recorded else 1 :])
    cfg = config("lr", *keys, "OUTPUT_DIR", str(folder))
    train(cfg, resume=True)
    assert record(cfg) == record(whole) and record(cfg)["since"] == [3, 4]
    assert len(again) == (2 if recorded else 3)
    for name in ("model_best.pth", "model_final.pth"):
        one, other = (read_checkpoint(str(x / name), "testing") for x in (source, folder))
        assert differing(one["model"], other["model"]) == []
        assert one["trainer"]["iteration"] == other["trainer"]["iteration"]
