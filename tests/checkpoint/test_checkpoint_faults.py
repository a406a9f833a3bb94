"""Checkpoints that are mutated at random, from a seed: each is refused, or read as what it says."""

import gzip
import io
import pickle
import random
import zipfile

import pytest
import torch
from checkpoints import Net, torch_bytes
from safetensors.torch import load, save

from msad_kd.checkpoint.checkpoint import SafeCheckpointer, load_strictly
from msad_kd.checkpoint.files import hash_file
from msad_kd.checkpoint.reading import read_checkpoint
from msad_kd.checkpoint.strip import strip_checkpoint
from msad_kd.utils.errors import InputError


def new_net():
    torch.manual_seed(0)
    return Net()


STATE = new_net().state_dict()


def zoo(contents):
    arrays = {key: value.numpy() for key, value in contents["model"].items()}
    return pickle.dumps({"model": arrays, "__author__": "me"}, 4)


def old(contents):
    return torch_bytes(contents, _use_new_zipfile_serialization=False)


WRITERS = {".pth": torch_bytes, ".old.pth": old, ".pkl": zoo}
WRITERS[".safetensors"] = lambda contents: save(contents["model"])
# What the files say, by readers that are not ours: only the first format has checksums of its own.
OTHERS = {
    ".old.pth": lambda x: torch.load(io.BytesIO(x), weights_only=True)["model"],
    ".pkl": lambda x: {k: torch.from_numpy(v) for k, v in pickle.loads(x)["model"].items()},
    ".safetensors": load,
}


def flip(content, rng, bits=1):
    content = bytearray(content)
    for _ in range(bits):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def without_a_record(content, rng):
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(stream, "w") as target:
        dropped = rng.choice(source.namelist())
        for name in source.namelist():
            if name != dropped:
                target.writestr(name, source.read(name))
    return stream.getvalue()


def wrapped(content, rng):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("model.pth", content)
    return stream.getvalue()


BYTES = {
    "cut": lambda x, rng: x[: rng.randrange(len(x))],
    "flipped": flip,
    "flipped often": lambda x, rng: flip(x, rng, rng.randrange(2, 50)),
    "empty": lambda x, rng: b"",
    "zeros": lambda x, rng: x[: (at := rng.randrange(len(x)))] + bytes(64) + x[at + 64 :],
    "inserted": lambda x, rng: x[: (at := rng.randrange(len(x)))] + rng.randbytes(9) + x[at:],
    "page": lambda x, rng: b"<html>" + x,
    "pointer": lambda x, rng: b"version https://git-lfs.github.com/spec/v1\n",
    "archived": wrapped,
    "compressed": lambda x, rng: gzip.compress(x),
    "without a record": without_a_record,
}
SPARSE = torch.eye(3).to_sparse()
VALUES = [None, "text", [1.0], {}, 3, SPARSE, torch.ones(3, device="meta"), torch.ones(3) * 1j]
VALUES += [torch.tensor(float("nan")), torch.tensor([float("inf")] * 3)]
CHANGES = {
    "removed": lambda v, rng: {},
    "renamed": lambda v, rng: {f"x{rng.randrange(9)}": v},
    "replaced": lambda v, rng: rng.choice(VALUES),
    "integers": lambda v, rng: v.int(),
    "booleans": lambda v, rng: v.bool(),
    "half": lambda v, rng: v.half() if v.is_floating_point() else v,
    "double": lambda v, rng: v.double() if v.is_floating_point() else v,
    "longer": lambda v, rng: torch.cat([v.flatten(), v.flatten()]),
    "one more dimension": lambda v, rng: v[None],
}
MODELS = [None, [], "text", 3, {}, torch.ones(3), {"model": STATE}]


def mutation(seed):
    """Return the kind of a mutated file, its suffix and bytes, and what it says if that is known.

    What it says is {} if the file has to be refused.
    """
    rng = random.Random(seed)
    kind = rng.choice([*BYTES, *CHANGES, *CHANGES, "the model"])
    suffix = rng.choice(list(WRITERS)) if kind in BYTES else ".pth"
    suffix = ".pth" if kind == "without a record" else suffix
    if kind in BYTES:
        content = BYTES[kind](WRITERS[suffix]({"model": STATE, "iteration": 3}), rng)
        if suffix == ".pth":
            return kind, suffix, content, STATE
        try:
            return kind, suffix, content, OTHERS[suffix](content)
        except Exception:
            return kind, suffix, content, {}
    if kind == "the model":
        return kind, suffix, torch_bytes({"model": rng.choice(MODELS)}), {}
    state = dict(STATE)
    key = rng.choice(list(state))
    value = CHANGES[kind](state.pop(key), rng)
    state.update(value if kind in ("removed", "renamed") else {key: value})
    bad = kind == "replaced" or kind in ("integers", "booleans") and key != COUNTER
    return kind, suffix, torch_bytes({"model": state}), {} if bad else state


COUNTER = "norm.num_batches_tracked"


def attempt(read, path):
    """Return whether a file is read; a refusal has to be one sentence that names it."""
    try:
        read(str(path))
        return True
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return False


def same(loaded, said):
    return torch.equal(loaded, said.to(loaded.dtype))


def check(seed, folder):
    """Check one mutated file; return whether it is read."""
    kind, suffix, content, said = mutation(seed)
    path, target = folder / f"{seed}{suffix}", folder / "target.pth"
    path.write_bytes(content)
    net, strict = new_net(), new_net()
    read = attempt(SafeCheckpointer(net).load, path)
    if not said:
        assert not read
    fits = {k for k, v in said.items() if k in STATE and v.shape == STATE[k].shape}
    for key, value in net.state_dict().items():
        assert same(value, said[key] if read and key in fits else STATE[key]), key
    if attempt(lambda x: load_strictly(strict, x, "the test"), path):
        # A layer sets the counter to 0 if a file has none.
        assert read and fits == said.keys() and STATE.keys() - fits <= {COUNTER}
        assert all(same(strict.state_dict()[key], value) for key, value in said.items())
    if attempt(lambda x: strip_checkpoint(x, str(target)), path):
        written = torch.load(target, weights_only=True)["model"]
        # The exporter knows of no model with which the kinds of numbers would have to agree.
        assert all(torch.equal(value, said[key]) for key, value in written.items() if said)
        assert {*map(type, written.values())} == {torch.Tensor}
    return kind, read


def test_one_hundred(tmp_path):
    outcomes = [check(seed, tmp_path) for seed in range(100)]
    assert {kind for kind, _ in outcomes} == {*BYTES, *CHANGES, "the model"}
    assert 10 < sum(read for _, read in outcomes) < 60


@pytest.mark.long
@pytest.mark.parametrize("block", range(20))
def test_two_thousand(tmp_path, block):
    for seed in range(100 * (block + 1), 100 * (block + 2)):
        check(seed, tmp_path)


@pytest.mark.parametrize("step", [61, pytest.param(3, marks=pytest.mark.long)])
def test_with_a_checksum_a_flipped_bit_is_refused(tmp_path, step):
    content = torch_bytes({"model": STATE})
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    (tmp_path / "model.pth.sha256").write_text(f"{hash_file(path)}  model.pth\n")
    read_checkpoint(str(path), "the test")
    for bit in range(0, 8 * len(content), step):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        assert not attempt(lambda x: read_checkpoint(x, "the test"), path), bit


def test_a_record_that_is_marked_as_a_folder_is_refused(tmp_path):
    """The one bit that torch answers with what was in the memory before."""
    content = bytearray(torch_bytes({"model": STATE}))
    entry = content.index(b"PK\x01\x02", content.index(b"archive/.data/serialization_id"))
    content[entry + 38] |= 0x10
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(InputError, match="a.pth' for the test .*marked as a folder"):
        read_checkpoint(str(tmp_path / "a.pth"), "the test")


@pytest.mark.long
def test_without_one_a_flipped_bit_of_an_archive_is_noticed_or_changes_nothing(tmp_path):
    content = torch_bytes({"model": STATE})
    path = tmp_path / "model.pth"
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        directory = 8 * archive.start_dir  # which has no checksum: all of its bits
    for bit in [*range(0, directory, 13), *range(directory, 8 * len(content))]:
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        net = new_net()
        attempt(SafeCheckpointer(net).load, path)
        assert all(same(value, STATE[key]) for key, value in net.state_dict().items()), bit
