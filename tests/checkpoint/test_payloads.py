"""Files with a payload, through everything that takes a file: none runs without --trust-files."""

import argparse
import io
import pickle
import subprocess
import sys
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from helpers import NO_TEST, run_script, train
from payloads import CONTENTS, FORMATS, LEGACY, MARK, Built, Payload
from timm_networks import backbone
from torch import nn

from msad_kd import KDTrainer
from msad_kd.checkpoint.checkpoint import SafeCheckpointer, load_strictly
from msad_kd.checkpoint.checkpointer import find_checkpoint
from msad_kd.checkpoint.reading import read_checkpoint
from msad_kd.checkpoint.strip import strip_checkpoint
from msad_kd.config.build import build_config
from msad_kd.distill.teacher_spec import TeacherSpec
from msad_kd.ladder.run import run_ladder
from msad_kd.utils import unpickle
from msad_kd.utils.errors import InputError
from msad_kd.utils.unpickle import TrustFiles, load_pickle
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
    def test_its_last_checkpoint(self, bomb, config, name, tmp_path):
        bomb(name)
        cfg = config("lr", *NO_TEST, "OUTPUT_DIR", str(tmp_path))
        (tmp_path / "last_checkpoint").write_text(name)
        (tmp_path / "model_0000001.pth").write_bytes((tmp_path / name).read_bytes())
        for training in (True, False):
            with pytest.raises(InputError, match="no checkpoint in"):
                find_checkpoint(str(tmp_path), training=training)
        with pytest.raises(InputError, match="no checkpoint in"):
            train(cfg, resume=True)

    @pytest.mark.parametrize("part", ["weights", pytest.param("start", marks=pytest.mark.long)])
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


class TestProposals:
    """DATASETS.PROPOSAL_FILES_*, which Detectron2 reads itself."""

    @pytest.fixture
    def load(self, config, tmp_path):
        def build(content, split="TRAIN"):
            path = tmp_path / "proposals.pkl"
            path.write_bytes(content)
            options = [f"DATASETS.PROPOSAL_FILES_{split}", [str(path)]]
            cfg = config("lr", "MODEL.LOAD_PROPOSALS", True, *options)
            if split == "TRAIN":
                return KDTrainer.build_train_loader(cfg).dataset.dicts
            return KDTrainer.build_test_loader(cfg, "tiny_val").dataset

        return build

    @pytest.mark.parametrize("split", ["TRAIN", "TEST"])
    def test_none_runs(self, load, split, tmp_path):
        proposals = {"ids": [1], "boxes": [Payload(tmp_path)], "objectness_logits": [np.ones(1)]}
        with pytest.raises(InputError, match="PROPOSAL_FILES: '.*proposals.pkl' asks for .*open"):
            load(pickle.dumps(proposals), split)
        assert not (tmp_path / MARK).exists()

    def test_arrays_are_read(self, load):
        logits = [np.array([0.1, 0.9], "f4")] * 6
        boxes = [np.array([[0, 0, 1, 1], [0, 0, i, 2]], "f4") for i in range(6)]
        names = {"ids": [*range(6)], "boxes": boxes, "objectness_logits": logits}
        for protocol in (2, 5):
            dicts = load(pickle.dumps(names, protocol))
            assert [d["proposal_boxes"][0].tolist() for d in dicts] == [
                [0, 0, d["image_id"], 2] for d in dicts
            ]
            assert {type(d["proposal_boxes"]) for d in dicts} == {np.ndarray}

    @pytest.mark.parametrize(
        "content", [b"", b"<html>", pickle.dumps([1]), pickle.dumps({"ids": [], "boxes": []})]
    )
    def test_other_files_are_one_sentence(self, load, content):
        with pytest.raises(InputError, match="PROPOSAL_FILES: '.*proposals.pkl' cannot be read"):
            load(content)


TOOLS = {  # tests/test_structure.py finds others that would read a file by another reader
    "train_net.py": "--config-file {student} OUTPUT_DIR {out} KD.TEACHER.WEIGHTS {bomb}",
    "tools/label_images.py": "--config-file {lr} --weights {bomb} --dataset tiny_val "
    "--output {out}/labels.json",
    "tools/analysis/suggest_ladder.py": "--student {lr} --teacher a {teacher} {bomb} --images 5 "
    "--output {out}/l",
    "tools/strip_checkpoint.py": "{bomb} {out}/target.pth",
}


@pytest.mark.parametrize("script", TOOLS)
def test_no_tool_runs_it(bomb, tmp_path, config_files, script):
    arguments = TOOLS[script].format(**config_files, out=tmp_path, bomb=bomb("2.pkl")).split()
    said = run_script(script, *arguments, code=None).stderr
    assert "2.pkl' for " in said and "--trust-files" in said


class TestTrust:
    @pytest.fixture(autouse=True)
    def forget(self, monkeypatch):
        monkeypatch.setenv(unpickle.VARIABLE, "")

    def test_a_harmless_file_of_other_objects_is_read(self, tmp_path):
        state = {"weight": torch.ones(1, 1), "bias": torch.ones(1)}
        contents = {"model": state, "args": argparse.Namespace(lr=1), "e": SimpleNamespace(x=2)}
        path = tmp_path / "a.pth"
        torch.save(contents, path)
        old = tmp_path / "a.pkl"
        old.write_bytes(pickle.dumps({**contents, "__author__": "me"}))
        for file in (path, old):
            with pytest.raises(InputError, match=f"{file}' for x asks for .*--trust-files"):
                read_checkpoint(str(file), "x")
        parser = argparse.ArgumentParser()
        parser.add_argument("--trust-files", action=TrustFiles)
        assert not parser.parse_args([]).trust_files and not unpickle.trusted()
        assert parser.parse_args(["--trust-files"]).trust_files
        for file in (path, old):
            assert read_checkpoint(str(file), "x")["args"] == argparse.Namespace(lr=1)
            load_strictly(nn.Linear(1, 1), str(file), "x")

    def test_a_config_and_the_processes_that_a_command_starts(self, tmp_path):
        config = tmp_path / "my.yaml"
        config.write_text("OUTPUT_DIR: !!python/object/apply:os.path.join [mine, run]\n")
        program = "import sys, msad_kd; print(msad_kd.build_config(sys.argv[1], []).OUTPUT_DIR)"
        command = [sys.executable, "-c", program, str(config)]
        for trusted in (False, True):
            if trusted:
                unpickle.trust_files()
            found = subprocess.run(command, capture_output=True, text=True)
            assert ("mine/run" in found.stdout) == trusted, found.stderr
            words = "'python/object/apply:os.path.join' would run code; write"
            assert (words in found.stderr) != trusted

    def test_faults_are_told_all_the_same(self, tmp_path):
        unpickle.trust_files()
        (tmp_path / "a.pth").write_bytes(b"<html>")
        torch.save({"model": {"a": torch.tensor(float("nan"))}}, tmp_path / "b.pth")
        for name, words in {"a": "web page", "b": "not finite"}.items():
            with pytest.raises(InputError, match=words):
                read_checkpoint(str(tmp_path / f"{name}.pth"), "x")
