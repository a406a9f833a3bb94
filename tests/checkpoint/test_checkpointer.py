"""Training checkpoints: what is written, what is found on resume, and what is refused."""

import errno
import logging
import os
import pickle
import random
import re
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from fvcore.common.checkpoint import PeriodicCheckpointer
from torch import nn

from msad_kd.checkpoint.checkpointer import TrainingCheckpointer, find_checkpoint
from msad_kd.checkpoint.files import hash_file
from msad_kd.utils.errors import InputError

ONE, THREE, FINAL = "model_0000001.pth", "model_0000003.pth", "model_final.pth"


class Trainer:
    """The state of a training of which only the iteration is known."""

    iteration = -1

    def state_dict(self):
        return {"iteration": self.iteration}

    def load_state_dict(self, state):
        self.iteration = state["iteration"]


@pytest.fixture
def checkpointer(tmp_path):
    """A fresh checkpointer of the folder, with a model of two tensors and a buffer."""
    return new_checkpointer(tmp_path)


def new_checkpointer(folder):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    return TrainingCheckpointer(model, str(folder), trainer=Trainer())


def save(checkpointer, name, iteration):
    """Save a checkpoint whose first bias is its iteration."""
    nn.init.constant_(checkpointer.model[0].bias, iteration)
    checkpointer.checkpointables["trainer"].iteration = iteration
    checkpointer.save(Path(name).stem, iteration=iteration)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    for name, iteration in ((ONE, 1), (THREE, 3), ("model_0000005.pth", 5), (FINAL, 5)):
        save(new_checkpointer(folder), name, iteration)
    return folder


@pytest.fixture
def run(tmp_path, finished_run):
    """The folder of a run with checkpoints after the iterations 1, 3 and 5, the last one twice."""
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    return tmp_path


def resumed(folder):
    """The iteration that a new checkpointer resumes from, in the trainer and in the weights."""
    checkpointer = new_checkpointer(folder)
    assert checkpointer.has_checkpoint()
    checkpointer.resume_or_load("", resume=True)
    iteration = checkpointer.checkpointables["trainer"].iteration
    assert checkpointer.model[0].bias.tolist() == [iteration, iteration]
    return iteration


def flip(path, generator):
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)


def rewrite(path, change):
    """Change the contents of a checkpoint, and let its checksum fit."""
    contents = torch.load(path, weights_only=True)
    change(contents)
    torch.save(contents, path)
    Path(f"{path}.sha256").unlink()


# ---- Writing ----


def test_what_is_written(run, checkpointer):
    assert (run / "last_checkpoint").read_text() == FINAL
    assert sorted(path.name for path in run.glob("*.part")) == []
    done = subprocess.run(["sha256sum", "-c", f"{FINAL}.sha256"], cwd=run, capture_output=True)
    assert done.returncode == 0
    checkpointer.extra = {"classes": ["cat", "dog"]}
    save(checkpointer, "model_0000007", 7)
    contents = torch.load(run / "model_0000007.pth", weights_only=True)
    assert contents.keys() == {"model", "trainer", "classes", "iteration"}
    assert contents["classes"] == ["cat", "dog"] and resumed(run) == 7


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("tensor", ["0.weight", "0.bias", "1.running_var"])
def test_weights_that_are_not_finite_are_not_written(run, checkpointer, tensor, value):
    before = {path: hash_file(path) for path in run.iterdir()}
    checkpointer.model.state_dict()[tensor][0] = value
    for name in ("model_0000007", "model_final"):
        with pytest.raises(InputError, match=f"1 of .*{tensor}.*the last .*{FINAL}.*BASE_LR"):
            checkpointer.save(name)
    assert {path: hash_file(path) for path in run.iterdir()} == before and resumed(run) == 5


def test_the_first_checkpoint_is_not_finite(tmp_path, checkpointer):
    nn.init.constant_(checkpointer.model[0].weight, float("nan"))
    with pytest.raises(InputError, match="there is none"):
        checkpointer.save("model_0000001")
    assert list(tmp_path.iterdir()) == [] and not checkpointer.has_checkpoint()


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("name", ["model_0000007", "model_final"])
@pytest.mark.parametrize("when", ["opened", "written", "synced", "renamed"])
def test_a_full_disk_keeps_the_old_checkpoint(run, checkpointer, monkeypatch, name, when):
    with monkeypatch.context() as patch:
        if when == "opened":
            patch.setattr("msad_kd.checkpoint.checkpointer.open", no_space, raising=False)
        elif when == "synced":
            patch.setattr(os, "fsync", no_space)
        elif when == "renamed":
            patch.setattr(os, "replace", no_space)
        before = {path: hash_file(path) for path in run.iterdir()}
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        if when == "written":  # in the middle of torch.save
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        try:
            words = f"'.*{name}.pth' cannot be written .*; the last checkpoint is '.*{FINAL}': make"
            with pytest.raises(InputError, match=words):
                save(checkpointer, name, 7)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    left = {path: hash_file(path) for path in run.iterdir()}
    checksum = run / f"{FINAL}.sha256"  # gone if the file would have been replaced next
    assert {**before, checksum: ""} == {**left, checksum: ""} and resumed(run) == 5


def test_checksums_are_deleted_with_their_files(tmp_path, checkpointer):
    periodic = PeriodicCheckpointer(checkpointer, 1, max_iter=6, max_to_keep=2)
    (tmp_path / "model_0000000.pth.part").write_text("of a run that was killed")
    for iteration in range(6):
        checkpointer.checkpointables["trainer"].iteration = iteration
        periodic.step(iteration)
    kept = {"model_0000004.pth", "model_0000005.pth", FINAL}
    files = {path.name for path in tmp_path.iterdir()}
    assert files == kept | {f"{name}.sha256" for name in kept} | {"last_checkpoint"}


# ---- Finding ----

DAMAGES = {
    "truncated": lambda content: content[: len(content) // 2],
    "without end": lambda content: content[:-1],
    "emptied": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "HTML": lambda content: b"<!DOCTYPE html><html>404</html>",
    "LFS pointer": lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "JSON": lambda content: b'{"model": {}}',
    "other bytes": lambda content: content[::-1],
}


@pytest.mark.parametrize("checked", [True, False], ids=["checksum", "no checksum"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(run, damage, checked, caplog):
    for name, before in ((FINAL, 5), ("model_0000005.pth", 3)):
        path = run / name
        path.write_bytes(damage(path.read_bytes()))
        if not checked:
            Path(f"{path}.sha256").unlink()
        caplog.clear()
        assert resumed(run) == before
        assert f"{name}'" in caplog.text and "' is used" in caplog.text
    for name in (ONE, THREE):
        (run / name).write_bytes(damage((run / name).read_bytes()))
        if not checked:
            (run / f"{name}.sha256").unlink()
    with pytest.raises(
        InputError, match=f"no checkpoint in .*{FINAL}.*; 2 more .*without --resume"
    ):
        resumed(run)


def test_a_flipped_bit_is_noticed_wherever_it_is(run, caplog):
    generator, original = random.Random(20), (run / FINAL).read_bytes()
    (run / "model_0000005.pth").unlink()
    for _ in range(20):
        flip(run / FINAL, generator)
        caplog.clear()
        assert resumed(run) == 3 and f"{FINAL}' has changed since it was written" in caplog.text
        (run / FINAL).write_bytes(original)
    assert resumed(run) == 5
    flip(run / f"{FINAL}.sha256", generator)  # the checksum itself
    assert resumed(run) == 3


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "last_checkpoint' is missing"),
        (b"model_0000099.pth", "names 'model_0000099.pth', which is no"),
        (b"", "names '', which is no"),
        (b"\x80\xff\x00garbage", "names '.*garbage', which is no"),
        (b"{absolute}/model_0000009.pth", "names '/.*/model_0000009.pth', which is no"),
        (b"{relative}/model_0000009.pth", r"names '\.\./.*/model_0000009.pth', which is no"),
        (b"bomb.pkl", "names 'bomb.pkl', which is no"),
        (b"bomb.pth", "bomb.pth'"),
        (b".", "names '.', which is no"),
        (pickle.dumps(Bomb()), "which is no"),
    ],
)
@pytest.mark.parametrize(("newest", "iteration"), [(FINAL, 5), (THREE, 3)])
def test_without_a_good_last_checkpoint_the_newest_is_found(
    run, caplog, monkeypatch, tmp_path_factory, content, words, newest, iteration
):
    monkeypatch.chdir(run)
    outside = tmp_path_factory.mktemp("other")
    save(new_checkpointer(outside), "model_0000009", 9)
    for name in ("bomb.pkl", "bomb.pth"):
        (run / name).write_bytes(pickle.dumps(Bomb()))
    (run / "last_checkpoint").unlink()
    if content is not None:
        content = content.replace(b"{absolute}", str(outside).encode())
        content = content.replace(b"{relative}", os.path.relpath(outside, run).encode())
        (run / "last_checkpoint").write_bytes(content)
    if newest == THREE:
        (run / FINAL).unlink()
        (run / "model_0000005.pth").unlink()
    weights = {path.name: path.read_bytes() for path in run.glob("*.pth")}
    assert resumed(run) == iteration
    (record,) = [r for r in caplog.records if r.name == "msad_kd.checkpoint.checkpointer"]
    assert record.levelno == logging.WARNING
    assert re.search(words, record.getMessage())
    assert {path.name: path.read_bytes() for path in run.glob("*.pth")} == weights
    assert not (run / "bomb").exists()


def test_a_final_checkpoint_of_a_shorter_run_is_not_the_newest(run):
    save(new_checkpointer(run), "model_0000007", 7)  # the run went on
    (run / "last_checkpoint").unlink()
    assert resumed(run) == 7


def test_an_older_checkpoint_may_be_named(run, caplog):
    (run / "last_checkpoint").write_text(THREE)
    assert resumed(run) == 3 and "is used" not in caplog.text
    (run / THREE).write_text("damaged")
    assert resumed(run) == 1  # not one that is newer than what was named


@pytest.mark.parametrize("last", [None, "model_0000099.pth"])
def test_a_folder_without_checkpoints(tmp_path, last):
    (tmp_path / "model_start.pth").write_text("weights to start from, not a run's")
    if last is None:
        assert find_checkpoint(str(tmp_path)) is None and find_checkpoint("nowhere") is None
        return
    (tmp_path / "last_checkpoint").write_text(last)
    with pytest.raises(InputError, match=f"no checkpoint in .*names '{last}'.* without --resume"):
        find_checkpoint(str(tmp_path))


# ---- Resuming ----


def test_a_checkpoint_of_before_is_resumed(run):
    for path in run.glob("*.sha256"):
        path.unlink()
    assert resumed(run) == 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x["model"].pop("0.bias"), "1 keys of the model are absent .* 0.bias"),
        (
            lambda x: x["model"].update(old=x["model"].pop("0.bias")),
            "1 keys of the model are absent .* 0.bias; 1 of its keys are not in the model.* old",
        ),
        (
            lambda x: x["model"].update({"0.bias": torch.zeros(5)}),
            r"1 of its keys have another shape .* 0.bias \(5,\) -> \(2,\)",
        ),
        (lambda x: x["model"].update(more=torch.zeros(1)), "1 of its keys are not in the model"),
        (lambda x: x["model"].clear(), ""),
        (lambda x: x.pop("trainer"), "has no 'trainer'"),
        (lambda x: x.update(trainer=[1]), "has no 'trainer'"),
        (lambda x: x.update(trainer={}), "has no 'trainer'"),
        (lambda x: x.update(trainer={"iteration": "5"}), "has no 'trainer'"),
        (lambda x: x.update(trainer={"iteration": -9}), "has no 'trainer'"),
    ],
)
def test_what_does_not_fit_is_refused(run, change, words):
    rewrite(run / FINAL, change)
    for path in run.glob("model_0*"):
        path.unlink()
    checkpointer = new_checkpointer(run)
    with pytest.raises(InputError, match=f"{FINAL}.*{words}"):
        checkpointer.resume_or_load("", resume=True)
    assert checkpointer.checkpointables["trainer"].iteration == -1


def test_an_evaluation_needs_no_trainer(run):
    rewrite(run / FINAL, lambda x: x.pop("trainer"))
    assert find_checkpoint(str(run), training=False) == run / FINAL
    (run / "last_checkpoint").unlink()
    assert find_checkpoint(str(run)) == run / "model_0000005.pth"
