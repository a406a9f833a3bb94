"""Reading files of weights: every fault of a file is one sentence, and no file runs code."""

import json
import os
from typing import Any

import numpy as np
import torch
from detectron2.utils.file_io import PathManager
from safetensors import safe_open

from msad_kd.utils.errors import InputError, first_line
from msad_kd.utils.hashes import check_hash, split_hash
from msad_kd.utils.unpickle import UntrustedError, load_pickle, load_torch

# What a file begins with that is often found in place of a checkpoint.
_IMPOSTORS = {
    b"version https://git-lfs": "is a pointer of git-LFS; fetch the file itself by 'git lfs pull'",
    b"<": "is a web page; download the file itself",
    b"{": "is a JSON file; name a checkpoint",
    b"[": "is a JSON file; name a checkpoint",
}
_MOST_REPEATED = 1 << 24  # bytes of a tensor that repeats the numbers in the file
_ADVICE = "; if you know who made it, --trust-files reads it, and runs the code in it"


def check_exists(path: str, purpose: str) -> None:
    """Check that a checkpoint exists; URLs are not checked.

    Args:
        path: the checkpoint; ``#sha256=...`` may follow.
        purpose: what needs it, for the error message.

    Raises:
        InputError: if the path is empty or no such file exists.
    """
    if not path:
        raise InputError(f"no checkpoint is named for {purpose}; give one, e.g. by MODEL.WEIGHTS")
    file, _ = split_hash(path)
    # Addresses such as https:// and detectron2:// are fetched when they are read.
    if "://" in file or PathManager.isfile(file):
        return
    words = "does not exist; correct the path"
    if PathManager.isdir(file):
        words = "is a folder; name the file in it, such as model_final.pth"
    raise InputError(f"the checkpoint '{file}' for {purpose} {words}")


def read_checkpoint(path: str, purpose: str) -> dict:
    """Return the contents of a file of weights, with checked weights on the CPU.

    Args:
        path: a .pth, .pyth, .pkl or .safetensors file, or an address that Detectron2 downloads;
            ``#sha256=<64 hexadecimal digits>`` may follow it. Without, a file ``<path>.sha256``
            beside it, in the format of sha256sum, is checked.
        purpose: what needs the file, for error messages: a config key, or "the teacher of ...".

    Returns:
        What the file holds, with "model": {key: tensor}. A state dict without a "model" around it
        becomes the "model". Files of other projects also have "matching_heuristics": True and
        "__author__", by which Detectron2's checkpointer matches their keys.

    Raises:
        InputError: if the file is missing, unreadable, another one than its hash says, or no
            checkpoint, or if a weight is not finite or not a dense tensor.
    """
    check_exists(path, purpose)
    address, _ = split_hash(path)
    return read_local(fetch(address, purpose), path, purpose)


def fetch(address: str, purpose: str) -> str:
    """Return the local path of a file, downloaded if it is an address.

    Raises:
        InputError: if it cannot be downloaded or opened.
    """
    try:
        local = PathManager.get_local_path(address)
        open(local, "rb").close()
        return local
    except Exception as error:  # whatever the handlers of addresses raise
        advice = ""
        if "://" in address:
            advice = (
                "; without a network, name a copy; to train from scratch, set MODEL.WEIGHTS to "
            )
            advice += '"", MODEL.RESNETS.NORM to BN and MODEL.BACKBONE.FREEZE_AT to 0'
        raise InputError(
            f"the checkpoint '{address}' for {purpose} cannot be fetched "
            f"({first_line(error)}){advice}"
        ) from error


def read_local(file: str, path: str, purpose: str) -> dict:
    """Do what ``read_checkpoint`` does for a local file.

    Args:
        file: the local file.
        path: what the user calls it, with its hash if it has one.
        purpose: what needs it.
    """
    address, _ = split_hash(path)
    subject = f"the checkpoint '{address}' for {purpose}"
    copy = "" if file == address else f" (downloaded to '{file}')"
    check_hash(file, path)
    if fault := _impostor(file):
        raise InputError(f"{subject} {fault}")
    try:
        contents = _READERS.get(os.path.splitext(file)[1], _read_pth)(file)
        fault = _fault(contents)
    except UntrustedError as error:
        words = f"asks for {error} when it is read, which could run code"
        raise InputError(f"{subject} {words}{_ADVICE}") from error
    except Exception as error:  # whatever torch, NumPy and safetensors raise for damaged files
        raise InputError(
            f"{subject} cannot be read ({first_line(error)}){copy}: it is damaged or no "
            "checkpoint; take another copy"
        ) from error
    if fault:
        raise InputError(f"{subject} {fault}")
    return contents


def _impostor(file: str) -> str | None:
    """Say what a file is that cannot be a checkpoint."""
    with open(file, "rb") as stream:
        head = stream.read(64)
    if not head:
        return "is empty; take another copy"
    if file.endswith(".safetensors"):  # which begins with a length
        return None
    return next((x for mark, x in _IMPOSTORS.items() if head.lstrip().startswith(mark)), None)


def _read_pth(file: str) -> Any:
    contents = load_torch(file)
    bare = isinstance(contents, dict) and "model" not in contents
    return {"model": contents} if bare else contents


def _read_safetensors(file: str) -> dict:
    with safe_open(file, "pt") as stream:
        contents = {"model": {key: stream.get_tensor(key) for key in stream.keys()}}
        metadata = stream.metadata() or {}
    if "classes" in metadata:
        contents["classes"] = json.loads(metadata["classes"])
    return contents


def _read_pickle(file: str) -> dict:
    """Read a pickle of Detectron2's model zoo, or of Detectron's, as Detectron2 does."""
    with open(file, "rb") as stream:
        contents = load_pickle(stream)
    if "model" in contents and "__author__" in contents:
        return contents
    weights = {k: v for k, v in contents.get("blobs", contents).items() if k[-9:] != "_momentum"}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _read_pycls(file: str) -> dict:
    weights = load_torch(file)["model_state"]
    weights = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    return {"model": weights, "__author__": "pycls", "matching_heuristics": True}


_READERS = {".pkl": _read_pickle, ".pyth": _read_pycls, ".safetensors": _read_safetensors}


def _fault(contents: Any) -> str | None:
    """Say why contents are no checkpoint; in place, turn arrays into tensors.

    What other projects store as "classes", such as a number, is left out.
    """
    if not isinstance(contents, dict):
        return f"is not a Detectron2 checkpoint: it holds a {type(contents).__name__}"
    names = contents.get("classes")
    if not (isinstance(names, (list, tuple)) and all(isinstance(x, str) for x in names)):
        contents.pop("classes", None)
    weights = contents["model"]
    if not isinstance(weights, dict):
        words = f"its 'model' is a {type(weights).__name__} instead of a dict of weights"
        return f"is not a Detectron2 checkpoint: {words}"
    if not weights:
        return "holds no weights; name another"
    for key, value in weights.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            # A copy: torch takes no other byte order and no data that cannot be written to.
            weights[key] = torch.from_numpy(np.array(value, value.dtype.newbyteorder("=")))
    faults = {key: fault for key, value in weights.items() if (fault := _weight_fault(key, value))}
    if not faults:
        return None
    key, fault = next(iter(faults.items()))
    count = f"{len(faults)} of its {len(weights)} weights cannot be used"
    return f"is damaged or no checkpoint: {count}, e.g. '{key}' {fault}; take another copy"


def _weight_fault(key: Any, value: Any) -> str | None:
    if not isinstance(key, str):
        return "is no text"
    if not isinstance(value, torch.Tensor):
        return f"is a {type(value).__name__} instead of a tensor"
    if value.layout != torch.strided or value.is_meta or value.is_quantized or value.is_nested:
        kind = "a meta" if value.is_meta else f"a quantized or {value.layout}"
        return f"is {kind} tensor instead of a dense one"
    if value.is_complex():
        return "has complex numbers"
    if value.nbytes > max(value.untyped_storage().nbytes(), _MOST_REPEATED):
        return f"is said to have the shape {tuple(value.shape)}, which the file is too small for"
    # torch cannot check its 8-bit floats directly.
    value = value.float() if value.is_floating_point() and value.element_size() < 2 else value
    return None if bool(torch.isfinite(value).all()) else "has numbers that are not finite"
