"""Files with a payload, through everything that takes a file: none runs."""

import io
import pickle
import tracemalloc

import pytest
import yaml
from helpers import NO_TEST, train
from payloads import CONTENTS, FORMATS, LEGACY, MARK, Built, Payload
from timm_networks import backbone
from torch import nn

from msad_kd import KDTrainer
from msad_kd.checkpoint.checkpoint import SafeCheckpointer, load_strictly
from msad_kd.checkpoint.checkpointer import find_checkpoint
from msad_kd.checkpoint.reading import read_checkpoint
from msad_kd.checkpoint.strip import strip_checkpoint
from msad_kd.config.build import build_config
from msad_kd.distill.teacher import TeacherSpec
from msad_kd.ladder.run import run_ladder
from msad_kd.utils.errors import InputError
from msad_kd.utils.unpickle import load_pickle
from projects.study import grid


def test_the_payload_works(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path)))
    assert (tmp_path / MARK).exists()


READERS = {
    "read": lambda path, folder: read_checkpoint(path, "x"),
    "MODEL.WEIGHTS": lambda path, folder: SafeCheckpointer(nn.Linear(1, 1)).load(path),
    "strictly": lambda path, folder: load_strictly(nn.Linear(1, 1), path, "x"),
    "strip": lambda path, folder: strip_checkpoint(path, str(folder / "target.pth")),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", FORMATS)
def test_no_format_runs_it(bomb, tmp_path, name, content):
    for payload in (Payload, Built):
        path = bomb(name, content, payload)
        for read in READERS.values():
            with pytest.raises(InputError, match=f"{name}' for "):
                read(path, tmp_path)


def test_the_tar_file_is_taken_for_the_later_format_by_its_beginning(bomb):
    path = bomb("tar.pth")
    assert open(path, "rb").read().startswith(pickle.dumps(LEGACY[0], 2))
    with pytest.raises(InputError, match="has none of torch's formats"):
        read_checkpoint(path, "x")


@pytest.mark.parametrize("name", [name for name in FORMATS if name.endswith("h")])
def test_a_timm_backbone_runs_none(bomb, name):
    with pytest.raises(InputError, match=f"MODEL.TIMM.CHECKPOINT: .*{name}"):
        backbone(checkpoint=bomb(name))


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R(K\x01"
BYTE = b"cnumpy\ndtype\nU\x02i1K\0K\x01\x87R"
OPCODES = {  # what a pickle could do to the functions that are allowed, or by a length of any size
    "a_state_for_a_function": b"ccollections\nOrderedDict\n}}U\x01xNs\x86b.",
    "a_length_for_bytes": b"cbuiltins\nbytes\n(L99999999999L\ntR.",
    "a_shape_for_an_array": b"cnumpy\nndarray\n((L99999999999L\nttR.",
    "another_codec": b"c_codecs\nencode\nX\x01\0\0\0aX\x03\0\0\0zip\x86R.",
    "a_name_in_a_module": b"\x80\x04\x8c\x05numpy\x8c\x0bos.system\x93.",
    "an_extension": b"\x82\x01.",
    "a_persistent_id": b"Pos.system\n.",
    "an_instance": b"(ios\nsystem\n.",
    "a_length_for_an_array's_data": ARRAY + b"L9999999999L\n\x85" + BYTE + b"\x89L9999999999L\ntb.",
    "a_length_for_a_scalar": b"cnumpy.core.multiarray\nscalar\n" + BYTE + b"L9999999999L\n\x86R.",
    "a_shape_of_2_to_the_64": ARRAY + b"L4611686018427387904L\nL4L\n\x86" + BYTE + b"\x89U\0tb.",
    "a_length_for_a_bytearray": b"\x96\0\0\0\0\1\0\0\0.",
    "a_length_for_a_frame": b"\x80\x04\x95\0\0\0\0\1\0\0\0.",
}


@pytest.mark.parametrize("content", OPCODES.values(), ids=OPCODES)
def test_allowed_functions_cannot_be_misused(content):
    tracemalloc.start()
    try:
        with pytest.raises((pickle.UnpicklingError, TypeError, ValueError, LookupError, EOFError)):
            load_pickle(io.BytesIO(b"\x80\x02" + content))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_what_a_pickle_holds_many_times_is_built_once():
    """(x, x) of (x, x) of ..., 60 deep: to copy it would take forever."""
    value = load_pickle(io.BytesIO(b"\x80\x02K\x01" + b"2\x86" * 60 + b"."))
    assert value[0] is value[1]


@pytest.mark.parametrize("name", ["5.pkl", "zip.pth"])
class TestARun:
    def test_its_start(self, bomb, config, name):
        with pytest.raises(InputError, match=f"{name}' for MODEL.WEIGHTS"):
            train(config("lr", "MODEL.WEIGHTS", bomb(name), *NO_TEST))

    def test_its_teacher(self, bomb, config, name):
        spec = TeacherSpec.from_config(config("student", "KD.TEACHER.WEIGHTS", bomb(name)))
        with pytest.raises(InputError, match=f"{name}' for KD.TEACHER"):
            spec.build()

    def test_its_evaluation(self, bomb, config, name):
        with pytest.raises(InputError, match=f"{name}' for the config"):
            KDTrainer.load_model(config("lr"), bomb(name), "the config")

    def test_its_last_checkpoint(self, bomb, config, name, tmp_path):
        path = bomb(name)
        cfg = config("lr", *NO_TEST, "OUTPUT_DIR", str(tmp_path))
        (tmp_path / "last_checkpoint").write_text(name)
        (tmp_path / "model_0000001.pth").write_bytes((tmp_path / name).read_bytes())
        for training in (True, False):
            with pytest.raises(InputError, match="no checkpoint in"):
                find_checkpoint(str(tmp_path), training=training)
        with pytest.raises(InputError, match="no checkpoint in"):
            train(cfg, resume=True)
        assert path

    @pytest.mark.parametrize("part", ["weights", "start"])
    def test_a_stage_of_its_ladder(self, bomb, config, config_files, teacher_weights, name, part):
        losses = [{"name": "l1", "weight": 1}]
        stage = {"name": "a", "config_file": str(config_files["teacher"]), "losses": losses}
        stage["weights"] = bomb(name) if part == "weights" else str(teacher_weights)
        options = ["KD.LADDER.STAGES", [stage], *NO_TEST]
        options += ["MODEL.WEIGHTS", bomb(name)] if part == "start" else []
        with pytest.raises(InputError, match=f"{name}' for "):
            run_ladder(config("student", *options), resume=False)


TAG = "!!python/object/apply:builtins.open [{mark}, w]"


def test_no_tag_of_yaml_runs(tmp_path, config_files):
    tag = TAG.format(mark=tmp_path / MARK)
    file = tmp_path / "bad.yaml"
    file.write_text(f"_BASE_: {config_files['lr']}\nMODEL:\n  WEIGHTS: {tag}\n")
    base = tmp_path / "derived.yaml"
    base.write_text(f"_BASE_: {file}\n")
    stages = yaml.safe_dump([{"name": "a", "config_file": str(file), "weights": "x.pth"}])
    for role, options in {
        file: [],
        base: [],
        config_files["student"]: ["KD.LOSSES", f"[{tag}]"],
        config_files["lr"]: ["MODEL.WEIGHTS", tag, "DATASETS.COCO_FORMAT", f"[{tag}]"],
    }.items():
        try:
            build_config(str(role), options)
        except InputError:
            pass
    for options in (["KD.TEACHER.CONFIG_FILE", str(file)], ["KD.LADDER.STAGES", stages]):
        options += ["KD.TEACHER.WEIGHTS", "x.pth"]
        with pytest.raises(InputError):
            cfg = build_config(str(config_files["student"]), options)
            run_ladder(cfg, resume=False) if stages in options else TeacherSpec.from_config(cfg)
    with pytest.raises(InputError):
        grid.read_grid(file)
    assert not (tmp_path / MARK).exists()
