"""The loss normalizer of every process survives a checkpoint."""

from types import SimpleNamespace

import pytest
from detectron2.utils import comm
from torch import nn

from msad_kd.engine.hooks import KeepNormalizer
from msad_kd.modeling.loss_normalizer import get_normalizer, set_normalizer


def hook(value, iteration=3, max_iter=100):
    kept = KeepNormalizer(2)
    model = nn.Linear(1, 1)
    set_normalizer(model, value)
    checkpointer = SimpleNamespace(model=model)  # which has unwrapped DistributedDataParallel
    kept.trainer = SimpleNamespace(checkpointer=checkpointer, iter=iteration, max_iter=max_iter)
    return kept, model


@pytest.fixture
def three_processes(monkeypatch):
    """Their averages are this one's, and 1 and 2 more."""
    gathered = []

    def all_gather(value):
        gathered.append(value)
        return [value, value + 1, value + 2]

    monkeypatch.setattr(comm, "all_gather", all_gather)
    return gathered


def test_none_before_the_first_step():
    kept, model = hook(None)
    assert get_normalizer(model) is None and kept.state_dict() == {}
    kept.after_step()
    assert kept.state_dict() == {}
    set_normalizer(model, 3.0)
    set_normalizer(model, None)
    assert not hasattr(model, "loss_normalizer")


def test_every_process_gets_its_own_back(three_processes, monkeypatch):
    kept, _ = hook(7.0)
    kept.after_step()
    state = kept.state_dict()
    assert state == {"values": [7.0, 8.0, 9.0]}
    for rank, expected in enumerate([7.0, 8.0, 9.0, 7.0]):  # the last was not there before
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        again, model = hook(None)
        again.load_state_dict(state)
        assert get_normalizer(model) == expected


def test_processes_talk_only_when_a_checkpoint_is_due(three_processes):
    for iteration in range(5):
        hook(7.0, iteration, max_iter=5)[0].after_step()
    assert len(three_processes) == 3  # after 2, 4 and the last, 5


def test_a_checkpoint_at_another_time_has_the_writers(three_processes):
    kept, model = hook(7.0)
    kept.after_step()
    kept.trainer.iter += 1
    set_normalizer(model, 20.0)
    kept.after_step()
    assert kept.state_dict() == {"values": [20.0]}
