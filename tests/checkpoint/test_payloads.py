"""Files with a payload, through everything that takes a file: none runs."""

import io
import pickle
import subprocess
import sys

import pytest
import yaml
from helpers import NO_TEST, ROOT, train
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


OPCODES = {  # what a pickle could do to the functions that are allowed
    "a_state_for_a_function": b"ccollections\nOrderedDict\n}}U\x01xNs\x86b.",
    "a_length_for_bytes": b"cbuiltins\nbytes\n(L99999999999L\ntR.",
    "a_shape_for_an_array": b"cnumpy\nndarray\n((L99999999999L\nttR.",
    "another_codec": b"c_codecs\nencode\nX\x01\0\0\0aX\x03\0\0\0zip\x86R.",
    "a_name_in_a_module": b"\x80\x04\x8c\x05numpy\x8c\x0bos.system\x93.",
    "an_extension": b"\x82\x01.",
    "a_persistent_id": b"Pos.system\n.",
    "an_instance": b"(ios\nsystem\n.",
}


@pytest.mark.parametrize("content", OPCODES.values(), ids=OPCODES)
def test_allowed_functions_cannot_be_misused(content):
    with pytest.raises((pickle.UnpicklingError, TypeError, ValueError, AttributeError)):
        load_pickle(io.BytesIO(b"\x80\x02" + content if content[0] != 0x80 else content))


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


def test_train_net_runs_none_and_says_so_in_one_sentence(bomb, config_files, tmp_path):
    command = [sys.executable, ROOT / "train_net.py", "--config-file", config_files["lr"]]
    command += ["OUTPUT_DIR", tmp_path / "out", "MODEL.WEIGHTS", bomb()]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr + done.stdout
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("train_net.py: ")]
    assert "5.pkl' for MODEL.WEIGHTS asks for " in line and "open" in line
