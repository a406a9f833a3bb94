"""Reading and writing checkpoints; loading one in which every key has to fit."""

import os
import pickle

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from torch import nn

from msad_kd.checkpoint.files import replacing
from msad_kd.utils.errors import InputError

# Prefix of the parameters that distillation adds to a student; a stripped checkpoint has none.
TRAINING_PREFIX = "distiller."

# Keys that need not fit: Detectron2 stored the pixels' statistics until 2020.
_IGNORED = (TRAINING_PREFIX, "pixel_mean", "pixel_std")

# What torch.load raises for a broken file, or for a file that is no checkpoint.
_UNREADABLE = (EOFError, KeyError, RuntimeError, pickle.UnpicklingError)


class _StrictCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, except that a key that does not fit is an error."""

    def __init__(self, model: nn.Module, file: str, config: str):
        super().__init__(model)
        self.file, self.config = file, config

    def _load_file(self, filename):
        try:
            return super()._load_file(filename)
        except _UNREADABLE as error:
            message = f"the checkpoint '{self.file}' for {self.config} cannot be read ({error})"
            raise InputError(message) from error

    def _log_incompatible_keys(self, incompatible) -> None:
        unexpected = [k for k in incompatible.unexpected_keys if not k.startswith(_IGNORED)]
        shapes = {key: f"{key} {a} -> {b}" for key, a, b in incompatible.incorrect_shapes}
        # The checkpointer counts keys of another shape among the missing ones.
        missing = [key for key in incompatible.missing_keys if key not in shapes]
        mismatches = {
            "keys of the model are absent from it": missing,
            "of its keys are not in the model": unexpected,
            "of its keys have another shape than the model's": list(shapes.values()),
        }
        problems = [f"{len(v)} {what}, e.g. {v[0]}" for what, v in mismatches.items() if v]
        if problems:
            raise InputError(
                f"'{self.file}' does not fit {self.config}: {'; '.join(problems)}; was it trained "
                "with another config?"
            )


def check_exists(path: str, purpose: str) -> None:
    """Check that a checkpoint exists; URLs are not checked.

    Args:
        path: the checkpoint.
        purpose: what needs it, for the error message.

    Raises:
        InputError: if the path is empty or no such file exists.
    """
    if not path:
        raise InputError(f"no checkpoint is named for {purpose}; give one, e.g. by MODEL.WEIGHTS")
    # Addresses such as https:// and detectron2:// are fetched when they are read.
    if "://" not in path and not PathManager.isfile(path):
        raise InputError(f"the checkpoint '{path}' for {purpose} does not exist; correct the path")


def load_strictly(model: nn.Module, path: str, config: str) -> None:
    """Load a checkpoint into a model; every key has to fit.

    The file may also hold a student's ``distiller`` and, as old checkpoints do, the pixels' mean
    and standard deviation; both are ignored.

    Args:
        model: the model.
        path: a file or address that Detectron2's checkpointer reads.
        config: what the model was built from, for error messages.

    Raises:
        InputError: if the file is missing or cannot be read, or if keys do not fit.
    """
    check_exists(path, config)
    rest = _StrictCheckpointer(model, path, config).load(path)
    model.classes = list(rest.get("classes") or ())  # the names that it was trained on, if known


def read_model(path: str) -> dict[str, torch.Tensor]:
    """Return the state dict in a Detectron2 checkpoint, on the CPU.

    Raises:
        InputError: if the file does not exist, cannot be read, or is not such a checkpoint.
    """
    if not os.path.isfile(path):
        raise InputError(f"the file '{path}' does not exist")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise InputError(f"the file '{path}' cannot be read as a checkpoint ({error})") from error
    if not isinstance(contents, dict) or "model" not in contents:
        raise InputError(f"'{path}' is not a Detectron2 checkpoint: it has no 'model'")
    return contents["model"]


def save_model(state: dict[str, torch.Tensor], path: str) -> None:
    """Write a state dict as a Detectron2 checkpoint, completely or not at all."""
    with replacing(path) as part:
        torch.save({"model": state}, part)
