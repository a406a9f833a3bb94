"""Losses that are NaN or infinite: what the error names."""

import pytest
import torch
from helpers import NO_TEST, train

from msad_kd import KDTrainer
from msad_kd.engine.signals import StopOnSignal
from msad_kd.losses.feature import DISTILL_LOSS_REGISTRY
from msad_kd.modeling.fcos import FCOS
from msad_kd.utils.errors import InputError, NotFiniteError

STEPS = ["SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 1, *NO_TEST]


@pytest.fixture
def spoil(monkeypatch):
    """spoil(bad): from the third batch on the RPN's loss of an image becomes ``bad``."""
    from detectron2.modeling.proposal_generator import RPN

    def call(bad):
        losses, calls = RPN.losses, []

        def spoiled(self, *args):
            calls.append(1)
            found = losses(self, *args)
            return found if len(calls) <= 2 else {**found, "loss_rpn_loc": torch.tensor(bad)}

        monkeypatch.setattr(RPN, "losses", spoiled)

    return call


@pytest.mark.parametrize(
    ("bad", "mixup"), [(float("nan"), 0), (float("inf"), 0), (float("-inf"), 1)]
)
def test_a_loss_of_the_detector(config, spoil, bad, mixup):
    spoil(bad)
    cfg = config("lr", *STEPS, "INPUT.MIXUP.PROB", float(mixup))
    with pytest.raises(NotFiniteError, match="iteration 2: loss_rpn_loc$") as error:
        train(cfg)
    text = str(error.value)
    assert f"the last checkpoint is '{cfg.OUTPUT_DIR}/model_0000001.pth'" in text
    assert text.count("/train/") == (4 if mixup else 2) and isinstance(error.value, InputError)


def test_a_detector_that_raises_it_itself_before_its_losses_are_known(config, monkeypatch):
    """Other processes wait for its gradients: it must not wait for them to agree."""
    from detectron2.modeling.proposal_generator import RPN

    def diverged(*_):
        raise FloatingPointError("Predicted boxes or scores contain Inf/NaN")

    monkeypatch.setattr(RPN, "predict_proposals", diverged)
    monkeypatch.setattr(StopOnSignal, "agree", lambda *_: pytest.fail("it waited for the others"))
    with pytest.raises(NotFiniteError, match="at iteration 0: Predicted boxes") as error:
        train(config("lr", *STEPS))
    assert str(error.value).count("/train/") == 2


@pytest.mark.parametrize("detector", ["fcos"], indirect=True)
def test_boxes_that_are_not_finite(config, monkeypatch):
    losses = FCOS.losses

    def spoiled(self, anchors, logits, classes, deltas, boxes, centerness):
        deltas = [float("nan") * x for x in deltas]
        return losses(self, anchors, logits, classes, deltas, boxes, centerness)

    monkeypatch.setattr(FCOS, "losses", spoiled)
    with pytest.raises(NotFiniteError, match="at iteration 0: bad box") as error:
        train(config("lr", *STEPS))
    assert str(error.value).count("/train/") == 2


@pytest.mark.parametrize("last", [False, True])
def test_a_loss_of_the_distillation_in_the_first_step(student_config, monkeypatch, last):
    @DISTILL_LOSS_REGISTRY.register()
    def bad(student, teacher):
        return (student - teacher).mean() * (float("nan") if student.shape[-1] == 4 else 1.0)

    try:
        options = ["KD.LOSSES", [{"name": "bad", "weight": 1.0}], "TEST.EVAL_PERIOD", 1]
        cfg = student_config(*options, "SOLVER.MAX_ITER", 1 if last else 3)
        monkeypatch.setattr(KDTrainer, "test", lambda *_: pytest.fail("it was evaluated"))
        with pytest.raises(FloatingPointError, match="Not finite at iteration 0: bad_p4$") as error:
            train(cfg)
        assert "there is no checkpoint yet" in str(error.value)
    finally:
        DISTILL_LOSS_REGISTRY._obj_map.pop("bad")
