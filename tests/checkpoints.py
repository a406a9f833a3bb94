"""Checkpoints of models so small that they cost nothing."""

import io
from pathlib import Path

import torch
from torch import nn

from msad_kd.checkpoint.checkpointer import TrainingCheckpointer

ONE, THREE, FINAL = "model_0000001.pth", "model_0000003.pth", "model_final.pth"


class Net(nn.Module):
    """A head of so many classes on three normalised features, and further layers by their names."""

    def __init__(self, classes=2, more=()):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(3), nn.Linear(3, classes)
        for name in more:
            self.add_module(name, nn.Linear(3, 3))


def torch_bytes(contents, **options):
    """What torch.save writes."""
    stream = io.BytesIO()
    torch.save(contents, stream, **options)
    return stream.getvalue()


class Trainer:
    """The state of a training of which only the iteration is known."""

    iteration = -1

    def state_dict(self):
        return {"iteration": self.iteration}

    def load_state_dict(self, state):
        self.iteration = state["iteration"]


def new_checkpointer(folder):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    return TrainingCheckpointer(model, str(folder), trainer=Trainer())


def save(checkpointer, name, iteration):
    """Save a checkpoint whose first bias is its iteration."""
    nn.init.constant_(checkpointer.model[0].bias, iteration)
    checkpointer.checkpointables["trainer"].iteration = iteration
    checkpointer.save(Path(name).stem, iteration=iteration)


def resumed(folder):
    """The iteration that a new checkpointer resumes from, in the trainer and in the weights."""
    checkpointer = new_checkpointer(folder)
    assert checkpointer.has_checkpoint()
    checkpointer.resume_or_load("", resume=True)
    iteration = checkpointer.checkpointables["trainer"].iteration
    assert checkpointer.model[0].bias.tolist() == [iteration, iteration]
    return iteration
