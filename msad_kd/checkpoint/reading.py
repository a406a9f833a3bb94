"""Reading files of weights: every fault of a file is one sentence, and no file runs code."""

import json
import os
import re
import tarfile
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from detectron2.utils.file_io import PathManager
from safetensors import safe_open

from msad_kd.checkpoint.files import check_checksum, hash_file
from msad_kd.utils.errors import InputError
from msad_kd.utils.unpickle import UntrustedError, load_pickle, trust_files, trusted

__all__ = ["check_exists", "read_checkpoint", "read_local", "split_hash", "trust_files"]

# What a file begins with that is often found in place of a checkpoint.
_IMPOSTORS = {
    b"version https://git-lfs": "is a pointer of git-LFS; fetch the file itself by 'git lfs pull'",
    b"<": "is a web page; download the file itself",
    b"{": "is a JSON file; name a checkpoint",
    b"[": "is a JSON file; name a checkpoint",
}
_ARCHIVE = b"PK\x03\x04"  # the first bytes of torch's format
_LEGACY = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # a number at the beginning of the one before torch 1.6
_ADVICE = "; if you know who made it, --trust-files reads it, and runs the code in it"


def split_hash(path: str) -> tuple[str, str | None]:
    """Split ``path#sha256=<hash>`` into the path and the hash, None without one.

    Raises:
        InputError: if the hash is not 64 hexadecimal digits.
    """
    file, mark, digest = path.partition("#sha256=")
    if mark and not re.fullmatch("[0-9a-fA-F]{64}", digest):
        raise InputError(
            f"'{path}' has no SHA-256 after '{mark}': write its 64 hexadecimal digits, as the "
            "command sha256sum prints them"
        )
    return file, digest.lower() or None


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
    if "://" not in file and not PathManager.isfile(file):
        raise InputError(f"the checkpoint '{file}' for {purpose} does not exist; correct the path")


def read_checkpoint(path: str, purpose: str) -> dict:
    """Return the contents of a file of weights, with checked weights on the CPU.

    Args:
        path: a .pth, .pyth, .pkl or .safetensors file, or an address that Detectron2 downloads;
            ``#sha256=<64 hexadecimal digits>`` may follow it. A file ``<path>.sha256`` beside it,
            in the format of sha256sum, is checked too.
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
        raise InputError(
            f"the checkpoint '{address}' for {purpose} cannot be fetched ({_first_line(error)})"
        ) from error


def read_local(file: str, path: str, purpose: str) -> dict:
    """Do what ``read_checkpoint`` does for a local file.

    Args:
        file: the local file.
        path: what the user calls it, with its hash if it has one.
        purpose: what needs it.
    """
    address, expected = split_hash(path)
    subject = f"the checkpoint '{address}' for {purpose}"
    copy = "" if file == address else f" (downloaded to '{file}')"
    if expected and (digest := hash_file(file)) != expected:
        raise InputError(
            f"{subject} has the SHA-256 {digest} instead of the one after '#'{copy}; it is another "
            "file or damaged: take the right one, or correct the hash"
        )
    check_checksum(file)
    if fault := _impostor(file):
        raise InputError(f"{subject} {fault}")
    try:
        contents = _reader(file)(file)
    except UntrustedError as error:
        words = f"asks for {error} when it is read, which could run code"
        raise InputError(f"{subject} {words}{_ADVICE}") from error
    except Exception as error:  # whatever torch, zipfile and safetensors raise for damaged files
        raise InputError(
            f"{subject} cannot be read ({_first_line(error)}){copy}: it is damaged or no "
            "checkpoint; take another copy"
        ) from error
    if fault := _fault(contents):
        raise InputError(f"{subject} {fault}")
    return contents


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _impostor(file: str) -> str | None:
    """Say what a file is that cannot be a checkpoint."""
    with open(file, "rb") as stream:
        head = stream.read(64)
    if not head:
        return "is empty; take another copy"
    if file.endswith(".safetensors"):  # which begins with a length
        return None
    return next((x for mark, x in _IMPOSTORS.items() if head.lstrip().startswith(mark)), None)


def _reader(file: str) -> Callable[[str], Any]:
    readers = {".pkl": _read_pickle, ".pyth": _read_pycls, ".safetensors": _read_safetensors}
    return readers.get(os.path.splitext(file)[1], _read_pth)


def _read_pth(file: str) -> Any:
    contents = _load_torch(file)
    bare = isinstance(contents, dict) and "model" not in contents
    return {"model": contents} if bare else contents


def _load_torch(file: str) -> Any:
    """Read torch's formats as weights and plain containers, unless files are trusted."""
    if trusted():
        return torch.load(file, map_location="cpu", weights_only=False)
    _check_format(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # with advice of many lines, which names torch's own options
        if name := re.search(r"(?:GLOBAL|unrecognized function|class) <?([\w.]+)", str(error)):
            raise UntrustedError(name[1]) from error
        if reason := re.search(r"WeightsUnpickler error:\s*(.+)", str(error)):
            raise ValueError(reason[1]) from error
        raise


def _check_format(file: str) -> None:
    """Refuse the formats in which torch runs code, and archives with a damaged record.

    torch itself does not compare the checksums in its archives.
    """
    with open(file, "rb") as stream:
        head = stream.read(32)
    if not (head.startswith(_ARCHIVE) or _LEGACY in head) or tarfile.is_tarfile(file):
        raise ValueError("it has none of torch's formats")
    if not head.startswith(_ARCHIVE):
        return
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if any(os.path.basename(record.filename) == "constants.pkl" for record in records):
            raise UntrustedError("TorchScript")
        # torch returns what was in the memory before for a record that is marked as a folder.
        if any(record.is_dir() or record.external_attr & 0x10 for record in records):
            raise ValueError("a record of it is marked as a folder")
        # All are 0 if torch was told to compute none (torch.serialization.set_crc32_options).
        if any(record.CRC for record in records) and (name := archive.testzip()):
            raise ValueError(f"its record '{name}' has changed")


def _read_safetensors(file: str) -> dict:
    with safe_open(file, "pt") as stream:
        contents = {"model": {key: stream.get_tensor(key) for key in stream.keys()}}
        metadata = stream.metadata() or {}
    return contents | (
        {"classes": json.loads(metadata["classes"])} if "classes" in metadata else {}
    )


def _read_pickle(file: str) -> dict:
    """Read a pickle of Detectron2's model zoo, or of Detectron's, as Detectron2 does."""
    with open(file, "rb") as stream:
        contents = load_pickle(stream)
    if "model" in contents and "__author__" in contents:
        return contents
    weights = {k: v for k, v in contents.get("blobs", contents).items() if k[-9:] != "_momentum"}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _read_pycls(file: str) -> dict:
    weights = _load_torch(file)["model_state"]
    weights = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    return {"model": weights, "__author__": "pycls", "matching_heuristics": True}


def _fault(contents: Any) -> str | None:
    """Say why contents are no checkpoint; turn arrays into tensors, in place."""
    if not isinstance(contents, dict):
        return f"is not a Detectron2 checkpoint: it holds a {type(contents).__name__}"
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
    # torch cannot check its 8-bit floats directly.
    value = value.float() if value.is_floating_point() and value.element_size() < 2 else value
    return None if bool(torch.isfinite(value).all()) else "has numbers that are not finite"
