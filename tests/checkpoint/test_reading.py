"""Files of weights: each fault is one sentence, and the rest is read as it is."""

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
from checkpoints import Net, torch_bytes
from helpers import differing
from safetensors.torch import save_file
from torch import nn

from msad_kd.checkpoint.checkpoint import SafeCheckpointer, load_strictly
from msad_kd.checkpoint.reading import check_exists, read_checkpoint
from msad_kd.checkpoint.strip import strip_checkpoint
from msad_kd.utils.errors import InputError
from msad_kd.utils.hashes import hash_file, split_hash

STATE = {key: value.clone() for key, value in Net().state_dict().items()}
ARRAYS = {key: value.numpy() for key, value in STATE.items()}


def safetensors_bytes(tmp_path, metadata=None):
    save_file(STATE, tmp_path / "x", metadata)
    return (tmp_path / "x").read_bytes()


WHOLE = torch_bytes({"model": STATE, "iteration": 3})
META = {"author": {"__author__": "me"}, "match": {"matching_heuristics": True}}
GOOD = {  # name: (contents, what is there beside the model)
    "a.pth": (WHOLE, {"iteration": 3}),
    "bare.pth": (torch_bytes(STATE), {}),
    "legacy.pth": (torch_bytes({"model": STATE}, _use_new_zipfile_serialization=False), {}),
    "arrays.pth": (torch_bytes({"model": STATE, "classes": ["a"]}), {"classes": ["a"]}),
    "zoo.pkl": (pickle.dumps({"model": ARRAYS, **META["author"]}, 2), META["author"]),
    "new.pkl": (pickle.dumps({"model": ARRAYS, **META["author"]}, 5), META["author"]),
    "caffe2.pkl": (
        pickle.dumps({"blobs": {**ARRAYS, "a_momentum": None}, "cfg": "x: 1"}, 2),
        {"__author__": "Caffe2", **META["match"]},
    ),
    "count.pth": (torch_bytes({"model": STATE, "classes": 80}), {}),  # another project's
    "a.pyth": (
        torch_bytes({"model_state": STATE | {"x.num_batches_tracked": STATE["head.bias"]}}),
        {"__author__": "pycls", **META["match"]},
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_a_file_holds_is_read(tmp_path, name):
    (tmp_path / name).write_bytes(GOOD[name][0])
    contents = read_checkpoint(str(tmp_path / name), "the test")
    expected = dict(STATE)
    if name == "a.pyth":  # Detectron2 leaves the counters of pycls out
        del expected["norm.num_batches_tracked"]
    assert differing(contents.pop("model"), expected) == []
    assert contents == GOOD[name][1]


def test_pickles_of_python_2_and_both_numpys_are_read(tmp_path):
    """Python 2 wrote an array's bytes as a text, and NumPy 1 calls its functions by other names."""
    new = pickle.dumps({"w": np.arange(200, 204, dtype=">i4")}, 0)
    old = new.replace(b"numpy._core", b"numpy.core")
    # The array's bytes as Python 2's STRING instead of a call of _codecs.encode.
    python2 = (
        b"\x80\x02}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x04\x85cnumpy\ndtype\nU\x02i4K\x00K\x01\x87R(K\x03U\x01>NNNJ\xff\xff\xff\xffJ"
        b"\xff\xff\xff\xffK\x00tb\x89U\x10\0\0\0\xc8\0\0\0\xc9\0\0\0\xca\0\0\0\xcbtbs."
    )
    assert old != new or np.__version__ < "2"
    for content in (new, old, python2):
        (tmp_path / "a.pkl").write_bytes(content)
        weights = read_checkpoint(str(tmp_path / "a.pkl"), "the test")["model"]
        assert weights["w"].tolist() == [200, 201, 202, 203]


def flipped(name):
    """WHOLE with one bit of a record flipped."""
    with zipfile.ZipFile(io.BytesIO(WHOLE)) as archive:
        (record,) = [x for x in archive.namelist() if x.endswith(name)]
        content = archive.read(record)
    start = WHOLE.index(content)
    return WHOLE[:start] + bytes([WHOLE[start] ^ 4]) + WHOLE[start + 1 :]


def with_weight(value, key="head.weight"):
    return torch_bytes({"model": {**STATE, key: value}})


def script():
    stream = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), stream)
    return stream.getvalue()


def compressed():
    stream = io.BytesIO()
    content = torch_bytes({"model": {"a": torch.zeros(99999)}})
    with zipfile.ZipFile(io.BytesIO(content)) as source:
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as target:
            for name in source.namelist():
                target.writestr(name, source.read(name))
    return stream.getvalue()


INDICES = torch.zeros(2, 1, dtype=torch.long)
BAD = {  # name: (contents, words)
    "empty.pth": (b"", "is empty"),
    "empty.pkl": (b"", "is empty"),
    "empty.safetensors": (b"", "is empty"),
    "page.pth": (b"<!DOCTYPE html><html>", "is a web page"),
    "page.pkl": (b"\n <html>", "is a web page"),
    "lfs.pth": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "lfs.pkl": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "json.pth": (b'{"model": 1}', "is a JSON file"),
    "text.pth": (b"weights", "cannot be read"),
    "text.safetensors": (b"<html> and more of it", "cannot be read"),
    "cut.pth": (WHOLE[: len(WHOLE) // 2], "cannot be read"),
    "head.pth": (WHOLE[:4], "cannot be read"),
    "last_byte.pth": (WHOLE[:-1], "cannot be read"),
    "zeros.pth": (bytes(len(WHOLE)), "cannot be read"),
    "long.pkl": (pickle.dumps({"blobs": {"a": np.longdouble([1])}}), "cannot be read .TypeError"),
    "cut.pkl": (GOOD["zoo.pkl"][0][:200], "cannot be read"),
    "weights.pth": (flipped("data/0"), "data/0' has changed"),
    "pickle.pth": (flipped("data.pkl"), "data.pkl' has changed"),
    "script.pth": (script(), "TorchScript"),
    "compressed.pth": (compressed(), "records are larger than the file"),
    "repeated.pth": (with_weight(torch.ones(1).expand(1 << 40)), "the file is too small for"),
    "list.pth": (torch_bytes([1]), "is not a Detectron2 checkpoint: it holds a list"),
    "none.pth": (torch_bytes(None), "is not a Detectron2 checkpoint: it holds a NoneType"),
    "model.pth": (torch_bytes({"model": None}), "its 'model' is a NoneType"),
    "no_weights.pth": (torch_bytes({"model": {}}), "holds no weights"),
    "other.pth": (torch_bytes({"iteration": 3}), "'iteration' is a int instead of a tensor"),
    "number_key.pth": (with_weight(torch.ones(1), key=3), "'3' is no text"),
    "none_value.pth": (with_weight(None), "'head.weight' is a NoneType instead"),
    "text_value.pth": (with_weight("x"), "'head.weight' is a str instead"),
    "list_value.pth": (with_weight([1.0]), "'head.weight' is a list instead"),
    "nan.pth": (with_weight(torch.tensor(float("nan"))), "1 of its 7.*'head.weight' .*not finite"),
    "inf.pth": (with_weight(torch.tensor([1, float("-inf")]).half()), "not finite"),
    "fp8.pth": (with_weight(torch.tensor(float("nan")).to(torch.float8_e5m2)), "not finite"),
    "complex.pth": (with_weight(torch.ones(2) * 1j), "complex numbers"),
    "sparse.pth": (with_weight(torch.sparse_coo_tensor(INDICES, [1.0], (2, 3))), "sparse_coo"),
    "meta.pth": (with_weight(torch.ones(2, 3, device="meta")), "is a meta tensor"),
    "object.pkl": (pickle.dumps({"blobs": {"a": np.array([None])}}), "numpy.dtype.'O8'"),
    "structure.pkl": (pickle.dumps({"a": np.zeros(1, [("b", "f4")])}), "numpy.dtype.'V4'"),
    "nan.pkl": (pickle.dumps({"a": np.array([np.nan])}), "'a' .*not finite"),
    "list.pkl": (pickle.dumps([1]), "cannot be read"),
    "scalar.pkl": (pickle.dumps({"a": np.float32(1)}), "'a' is a float32 instead"),
    "no_state.pyth": (torch_bytes({"model": STATE}), "cannot be read .KeyError: 'model_state'"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_sentence(tmp_path, name):
    content, words = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}' for MODEL.WEIGHTS .*{words}") as error:
        SafeCheckpointer(Net()).load(str(tmp_path / name))
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=f"{name}' for stripping .*{words}"):
        strip_checkpoint(str(tmp_path / name), str(tmp_path / "target.pth"))
    assert not (tmp_path / "target.pth").exists()


@pytest.mark.parametrize("path", ["", "gone.pth", "gone://x.pth", "/"])
def test_a_file_that_is_not_there(path):
    with pytest.raises(InputError, match=f"{path}.*for the test"):
        read_checkpoint(path, "the test")
    check_exists("detectron2://fetched/later.pkl", "the test")


class TestHashes:
    def test_one_in_the_path_is_checked(self, tmp_path):
        path = tmp_path / "a.pth"
        path.write_bytes(WHOLE)
        digest = hash_file(path)
        net = Net()
        for right in (digest, digest.upper()):
            load_strictly(net, f"{path}#sha256={right}", "the test")
            SafeCheckpointer(net).load(f"{path}#sha256={right}")
        assert differing(net.state_dict(), STATE) == []
        for wrong, words in {
            digest[:-1] + ("0" if digest[-1] != "0" else "1"): "a.pth' has the SHA-256 .*#",
            digest[:-1]: "64 hexadecimal digits",
            "": "64 hexadecimal digits",
            "g" * 64: "64 hexadecimal digits",
        }.items():
            with pytest.raises(InputError, match=words):
                load_strictly(net, f"{path}#sha256={wrong}", "x")

    def test_other_signs_stay_part_of_the_name(self):
        assert split_hash("a#1.pth") == ("a#1.pth", None)

    def test_one_of_a_downloaded_file_is_checked(self, tmp_path, monkeypatch):
        (tmp_path / "cached.pth").write_bytes(WHOLE)
        local = "msad_kd.checkpoint.reading.PathManager.get_local_path"
        monkeypatch.setattr(local, {"https://x.org/a.pth": str(tmp_path / "cached.pth")}.get)
        good = hash_file(tmp_path / "cached.pth")
        contents = read_checkpoint(f"https://x.org/a.pth#sha256={good}", "the test")
        assert differing(contents["model"], STATE) == []
        with pytest.raises(InputError, match="downloaded to '.*cached.pth'"):
            read_checkpoint(f"https://x.org/a.pth#sha256={'0' * 64}", "the test")

    @pytest.mark.parametrize("content", ["", "what is this", "0" * 64 + "  a.pth\n"])
    def test_one_beside_is_checked(self, tmp_path, content):
        path = tmp_path / "a.pth"
        path.write_bytes(WHOLE)
        beside = tmp_path / "a.pth.sha256"
        beside.write_text(f"{hash_file(path).upper()} *a.pth\n")  # as others write it
        load_strictly(Net(), str(path), "the test")
        beside.write_text(content)
        with pytest.raises(InputError, match="a.pth.sha256"):
            load_strictly(Net(), str(path), "the test")


def test_safetensors_are_read_and_written(tmp_path):
    source, target = tmp_path / "a.pth", str(tmp_path / "b.safetensors")
    state = {**STATE, "twice": STATE["head.weight"], "turned": STATE["head.weight"].T}
    torch.save({"model": {**state, "distiller.x": torch.ones(1)}, "classes": ["a", "ü"]}, source)
    strip_checkpoint(str(source), target)
    contents = read_checkpoint(target, "the test")
    assert differing(contents.pop("model"), state) == [] and contents == {"classes": ["a", "ü"]}
    back = str(tmp_path / "c.pth")
    strip_checkpoint(target, back)
    assert torch.load(back, weights_only=True)["classes"] == ["a", "ü"]
    path = tmp_path / "plain.safetensors"
    path.write_bytes(safetensors_bytes(tmp_path, {"format": "pt"}))
    net = Net()
    load_strictly(net, str(path), "the test")
    assert differing(net.state_dict(), STATE) == []
    path.write_bytes(safetensors_bytes(tmp_path, {"classes": "["}))
    with pytest.raises(InputError, match="plain.safetensors' for the test cannot be read"):
        load_strictly(net, str(path), "the test")
