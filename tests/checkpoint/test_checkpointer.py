"""Training checkpoints: what is written, and what is refused when it is resumed."""

import errno
import os
import resource
import subprocess
from pathlib import Path

import pytest
import torch
from checkpoints import FINAL, new_checkpointer, resumed, save
from fvcore.common.checkpoint import PeriodicCheckpointer
from torch import nn

from msad_kd.checkpoint.checkpointer import find_checkpoint
from msad_kd.checkpoint.files import hash_file
from msad_kd.utils.errors import InputError


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


@pytest.mark.parametrize(
    ("tensor", "value"),
    [("0.weight", float("nan")), ("0.bias", float("inf")), ("1.running_var", -float("inf"))],
)
def test_weights_that_are_not_finite_are_not_written(run, checkpointer, tensor, value):
    before = {path: hash_file(path) for path in run.iterdir()}
    checkpointer.model.state_dict()[tensor][0] = value
    for name in ("model_0000007", "model_final"):
        with pytest.raises(InputError, match=f"1 of .*{tensor}.*the last .*{FINAL}.*BASE_LR"):
            checkpointer.save(name)
    assert {path: hash_file(path) for path in run.iterdir()} == before and resumed(run) == 5


def test_the_first_checkpoint_is_not_finite(tmp_path, checkpointer):
    nn.init.constant_(checkpointer.model[0].weight, float("nan"))
    with pytest.raises(InputError, match="there is no checkpoint yet"):
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


# ---- Resuming ----


def test_a_checkpoint_of_before_is_resumed(run):
    for path in run.glob("*.sha256"):
        path.unlink()
    assert resumed(run) == 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda x: x["model"].update(old=x["model"].pop("0.bias")),
            "1 keys of the model are absent .* 0.bias; 1 of its keys are not in the model.* old",
        ),
        (
            lambda x: x["model"].update({"0.bias": torch.zeros(5)}),
            r"1 of its keys have another shape .* 0.bias \(5,\) -> \(2,\)",
        ),
        (lambda x: x["model"].clear(), "holds no weights"),
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
