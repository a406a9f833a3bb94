"""Recording a module's calls and answering in its place leave no trace."""

import pytest
import torch
from torch import nn

from msad_kd.modeling.capture import answering, recording


class AddOne(nn.Module):
    def forward(self, x):
        return x + 1


def test_recording_keeps_input_and_output_and_answering_does_not_compute():
    module, x = AddOne(), torch.zeros(2)
    with recording(module) as call:
        y = module(x)
    assert call.inputs == (x,) and call.output is y
    module(torch.ones(2))
    assert call.inputs == (x,)  # it listens no longer
    with answering(module, "known"):
        assert module(x) == "known"


@pytest.mark.parametrize("manager", [recording, lambda module: answering(module, None)])
def test_both_end_when_the_block_fails(manager):
    module = AddOne()
    with pytest.raises(RuntimeError), manager(module):
        raise RuntimeError
    assert module(torch.zeros(1)).item() == 1.0
    assert not module._forward_hooks and "forward" not in vars(module)
