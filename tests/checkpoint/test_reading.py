"""Files of weights: each fault is one sentence, and the rest is read as it is."""

import io
import logging
import pickle
import zipfile

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_resnet_backbone
from helpers import differing
from safetensors.torch import save_file
from torch import nn

from msad_kd.checkpoint.checkpoint import SafeCheckpointer, load_strictly
from msad_kd.checkpoint.files import hash_file
from msad_kd.checkpoint.reading import read_checkpoint, split_hash
from msad_kd.checkpoint.strip import strip_checkpoint
from msad_kd.utils.errors import InputError


class Net(nn.Module):
    def __init__(self, classes=2):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(3), nn.Linear(3, classes)


STATE = {key: value.clone() for key, value in Net().state_dict().items()}
ARRAYS = {key: value.numpy() for key, value in STATE.items()}


def torch_bytes(content, **options):
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


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
    "cut.pkl": (GOOD["zoo.pkl"][0][:200], "cannot be read"),
    "weights.pth": (flipped("data/0"), "data/0' has changed"),
    "pickle.pth": (flipped("data.pkl"), "data.pkl' has changed"),
    "script.pth": (script(), "TorchScript"),
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
            digest[:-1] + ("0" if digest[-1] != "0" else "1"): "a.pth' for x has the SHA-256 .*#",
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
        beside.write_text(f"{hash_file(path)} *a.pth\n")  # as sha256sum --binary writes it
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


def load(tmp_path, state, net=None, caplog=None):
    torch.save({"model": state}, tmp_path / "a.pth")
    with caplog.at_level(logging.INFO, "msad_kd"):
        SafeCheckpointer(net or Net()).load(str(tmp_path / "a.pth"))
    (record,) = [record for record in caplog.records if record.name.startswith("msad_kd")]
    assert "\n" not in record.getMessage()
    return record.levelname, record.getMessage()


class TestOneLineSaysWhatFits:
    def test_all(self, tmp_path, caplog):
        level, line = load(tmp_path, {f"module.{k}": v for k, v in STATE.items()}, caplog=caplog)
        assert level == "INFO" and "6 of the model's 6 weights are in" in line
        assert "a.pth' for MODEL.WEIGHTS" in line and "untrained" not in line

    def test_a_head_of_other_classes_starts_untrained(self, tmp_path, caplog):
        net = Net(classes=5)
        level, line = load(tmp_path, STATE, net, caplog)
        assert level == "WARNING" and "4 of the model's 6" in line
        assert "2 start untrained: head.weight (1), head.bias (1)" in line
        assert "head.weight (2, 3) -> (5, 3)" in line
        assert torch.equal(net.norm.weight, STATE["norm.weight"])

    def test_keys_of_one_side_only(self, tmp_path, caplog):
        state = {"body." + k if "head" in k else k: v for k, v in STATE.items()}
        _, line = load(tmp_path, state, caplog=caplog)
        assert "2 start untrained: head.weight (1), head.bias (1)" in line
        assert "2 of the file's are not in the model: body.head (2)" in line

    @pytest.mark.parametrize(
        "state",
        [
            {f"student.{key}": value for key, value in STATE.items()},
            {key: torch.ones(7) for key in STATE if "num" not in key},
            {"norm.num_batches_tracked": torch.tensor(3)},
        ],
    )
    def test_nothing(self, tmp_path, state):
        torch.save({"model": state}, tmp_path / "a.pth")
        words = f"none of the {len(state)} weights of '.*a.pth' for MODEL.WEIGHTS fits"
        with pytest.raises(InputError, match=words):
            SafeCheckpointer(Net()).load(str(tmp_path / "a.pth"))

    @pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
    @pytest.mark.parametrize("prefix", ["", "module."])
    def test_another_kind_of_numbers_is_refused(self, tmp_path, dtype, prefix):
        state = {prefix + key: value for key, value in STATE.items()}
        state[f"{prefix}head.weight"] = torch.ones(2, 3).to(dtype)
        torch.save({"model": state}, tmp_path / "a.pth")
        for load_file in (
            lambda path: SafeCheckpointer(Net()).load(path),
            lambda path: load_strictly(Net(), path, "MODEL.WEIGHTS"),
        ):
            with pytest.raises(InputError, match=f"for MODEL.WEIGHTS .*head.weight' .{dtype}"):
                load_file(str(tmp_path / "a.pth"))


def test_names_are_matched_as_detectron2_matches_them(tmp_path):
    cfg = get_cfg()
    cfg.MODEL.RESNETS.update(STEM_OUT_CHANNELS=4, RES2_OUT_CHANNELS=8, WIDTH_PER_GROUP=4)
    stock, safe, from_address = (build_resnet_backbone(cfg, ShapeSpec(channels=3)) for _ in "123")
    before = {key: value.clone() for key, value in stock.state_dict().items()}
    for net in (safe, from_address):
        net.load_state_dict(before)
    names = {
        "conv1_w": "stem.conv1.weight",
        "res_conv1_bn_s": "stem.conv1.norm.weight",
        "res2_0_branch2a_w": "res2.0.conv1.weight",
        "res2_0_branch2a_bn_b": "res2.0.conv1.norm.bias",
    }
    blobs = {name: np.random.rand(*before[key].shape).astype("f4") for name, key in names.items()}
    path = tmp_path / "R.pkl"
    path.write_bytes(pickle.dumps({"blobs": blobs}, 2))
    DetectionCheckpointer(stock).load(str(path))
    SafeCheckpointer(safe).load(str(path))
    assert differing(stock.state_dict(), safe.state_dict()) == []
    assert {*differing(stock.state_dict(), before)} >= {*names.values()}
    # Detectron2's git main takes this at the end of an address.
    state = {f"body.{names[name]}": torch.from_numpy(value) for name, value in blobs.items()}
    torch.save({"model": state}, tmp_path / "R.pth")
    SafeCheckpointer(from_address).load(f"{tmp_path / 'R.pth'}?matching_heuristics=True")
    assert differing(from_address.state_dict(), safe.state_dict()) == []
