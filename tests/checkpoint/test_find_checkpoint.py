"""Which checkpoint a run is resumed from when some are damaged, missing or not what they seem."""

import logging
import os
import pickle
import re
from pathlib import Path

import pytest
from checkpoints import FINAL, ONE, THREE, new_checkpointer, resumed, save

from msad_kd.checkpoint.checkpointer import find_checkpoint
from msad_kd.utils.errors import InputError


def damage(path, checked):
    """Cut off the end of a checkpoint, and delete its checksum unless it is ``checked``."""
    path.write_bytes(path.read_bytes()[:-1])
    if not checked:
        Path(f"{path}.sha256").unlink()


@pytest.mark.parametrize("checked", [True, False], ids=["checksum", "no checksum"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(run, checked, caplog):
    fault = "has changed since it was written" if checked else "for resuming cannot be read"
    for name, before in ((FINAL, 5), ("model_0000005.pth", 3)):
        damage(run / name, checked)
        caplog.clear()
        assert resumed(run) == before
        assert f"{name}' {fault}" in caplog.text and "' is used" in caplog.text
    for name in (ONE, THREE):
        damage(run / name, checked)
    with pytest.raises(
        InputError, match=f"no checkpoint in .*{FINAL}.*; 2 more .*without --resume"
    ):
        resumed(run)


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
