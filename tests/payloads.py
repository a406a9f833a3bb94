"""Files with a payload: the payload of every file writes the file MARK beside it."""

import io
import pickle
import tarfile
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

MARK = "the_payload_ran"


class Payload:
    def __init__(self, folder):
        self.mark = str(folder / MARK)

    def __reduce__(self):
        return open, (self.mark, "w")


class Built:
    """A payload in the state of an object that is allowed."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return OrderedDict, (), {"x": Payload(self.folder)}


def as_zip(content):
    """The archive that torch.save writes, with any pickle in it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a/data.pkl", content)
        archive.writestr("a/version", "3\n")
        archive.writestr("a/byteorder", "little")
    return stream.getvalue()


def nested_zip(content):
    """An archive in an archive, as torch once stored models of several parts."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({"model": {"x": content}}, 2))
        archive.writestr("data.pkl", content)
        archive.writestr("a/constants.pkl", content)
        archive.writestr("a/version", "3\n")
        archive.writestr("inner.pth", as_zip(content))
    return stream.getvalue()


def as_tar(content):
    """The format of torch until 0.1.10; torch 2.5 still ran the code in one (CVE-2025-32434)."""
    stream = io.BytesIO()
    # The first file's name looks like the beginning of the later format.
    first = pickle.dumps(LEGACY[0], 2).decode(errors="surrogateescape")
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name in (first, "sys_info", "storages", "tensors", "pickle"):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


LEGACY = 0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}  # what the next one begins with


def legacy(content):
    """The format before torch 1.6: pickles one after another."""
    head = b"".join(pickle.dumps(x, 2) for x in LEGACY)
    return head + content + pickle.dumps([], 2)


CONTENTS = {  # of what a file pickles
    "alone": lambda payload: payload,
    "key": lambda payload: {"model": {"a": np.ones(1), "b": payload}, "__author__": "x"},
    "blobs": lambda payload: {"blobs": {"a": np.array([payload], dtype=object)}},
    "beside": lambda payload: {"model": {"a": torch.ones(1)}, "trainer": [payload]},
}
FORMATS = {
    "0.pkl": lambda x: pickle.dumps(x, 0),
    "2.pkl": lambda x: pickle.dumps(x, 2),
    "5.pkl": lambda x: pickle.dumps(x, 5),
    "zip.pth": lambda x: as_zip(pickle.dumps(x, 2)),
    "zip.pyth": lambda x: as_zip(pickle.dumps({"model_state": x}, 2)),
    "legacy.pth": lambda x: legacy(pickle.dumps(x, 2)),
    "nested.pth": lambda x: nested_zip(pickle.dumps(x, 2)),
    "pickle.pth": lambda x: pickle.dumps(x, 4),
    "pickle.safetensors": lambda x: pickle.dumps(x, 4),
    "tar.pth": lambda x: as_tar(pickle.dumps(x, 2)),
}


@pytest.fixture
def bomb(tmp_path):
    """bomb(name): write a file with a payload. That none ran is checked at the end."""

    def write(name="5.pkl", content="key", payload=Payload):
        path = tmp_path / name
        path.write_bytes(FORMATS[name](CONTENTS[content](payload(tmp_path))))
        return str(path)

    yield write
    assert not (tmp_path / MARK).exists()
