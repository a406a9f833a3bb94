"""Trainings that are ended by a signal, in this process: what they save, and how they go on."""

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm
from helpers import NO_TEST, differing, tensors_of, train

from msad_kd import KDTrainer
from msad_kd.engine.signals import StopOnSignal
from msad_kd.utils.errors import InputError
from msad_kd.utils.signals import Stopped

RARE = ["SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 100]


@pytest.fixture(autouse=True)
def heeded_signals():
    """Let Ctrl-C through, which a shell ignores for what it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Signal(HookBase):
    """Sends a signal to this process in the middle of a step."""

    def __init__(self, number, iteration):
        self.number, self.iteration = number, iteration

    def before_step(self):
        if self.trainer.iter == self.iteration:
            os.kill(os.getpid(), self.number)


def stopped(cfg, *hooks):
    """Train until a signal ends it; return the trainer and the exit code."""
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    torch.manual_seed(0)
    trainer = KDTrainer(cfg)
    trainer.register_hooks(hooks)
    trainer.resume_or_load(resume=False)
    with pytest.raises(Stopped) as end:
        trainer.train()
    return trainer, end.value.code


def models(cfg):
    return sorted(path.name for path in Path(cfg.OUTPUT_DIR).glob("*.pth"))


@pytest.fixture
def whole(config, detector):
    """An uninterrupted run."""
    torch.manual_seed(0)
    return train(config("lr", *RARE, *NO_TEST))


def check_resumed(cfg, whole):
    again = train(cfg, resume=True)
    assert again.start_iter > 0
    assert differing(tensors_of(again.model), tensors_of(whole.model)) == []
    states = (t.optimizer.state_dict()["state"].values() for t in (whole, again))
    for one, other in zip(*states, strict=True):
        assert differing(one, other) == []


@pytest.mark.parametrize("detector", ["retinanet"], indirect=True)  # it has a normalizer
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_step_is_finished_and_saved_and_a_resumed_run_is_bitwise_equal(
    config, whole, number, code
):
    cfg = config("lr", *RARE, *NO_TEST)
    handlers = signal.getsignal(number)
    trainer, found = stopped(cfg, Signal(number, 1))
    assert (found, models(cfg)) == (code, ["model_0000001.pth"])
    assert Path(cfg.OUTPUT_DIR, "last_checkpoint").read_text() == "model_0000001.pth"
    assert trainer.checkpointer.model.loss_normalizer and signal.getsignal(number) == handlers
    assert '"iteration": 1' in Path(cfg.OUTPUT_DIR, "metrics.json").read_text()
    check_resumed(cfg, whole)


def test_an_evaluation_ends_at_once_and_the_step_before_it_is_saved(config, monkeypatch, whole):
    cfg = config("lr", *RARE, "TEST.EVAL_PERIOD", 2)

    def interrupted(cls, cfg, model, evaluators=None):
        for module in model.modules():  # as the statistics of low resolution are exchanged
            if "running_mean" in module._buffers:
                buffers = module._buffers
                buffers["running_mean"] = torch.zeros_like(buffers["running_mean"])
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the evaluation went on")

    with monkeypatch.context() as patch:
        patch.setattr(KDTrainer, "test", classmethod(interrupted))
        _, code = stopped(cfg)
    assert (code, models(cfg)) == (143, ["model_0000001.pth"])
    check_resumed(cfg, whole)


@pytest.mark.parametrize("error", [RuntimeError, InputError])
def test_an_evaluation_that_fails_loses_no_step(config, monkeypatch, error):
    """So it does in a process whose partner was ended in the evaluation."""

    def fail(cls, cfg, model, evaluators=None):
        raise error("Connection closed by peer")

    monkeypatch.setattr(KDTrainer, "test", classmethod(fail))
    cfg = config("lr", *RARE, "TEST.EVAL_PERIOD", 2)
    with pytest.raises(error, match="Connection closed"):
        train(cfg)
    assert models(cfg) == ["model_0000001.pth"]


@pytest.mark.parametrize("in_the_step", [True, False])
def test_a_signal_in_the_last_step_leaves_the_final_model_unevaluated(
    config, monkeypatch, in_the_step
):
    cfg = config("lr", *RARE)
    with monkeypatch.context() as patch:
        patch.setattr(KDTrainer, "test", lambda *_: pytest.fail("it was evaluated"))
        if in_the_step:
            _, code = stopped(cfg, Signal(signal.SIGTERM, 3))
        else:  # in the evaluation
            patch.setattr(KDTrainer, "test", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
            _, code = stopped(cfg)
    assert (code, models(cfg)) == (143, ["model_final.pth"])
    trainer = KDTrainer(cfg)
    trainer.resume_or_load(resume=True)
    assert "AP" in trainer.train()["bbox"]


def test_a_signal_where_a_checkpoint_is_due_saves_it_once(config, caplog):
    cfg = config("lr", "SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, *NO_TEST)
    with caplog.at_level("INFO"):
        stopped(cfg, Signal(signal.SIGTERM, 1))
    assert caplog.text.count("Saving checkpoint to") == 1
    assert models(cfg) == ["model_0000001.pth"]


def test_processes_that_train_meet_on_the_cpu(monkeypatch):
    """NCCL would not notice that one has ended, and Python would handle no signal meanwhile."""
    met = []
    monkeypatch.setattr(dist, "barrier", lambda group: met.append(group))
    monkeypatch.setattr(comm, "_get_global_gloo_group", lambda: "gloo")
    before = comm.synchronize
    with StopOnSignal(1, 0, None).handling():
        comm.synchronize()
        monkeypatch.setattr(comm, "get_world_size", lambda: 2)
        comm.synchronize()
    assert met == ["gloo"] and comm.synchronize is before
