"""Training checkpoints of a model so small that they cost nothing."""

from pathlib import Path

from torch import nn

from msad_kd.checkpoint.checkpointer import TrainingCheckpointer

ONE, THREE, FINAL = "model_0000001.pth", "model_0000003.pth", "model_final.pth"


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
