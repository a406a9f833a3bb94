"""OUTPUT_DIR: it is locked, an old run is moved aside, and what cannot be written to is told."""

import errno
import multiprocessing
import os
import resource
import signal
from pathlib import Path

import pytest
from detectron2.config import CfgNode
from helpers import train_net_main

from msad_kd.engine import run_folder
from msad_kd.engine.run_folder import (
    explain_disk_errors,
    lock_folder,
    make_folder,
    release_folder,
    take_folder,
)
from msad_kd.utils.errors import InputError

RUN = {
    "last_checkpoint": "model_final.pth",
    "model_0000001.pth": "1",
    "model_0000001.pth.sha256": "sum of 1",
    "model_0000003.pth": "2",
    "model_final.pth": "2",
    "model_final.pth.sha256": "sum of 2",
    "model_0000005.pth.part": "half",
    "model_best_ap50.pth": "that of a second BestCheckpointer",
    "metrics.json": "{}",
    "events.out.tfevents.1.host": "",
    "student.pth": "stripped",
    "student.pth.sha256": "sum of student.pth",
}
KEPT = {"config.yaml": "old", "log.txt": "old", "notes.txt": "mine", "model_start.pth": "mine"}
KEPT["model_start.pth.sha256"] = "mine"


def config(folder, **weights):
    cfg = {"OUTPUT_DIR": str(folder), "MODEL": {"WEIGHTS": weights.get("weights", "")}}
    stages = [{"name": "a", "start": weights.get("start", "previous")}]
    cfg["KD"] = {"LADDER": {"STAGES": stages}, "SCALE": 2, "NONE": None}
    return CfgNode(cfg)


@pytest.fixture
def folder(tmp_path):
    """A folder that is unlocked at the end."""
    folder = tmp_path / "run"
    folder.mkdir()
    yield folder
    release_folder(str(folder))


def fill(folder, files):
    for name, text in files.items():
        (folder / name).write_text(text)


def files_in(folder):
    return {x.name: x.read_text() for x in folder.iterdir() if x.is_file() and x.name[0] != "."}


def test_a_fresh_start_moves_the_old_run_aside_and_deletes_nothing(folder, caplog):
    fill(folder, {**RUN, **KEPT})
    for number in (1, 2):
        aside = folder / f"previous_run_{number}"
        assert take_folder(config(folder), resume=False) == str(aside)
        assert f"An old run in '{folder}' was moved to '{aside}'" in caplog.text
        assert files_in(aside) == {**RUN, "config.yaml": "old"}
        assert files_in(folder) == KEPT
        assert take_folder(config(folder), resume=False) is None  # nothing is left to move
        fill(folder, RUN)
    assert files_in(folder / "previous_run_1") == {**RUN, "config.yaml": "old"}


def test_the_old_runs_evaluations_go_with_it(folder):
    fill(folder, RUN)
    found = {"coco_instances_results.json", "instances_predictions.pth"}
    for name in ("inference", "inference_TTA"):
        (folder / name).mkdir()
        # The last is of the data, and evaluators know it already.
        fill(folder / name, dict.fromkeys([*found, "mine_coco_format.json"], name))
    take_folder(config(folder), resume=False)
    for name in ("inference", "inference_TTA"):
        assert {*files_in(folder / "previous_run_1" / name)} == found
        assert {*files_in(folder / name)} == {"mine_coco_format.json"}


@pytest.mark.parametrize(
    ("files", "resume", "moved"),
    [
        ({}, False, False),
        ({"metrics.json": ""}, False, False),  # of a trainer that did not train
        (KEPT, False, False),
        ({"student.pth": "stripped by its owner"}, False, False),
        ({"metrics.json": "{}"}, False, True),
        ({"last_checkpoint": "model_0000009.pth"}, False, True),
        ({"model_0000001.pth": "1"}, False, True),
        ({"DONE": ""}, False, True),  # a ladder's stage
        (RUN, True, False),
        ({"model_0000001.pth": "1", "metrics.json": "{}"}, True, False),
        ({"last_checkpoint": ""}, True, False),  # the checkpointer says what is wrong
        ({"metrics.json": "{}"}, True, True),  # killed before its first checkpoint
    ],
)
def test_what_counts_as_an_old_run(folder, files, resume, moved):
    fill(folder, files)
    assert bool(take_folder(config(folder), resume=resume)) == moved
    assert files_in(folder) == ({} if moved else files)


@pytest.mark.parametrize(
    ("key", "words"), [("weights", "MODEL.WEIGHTS reads"), ("start", "KD.LADDER.STAGES reads")]
)
@pytest.mark.parametrize("name", ["", "/../run"])
@pytest.mark.parametrize("digest", ["", "#sha256=" + "0" * 64])
def test_a_file_that_the_config_reads_is_not_moved(folder, key, words, name, digest):
    fill(folder, RUN)
    cfg = config(folder, **{key: f"{folder}{name}/model_final.pth{digest}"})
    with pytest.raises(InputError, match=f"{words} '.*model_final.pth'.*--resume"):
        take_folder(cfg, resume=False)
    assert files_in(folder) == RUN
    assert take_folder(cfg, resume=True) is None


# ---- The lock ----


def hold(folder, ready):
    """Take a folder, start a process of its own, as a loader does, and wait to be killed."""
    lock_folder(folder)
    if os.fork() == 0:
        signal.alarm(20)
        signal.pause()
    ready.set()
    signal.pause()


def test_two_runs_at_once_are_refused_and_a_killed_one_blocks_nothing(folder):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    other = context.Process(target=hold, args=(str(folder), ready))
    other.start()
    try:
        assert ready.wait(30)
        fill(folder, RUN)
        for resume in (False, True):
            words = f"another run .process {other.pid} on .* is at work in OUTPUT_DIR '{folder}'"
            with pytest.raises(InputError, match=words):
                take_folder(config(folder), resume=resume)
        assert files_in(folder) == RUN
    finally:
        os.kill(other.pid, signal.SIGKILL)  # the process that it started lives on
        other.join()
    take_folder(config(folder), resume=True)
    lock_folder(str(folder))  # in the same process: the run's own parts


def test_a_folder_that_is_released_is_free(folder):
    for _ in range(2):
        lock_folder(str(folder))
        release_folder(str(folder))
        release_folder(str(folder))
        context = multiprocessing.get_context("fork")
        other = context.Process(target=lock_folder, args=(str(folder),))
        other.start()
        other.join()
        assert other.exitcode == 0


def test_a_lock_that_cannot_be_written_is_one_sentence(folder):
    (folder / run_folder.LOCK).mkdir()
    with pytest.raises(InputError, match=f"OUTPUT_DIR '{folder}' cannot be written to"):
        lock_folder(str(folder))


def test_a_file_system_without_locks_is_told(folder, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(run_folder.fcntl, "lockf", unsupported)
    lock_folder(str(folder))
    assert f"OUTPUT_DIR '{folder}' cannot be locked (No locks available)" in caplog.text


# ---- Folders that cannot be written to ----


@pytest.mark.parametrize("flags", [(), ("--resume",), ("--eval-only",)])
@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("", "OUTPUT_DIR is empty"),
        ("{file}", "OUTPUT_DIR '.*file' cannot be written to .File exists"),
        ("{file}/below", "OUTPUT_DIR '.*below' cannot be written to .Not a directory"),
        ("/proc/nowhere", "OUTPUT_DIR '/proc/nowhere' cannot be written to"),
        ("/sys/kernel", "OUTPUT_DIR '/sys/kernel' cannot be written to"),
    ],
)
def test_an_output_dir_that_cannot_be(config_files, tmp_path, output, words, flags):
    (tmp_path / "file").write_text("")
    output = output.format(file=tmp_path / "file")
    with pytest.raises(InputError, match=words):
        train_net_main(*flags, "--config-file", config_files["lr"], "OUTPUT_DIR", output)


@pytest.mark.parametrize("error", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_a_folder_that_is_read_only_or_full(folder, monkeypatch, error):
    def refuse(*_, **__):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(run_folder.tempfile, "TemporaryFile", refuse)
    with pytest.raises(InputError, match=os.strerror(error)):
        make_folder(str(folder))


def test_a_disk_that_is_full_is_one_sentence(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limit[1]))
    try:
        with pytest.raises(InputError, match="nothing can be written .*File too large.*--resume"):
            with explain_disk_errors():
                Path(tmp_path, "metrics.json").write_text("longer than ten bytes")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    with pytest.raises(FileNotFoundError), explain_disk_errors():  # another mistake stays itself
        (tmp_path / "gone").read_text()


def test_the_first_sentence_is_the_one_that_is_told():
    with pytest.raises(InputError, match="the checkpoint"), explain_disk_errors():
        try:
            raise InputError("the checkpoint cannot be written")
        finally:
            try:
                raise KeyError("what an evaluation caught")
            except KeyError:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # noqa: B904
