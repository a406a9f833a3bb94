"""Gradient clipping by the total norm, and its key."""

import copy

import pytest
import torch
from torch import nn

from msad_kd.engine.optimizer import build_optimizer
from msad_kd.utils.errors import InputError


def keys_of(kind, limit, norm_type=2.0):
    keys = {"ENABLED": True, "CLIP_TYPE": kind, "CLIP_VALUE": limit, "NORM_TYPE": norm_type}
    return [x for key, value in keys.items() for x in (f"SOLVER.CLIP_GRADIENTS.{key}", value)]


def clipped(config, *keys):
    """The gradients (3, 4) and (12) of two parameters after a step: their total norm is 13."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))])
    optimizer = build_optimizer(config("lr", *keys), model)
    model[0].grad, model[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([12.0])
    optimizer.step()
    return torch.cat([p.grad for p in model]).tolist()


@pytest.mark.parametrize("name", ["full_norm", "full_model"])
@pytest.mark.parametrize("optimizer", ["SGD", "ADAMW"])
def test_the_norm_of_all_gradients_together_is_clipped(config, optimizer, name):
    key = ["SOLVER.OPTIMIZER", optimizer]
    found = clipped(config, *key, *keys_of(name, 6.5))
    assert found == pytest.approx([1.5, 2.0, 6.0], rel=1e-5)
    assert clipped(config, *key, *keys_of(name, 35.0)) == [3.0, 4.0, 12.0]  # below the limit


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("scale", [None, 1024.0])
def test_a_step_is_that_of_torchs_clipping(config, norm_type, scale):
    """With AMP, Detectron2's trainer leaves the unscaling to ``GradScaler.step``, as here."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    theirs, inputs = copy.deepcopy(ours), torch.randn(2, 5)
    optimizer = build_optimizer(config("lr", *keys_of("full_norm", 0.1, norm_type)), ours)
    reference = build_optimizer(config("lr"), theirs)
    theirs(inputs).square().sum().backward()
    norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.1, norm_type)
    assert norm > 1
    reference.step()
    loss = ours(inputs).square().sum()
    if scale is None:
        loss.backward()
        optimizer.step()
    else:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
    for mine, other in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(mine.grad, other.grad)
        torch.testing.assert_close(mine, other)


def test_norm_clips_each_parameters(config):
    assert clipped(config, *keys_of("norm", 5.0)) == pytest.approx([3.0, 4.0, 5.0], rel=1e-5)


def test_an_unknown_optimizer(config):
    with pytest.raises(InputError, match="SOLVER.OPTIMIZER is 'LION'; use SGD or ADAMW"):
        build_optimizer(config("lr", "SOLVER.OPTIMIZER", "LION"), nn.Linear(1, 1))
