"""Gradient clipping by the total norm, and its key."""

import pytest
import torch
from torch import nn

from msad_kd import InputError
from msad_kd.engine.optimizer import build_optimizer


def clipped(config, limit, **options):
    """The gradients (3, 4) and (12) of two parameters after a step: their total norm is 13."""
    keys = {"ENABLED": True, "CLIP_VALUE": limit, **options}
    opts = [item for key, value in keys.items() for item in (f"SOLVER.CLIP_GRADIENTS.{key}", value)]
    model = nn.ParameterList([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))])
    optimizer = build_optimizer(config("lr", *opts), model)
    model[0].grad, model[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([12.0])
    optimizer.step()
    return torch.cat([p.grad for p in model]).tolist()


@pytest.mark.parametrize("optimizer", ["SGD", "ADAMW"])
def test_full_model_clips_the_norm_of_all_gradients_together(config, optimizer):
    def total(limit):
        def of(name, *opts):
            return config(name, "SOLVER.OPTIMIZER", optimizer, *opts)

        return clipped(of, limit, CLIP_TYPE="full_model")

    assert total(6.5) == pytest.approx([1.5, 2.0, 6.0], rel=1e-5)
    assert total(35.0) == [3.0, 4.0, 12.0]  # below the limit


def test_norm_clips_each_parameters(config):
    assert clipped(config, 5.0, CLIP_TYPE="norm") == pytest.approx([3.0, 4.0, 5.0], rel=1e-5)


def test_unknown_names(config):
    with pytest.raises(InputError, match="CLIP_TYPE is 'total'; use value, norm or full_model"):
        clipped(config, 1.0, CLIP_TYPE="total")
    with pytest.raises(InputError, match="SOLVER.OPTIMIZER is 'LION'; use SGD or ADAMW"):
        build_optimizer(config("lr", "SOLVER.OPTIMIZER", "LION"), nn.Linear(1, 1))
