"""Payloads in proposals and through the tools; and --trust-files, which reads other files too."""

import argparse
import pickle
import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT
from payloads import MARK, Payload
from torch import nn

from msad_kd import KDTrainer
from msad_kd.checkpoint.checkpoint import load_strictly
from msad_kd.checkpoint.reading import read_checkpoint
from msad_kd.utils import unpickle
from msad_kd.utils.errors import InputError
from msad_kd.utils.unpickle import TrustFiles


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


TOOLS = {  # command: its arguments, with BOMB for the file
    "train_net": "--config-file {lr} OUTPUT_DIR {out} MODEL.WEIGHTS BOMB",
    "train_net --eval-only": "--eval-only --config-file {lr} OUTPUT_DIR {out} MODEL.WEIGHTS BOMB",
    "analyze_model": "--config-file {lr} --weights BOMB",
    "resolution_sweep": "--model a {lr} BOMB --sizes 32 --output {out}/sweep",
    "precise_statistics": "--config-file {teacher} --batches 1 BOMB {out}/new.pth",
    "compare_gradients": "--config-file {student} KD.TEACHER.WEIGHTS BOMB",
    "compare_gradients --weights": "--config-file {student} --weights BOMB "
    "KD.TEACHER.WEIGHTS {good}",
    "compare_gradients MODEL.WEIGHTS": "--config-file {student} KD.TEACHER.WEIGHTS {good} "
    "MODEL.WEIGHTS BOMB",
    "compare_features": "--config-file {student} --split train --model a BOMB "
    "KD.TEACHER.WEIGHTS {good}",
    "suggest_ladder": "--student {lr} BOMB --teacher a {teacher} {good} --images 5 "
    "--output {out}/l",
    "suggest_ladder --teacher": "--student {lr} --teacher a {teacher} BOMB --images 5 "
    "--output {out}/l",
    "strip_checkpoint": "BOMB {out}/target.pth",
}


@pytest.mark.parametrize("case", TOOLS)
def test_no_tool_runs_it(bomb, tmp_path, config_files, teacher_weights, monkeypatch, capsys, case):
    name = case.split()[0]
    values = {**config_files, "out": tmp_path, "good": teacher_weights}
    arguments = TOOLS[case].replace("BOMB", bomb("2.pkl")).format(**values).split()
    places = (ROOT, ROOT / "tools", ROOT / "tools" / "analysis")
    (file,) = (str(folder / f"{name}.py") for folder in places if (folder / f"{name}.py").exists())
    monkeypatch.setattr(sys, "argv", [file, *arguments])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises((SystemExit, InputError)) as error:
        runpy.run_path(file, run_name="__main__")
    said = capsys.readouterr().err + str(error.value)
    assert "2.pkl' for " in said and "--trust-files" in said


class TestTrust:
    @pytest.fixture(autouse=True)
    def forget(self):
        yield
        unpickle._trusted = False

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

    def test_faults_are_told_all_the_same(self, tmp_path):
        unpickle.trust_files()
        (tmp_path / "a.pth").write_bytes(b"<html>")
        torch.save({"model": {"a": torch.tensor(float("nan"))}}, tmp_path / "b.pth")
        for name, words in {"a": "web page", "b": "not finite"}.items():
            with pytest.raises(InputError, match=words):
                read_checkpoint(str(tmp_path / f"{name}.pth"), "x")
