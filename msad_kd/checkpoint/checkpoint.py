"""Reading and writing checkpoints; loading one in which every key has to fit."""

import json
import logging
import os
from collections import Counter
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from fvcore.common.checkpoint import _filter_reused_missing_keys
from safetensors.torch import save
from torch import nn

from msad_kd.checkpoint.files import replacing_with_checksum
from msad_kd.checkpoint.reading import check_exists, fetch, read_checkpoint, read_local
from msad_kd.utils.errors import InputError
from msad_kd.utils.hashes import split_hash

# Prefix of the parameters that distillation adds to a student; a stripped checkpoint has none.
TRAINING_PREFIX = "distiller."

# Keys that need not fit: Detectron2 stored the pixels' statistics until 2020.
_IGNORED = (TRAINING_PREFIX, "pixel_mean", "pixel_std")

# At the end of an address, it asks Detectron2's git main to match keys as it does those of a .pkl.
_HEURISTICS = "?matching_heuristics=True"


class SafeCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, except that no file runs code and that faults are sentences.

    It reads what ``read_checkpoint`` reads, and one line of the log says how much of the model is
    in the file. A file of which nothing fits is refused.
    """

    purpose = "MODEL.WEIGHTS"  # what needs the file, for error messages

    def load(self, path: str, *args, **keywords) -> dict[str, Any]:
        """Load a file of weights; nothing happens if the path is "".

        Raises:
            InputError: as ``read_checkpoint``, if a weight has another kind of numbers than the
                model's, or if nothing fits.
        """
        file, digest = split_hash(path or "")
        self._heuristics = file.endswith(_HEURISTICS)
        file = file.removesuffix(_HEURISTICS)
        self._path = f"{file}#sha256={digest}" if digest else file
        if self._path:
            check_exists(file, self.purpose)
            file = fetch(file, self.purpose)
        try:
            return super().load(file, *args, **keywords)
        finally:
            self._parsed_url_during_load = None  # git main wants this before the next file

    def _load_file(self, filename: str) -> dict[str, Any]:
        contents = read_local(filename, self._path, self.purpose)
        if "__author__" in contents:
            self.logger.info("Reading a file from '%s'", contents["__author__"])
        return {**contents, "matching_heuristics": True} if self._heuristics else contents

    def _load_model(self, checkpoint: dict[str, Any]):
        own = self.model.state_dict()
        if checkpoint.pop("matching_heuristics", False):  # as Detectron2 does
            checkpoint["model"] = align_and_update_state_dicts(
                own, checkpoint["model"], c2_conversion=checkpoint.get("__author__") == "Caffe2"
            )
        types = {
            key: (value.dtype, own[name].dtype)
            for key, value in checkpoint["model"].items()
            if (name := key.removeprefix("module.")) in own and _is_weight(name)
        }
        wrong = [f"'{key}' ({a}, {b})" for key, (a, b) in types.items() if _kind(a) != _kind(b)]
        if wrong:
            raise InputError(
                f"'{self._path}' for {self.purpose} has {len(wrong)} weights whose numbers are of "
                f"another kind than the model's, e.g. {wrong[0]}; take another checkpoint"
            )
        self._size, self._weights = len(checkpoint["model"]), checkpoint["model"]
        return super()._load_model(checkpoint)

    def _log_incompatible_keys(self, incompatible) -> None:
        shapes = {key: f"{key} {a} -> {b}" for key, a, b in incompatible.incorrect_shapes}
        own = [key for key in self.model.state_dict() if _is_weight(key)]
        fitting = [key for key in own if key in self._weights]  # Detectron2 took the others out
        # Keys that a layer fills in itself, such as those of frozen statistics, are in neither.
        missing = _filter_reused_missing_keys(self.model, incompatible.missing_keys)
        missing = [key for key in own if key in missing]
        unused = [key for key in incompatible.unexpected_keys if _is_weight(key)]
        subject = f"'{self._path}' for {self.purpose}"
        if own and not fitting:
            other = next(iter(shapes.values()), unused[0] if unused else "none")
            raise InputError(
                f"none of the {self._size} weights of {subject} fits the model, e.g. {other} (the "
                f'model has {own[0]}); name the checkpoint of another model, or "" for none'
            )
        said = [f"{len(fitting)} of the model's {len(own)} weights are in {subject}"]
        if missing:
            said.append(f"{len(missing)} start untrained: {_grouped(missing)}")
        if shapes:
            said.append(f"{len(shapes)} of these have another shape: {', '.join(shapes.values())}")
        if unused:
            said.append(f"{len(unused)} of the file's are not in the model: {_grouped(unused)}")
        level = logging.WARNING if missing or unused else logging.INFO
        logging.getLogger(__name__).log(level, "; ".join(said))


def mismatches(incompatible, ignored: tuple[str, ...] = ()) -> str:
    """Count and name the keys that do not fit; "" if all do.

    Args:
        incompatible: what fvcore's checkpointer found.
        ignored: prefixes of the file's keys that the model need not have.
    """
    shapes = {key: f"{key} {a} -> {b}" for key, a, b in incompatible.incorrect_shapes}
    missing = [key for key in incompatible.missing_keys if key not in shapes]
    unexpected = [key for key in incompatible.unexpected_keys if not key.startswith(ignored)]
    problems = {
        "keys of the model are absent from it": missing,
        "of its keys are not in the model": unexpected,
        "of its keys have another shape than the model's": list(shapes.values()),
    }
    return "; ".join(f"{len(v)} {what}, e.g. {v[0]}" for what, v in problems.items() if v)


def _kind(dtype: torch.dtype) -> tuple[bool, bool]:
    return dtype.is_floating_point, dtype == torch.bool


def _is_weight(key: str) -> bool:
    """Return whether a key counts: neither one that need not fit nor a counter of batches."""
    return not key.startswith(_IGNORED) and not key.endswith("num_batches_tracked")


def _grouped(keys: list[str]) -> str:
    """Name the parts of a model that keys belong to, with the number of keys in each."""
    counts = Counter(".".join(key.split(".")[:2]) for key in keys)
    return ", ".join(f"{part} ({count})" for part, count in counts.items())


class _StrictCheckpointer(SafeCheckpointer):
    """A checkpointer for which a key that does not fit is an error."""

    def __init__(self, model: nn.Module, file: str, config: str):
        super().__init__(model)
        self._path, self.purpose = file, config

    def _log_incompatible_keys(self, incompatible) -> None:
        if said := mismatches(incompatible, _IGNORED):
            raise InputError(
                f"'{self._path}' does not fit {self.purpose}: {said}; was it trained with another "
                "config?"
            )


def load_strictly(model: nn.Module, path: str, config: str, contents: dict | None = None) -> None:
    """Load a checkpoint into a model; every key has to fit.

    The file may also hold a student's ``distiller`` and, as old checkpoints do, the pixels' mean
    and standard deviation; both are ignored.

    Args:
        model: the model.
        path: what ``read_checkpoint`` reads.
        config: what the model was built from, for error messages.
        contents: what the file holds, if it has been read; its "model" is taken out.

    Raises:
        InputError: as ``read_checkpoint``, or if keys do not fit.
    """
    checkpointer = _StrictCheckpointer(model, path, config)
    if contents is None:
        check_exists(path, config)
        contents = checkpointer.load(path)
    else:
        checkpointer._log_incompatible_keys(checkpointer._load_model(contents))
    model.classes = list(contents.get("classes") or ())  # that it was trained on, if known


def read_model(path: str, purpose: str) -> dict:
    """Do what ``read_checkpoint`` does for a file whose keys are those of Detectron2.

    Raises:
        InputError: as ``read_checkpoint``, or if the keys are those of another project.
    """
    contents = read_checkpoint(path, purpose)
    if contents.get("matching_heuristics"):
        raise InputError(
            f"'{path}' for {purpose} has another project's names of weights; load it as "
            "MODEL.WEIGHTS, and take the checkpoint that the run writes"
        )
    return contents


def save_model(state: dict[str, torch.Tensor], path: str, classes: list[str] | None = None) -> None:
    """Write a state dict as a Detectron2 checkpoint, completely or not at all, with its checksum.

    Args:
        state: the state dict.
        path: the file to write: .safetensors, or else torch's format.
        classes: the names of the classes that the model predicts.

    Raises:
        OSError: if the file cannot be written.
    """
    extra = {} if classes is None else {"classes": list(classes)}
    # By path, the libraries raise errors of their own for what cannot be written.
    with replacing_with_checksum(path) as part, open(part, "wb") as file:
        if os.fspath(path).endswith(".safetensors"):
            # The format takes no two tensors that share their numbers.
            tensors = {key: value.detach().clone().contiguous() for key, value in state.items()}
            file.write(save(tensors, {key: json.dumps(value) for key, value in extra.items()}))
        else:
            torch.save({"model": state, **extra}, file)
