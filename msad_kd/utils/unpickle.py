"""Reading pickles and torch's files without running the code that a file may hold.

A pickle names functions and calls them while it is read. The model zoo's weights and proposals are
pickles of NumPy arrays in plain containers, which need a few functions. These have stand-ins here,
so that no pickle calls NumPy's own functions with arguments of its choice.
"""

import argparse
import math
import os
import pickle
import re
import tarfile
import zipfile
from collections import OrderedDict
from typing import Any, BinaryIO

import numpy as np
import torch
from detectron2.structures import BoxMode

_ARCHIVE = b"PK\x03\x04"  # the first bytes of torch's format
_LEGACY = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # a number at the beginning of the one before torch 1.6

VARIABLE = "MSAD_KD_TRUST_FILES"  # of the environment, which a command's processes share


def trust_files() -> None:
    """Let the files that this process and its own read run code from now on (``--trust-files``)."""
    os.environ[VARIABLE] = "1"


def trusted() -> bool:
    """Return whether ``trust_files`` was called in this process, or in one that started it."""
    return os.environ.get(VARIABLE) == "1"


class TrustFiles(argparse.Action):
    """The option ``--trust-files`` of a command: it calls ``trust_files`` when it is given."""

    def __init__(self, option_strings, dest, **keywords):
        words = "run the code in weights, proposals and configs: only if you know who made them"
        super().__init__(option_strings, dest, nargs=0, default=False, help=words, **keywords)

    def __call__(self, parser, namespace, values, option_string=None):
        """Trust the files."""
        setattr(namespace, self.dest, True)
        trust_files()


class UntrustedError(pickle.UnpicklingError):
    """A pickle asks for more than arrays and plain containers; the message names the function."""


def _bytes(data: bytes | bytearray | str) -> bytes:
    """Return an array's data; Python 2 wrote them as a text, which is read as Latin-1."""
    if isinstance(data, str):
        return data.encode("latin1")
    if not isinstance(data, (bytes, bytearray)):  # bytes(10**12) would be as many zeros
        raise UntrustedError(f"the data of a {type(data).__name__}")
    return bytes(data)


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise UntrustedError(f"_codecs.encode(..., '{encoding}')")
    return _bytes(text)


def _empty_bytes() -> bytes:  # bytes themselves would take a length, of any size
    return b""


def _ndarray(*_) -> None:  # _reconstruct names it; a call could ask for an array of any size
    raise UntrustedError("a call of numpy.ndarray")


def _dtype(code: str, *_) -> np.dtype:
    if not re.fullmatch(r"[biufc]\d\d?", code):
        raise UntrustedError(f"an array of numpy.dtype('{code}')")
    return np.dtype(code, copy=True)  # of its own, since its byte order may be set


def _reconstruct(*_) -> np.ndarray:
    return np.empty(0, np.int8)  # what it holds is set later


def _scalar(dtype: np.dtype, data: bytes | str) -> np.generic:
    return np.frombuffer(_bytes(data), dtype)[0]


def _frombuffer(data: bytes, dtype: np.dtype, shape: tuple, order: str) -> np.ndarray:
    return np.frombuffer(bytearray(_bytes(data)), dtype).reshape(shape, order=order)


_STAND_INS = {
    **{f"numpy.{core}.multiarray._reconstruct": _reconstruct for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _frombuffer for core in ("core", "_core")},
    **{f"{module}.bytes": _empty_bytes for module in ("__builtin__", "builtins")},
    **{f"{module}.set": set for module in ("__builtin__", "builtins")},
    "numpy.ndarray": _ndarray,
    "numpy.dtype": _dtype,
    "_codecs.encode": _encode,
    "collections.OrderedDict": OrderedDict,
    "detectron2.structures.boxes.BoxMode": BoxMode,
}


# Python's own class, not the one in C: a damaged file cannot make it reserve memory for a table of
# 2**32 entries. torch's reader of weights is made in the same way.
class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[f"{module}.{name}"]
        except KeyError:
            raise UntrustedError(f"{module}.{name}") from None

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, np.ndarray):
            _, shape, dtype, fortran, data = state
            data = _bytes(data)
            if math.prod(shape) * dtype.itemsize != len(data):
                raise ValueError(f"an array of shape {shape} has {len(data)} bytes")
            target.__setstate__((1, shape, dtype, bool(fortran), data))
        elif isinstance(target, np.dtype):
            _, order, *structure = state[:5]
            if order not in ("<", ">", "=", "|") or structure != [None, None, None]:
                raise UntrustedError("a structured numpy.dtype")
            target.__setstate__((3, order, None, None, None, -1, -1, 0))
        else:  # this would set attributes of any name
            raise UntrustedError(f"the state of a {type(target).__name__}")

    def load_bytearray8(self) -> None:  # pickle's fills the length that the file claims with zeros
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    dispatch = {
        **pickle._Unpickler.dispatch,
        pickle.BUILD[0]: load_build,
        pickle.BYTEARRAY8[0]: load_bytearray8,
    }


def load_pickle(file: BinaryIO, *, encoding: str = "latin1") -> Any:
    """Do what ``pickle.load`` does for NumPy arrays, numbers, texts and plain containers.

    Raises:
        UntrustedError: if the file holds anything else, unless ``trust_files`` was called.
    """
    if trusted():
        return pickle.load(file, encoding=encoding)
    return _Unpickler(file, encoding=encoding).load()


def load_torch(file: str) -> Any:
    """Do what ``torch.load`` does for weights and plain containers, on the CPU.

    Raises:
        UntrustedError: if the file holds anything else, unless ``trust_files`` was called.
        Exception: whatever torch raises for a damaged file.
    """
    check_torch_format(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=not trusted())
    except Exception as error:  # with advice of many lines, which names torch's own options
        if name := re.search(r"(?:GLOBAL|unrecognized function|class) <?([\w.]+)", str(error)):
            raise UntrustedError(name[1]) from error
        if reason := re.search(r"WeightsUnpickler error:\s*(.+)", str(error)):
            raise ValueError(reason[1]) from error
        raise


def check_torch_format(file: str) -> None:
    """Refuse the formats in which torch runs code, and archives with a damaged record.

    torch itself does not compare the checksums in its archives.

    Raises:
        UntrustedError: if the file holds code, unless ``trust_files`` was called.
        ValueError: if it has another format or is damaged.
    """
    if trusted():
        return
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
        # torch compresses nothing; what is compressed can be of any size.
        if sum(record.file_size for record in records) > os.path.getsize(file):
            raise ValueError("its records are larger than the file")
        # torch returns what was in the memory before for a record that is marked as a folder.
        if any(record.is_dir() or record.external_attr & 0x10 for record in records):
            raise ValueError("a record of it is marked as a folder")
        # All are 0 if torch was told to compute none (torch.serialization.set_crc32_options).
        if any(record.CRC for record in records) and (name := archive.testzip()):
            raise ValueError(f"its record '{name}' has changed")
