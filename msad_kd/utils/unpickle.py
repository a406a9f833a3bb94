"""Reading pickles without running the code that a file may hold.

A pickle names functions and calls them while it is read. The model zoo's weights and proposals are
pickles of NumPy arrays in plain containers, which need a few functions. These have stand-ins here,
so that no pickle calls NumPy's own functions with arguments of its choice.
"""

import argparse
import codecs
import pickle
import re
from collections import OrderedDict
from typing import Any, BinaryIO

import numpy as np
from detectron2.structures import BoxMode

_trusted = False


def trust_files() -> None:
    """Let the files that this process reads run code from now on (``--trust-files``)."""
    global _trusted
    _trusted = True


def trusted() -> bool:
    """Return whether ``trust_files`` was called in this process."""
    return _trusted


class TrustFiles(argparse.Action):
    """The option ``--trust-files`` of a command: it calls ``trust_files`` when it is given."""

    def __init__(self, option_strings, dest, **keywords):
        words = "run the code in weights and proposals (.pkl, .pth): only if you know who made them"
        super().__init__(option_strings, dest, nargs=0, default=False, help=words, **keywords)

    def __call__(self, parser, namespace, values, option_string=None):
        """Trust the files."""
        setattr(namespace, self.dest, True)
        trust_files()


class UntrustedError(pickle.UnpicklingError):
    """A pickle asks for more than arrays and plain containers; the message names the function."""


class _DType:
    """Stands for ``numpy.dtype``: numbers alone, of the machine's own or a named byte order."""

    def __init__(self, code: str, *_):
        if not re.fullmatch(r"[biufc]\d\d?", code):
            raise UntrustedError(f"an array of numpy.dtype('{code}')")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        _, order, *structure = state[:5]
        if structure != [None, None, None]:
            raise UntrustedError("a structured numpy.dtype")
        self.dtype = self.dtype.newbyteorder(order)


class _Array(np.ndarray):
    """Stands for ``numpy.ndarray``, with a checked state."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        super().__setstate__((1, shape, dtype.dtype, bool(fortran), _bytes(data)))


def _bytes(data: bytes | str) -> bytes:
    """Return an array's data; Python 2 wrote them as a text, which is read as Latin-1."""
    return data.encode("latin1") if isinstance(data, str) else bytes(data)


def _encode(text: str, encoding: str) -> bytes:
    if codecs.lookup(encoding).name != "iso8859-1":
        raise UntrustedError(f"_codecs.encode(..., '{encoding}')")
    return text.encode("latin1")


def _empty_bytes() -> bytes:  # bytes themselves would take a length, of any size
    return b""


def _ndarray(*_) -> None:  # _reconstruct names it; a call could ask for an array of any size
    raise UntrustedError("a call of numpy.ndarray")


def _reconstruct(*_) -> _Array:
    return _Array(0, np.int8)


def _scalar(dtype: _DType, data: bytes | str) -> np.generic:
    return np.frombuffer(_bytes(data), dtype.dtype)[0]


def _frombuffer(data: bytes, dtype: _DType, shape: tuple, order: str) -> np.ndarray:
    return np.frombuffer(bytearray(data), dtype.dtype).reshape(shape, order=order)


_STAND_INS = {
    **{f"numpy.{core}.multiarray._reconstruct": _reconstruct for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _frombuffer for core in ("core", "_core")},
    **{f"{module}.bytes": _empty_bytes for module in ("__builtin__", "builtins")},
    **{f"{module}.set": set for module in ("__builtin__", "builtins")},
    "numpy.ndarray": _ndarray,
    "numpy.dtype": _DType,
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
        # On another object this would set attributes of any name.
        if not isinstance(self.stack[-2], (_Array, _DType)):
            raise UntrustedError(f"the state of a {type(self.stack[-2]).__name__}")
        super().load_build()

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}


def _plain(value: Any) -> Any:
    """Return a value with NumPy's own arrays in place of their stand-ins."""
    if isinstance(value, _Array):
        return value.view(np.ndarray)
    if isinstance(value, dict):
        value.update({key: _plain(part) for key, part in value.items()})
    elif isinstance(value, list):
        value[:] = map(_plain, value)
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


def load_pickle(file: BinaryIO, *, encoding: str = "latin1") -> Any:
    """Do what ``pickle.load`` does for NumPy arrays, numbers, texts and plain containers.

    Raises:
        UntrustedError: if the file holds anything else, unless ``trust_files`` was called.
    """
    if _trusted:
        return pickle.load(file, encoding=encoding)
    return _plain(_Unpickler(file, encoding=encoding).load())
