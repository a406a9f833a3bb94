"""Handlers of signals, in small processes."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from signal import SIGHUP, SIGINT, SIGTERM

import pytest
import torch
import torch.utils.data as torchdata
from helpers import ROOT

from msad_kd.utils.signals import Stopped, heed_parent_alone, on_signal, stop

# Loads the module alone, as importing the package takes seconds.
PROGRAM = f"""
import importlib.util, signal, sys, time
spec = importlib.util.spec_from_file_location("s", {str(ROOT / "msad_kd/utils/signals.py")!r})
s = importlib.util.module_from_spec(spec)
spec.loader.exec_module(s)
{{before}}
with s.on_signal({{act}}):
    print("ready", flush=True)
    time.sleep({{seconds}})
"""
NOTE = "lambda n: print('noted', flush=True)"


@pytest.mark.parametrize(
    ("before", "act", "sent", "code"),
    [
        ("", "s.stop", [SIGTERM], 143),
        ("", "s.stop", [SIGINT], 130),
        ("", "s.stop", [SIGHUP], 129),
        ("", NOTE, [SIGTERM, SIGTERM], 0),  # a wrapper has passed it on
        ("", NOTE, [SIGTERM, SIGINT], -2),
        ("s._deaf[signal.SIGTERM] = 0.0", NOTE, [SIGTERM, SIGTERM], -15),  # one that came later
        ("s._deaf[signal.SIGTERM] = 0.0", NOTE, [SIGINT, SIGTERM], -15),
        ("sys.ps1 = ''", NOTE, [SIGINT, SIGINT], -2),  # a notebook: KeyboardInterrupt
        ("s.expect_repeated_signals()", NOTE, [SIGTERM, SIGTERM], 0),
        ("signal.signal(signal.SIGHUP, signal.SIG_IGN)", "s.stop", [SIGHUP], 0),
    ],
)
def test_the_first_signal_is_handled_and_the_second_ends_the_process(before, act, sent, code):
    def heed_signals():  # which nohup and shells that start it in the background ignore
        signal.signal(SIGINT, signal.default_int_handler)
        signal.signal(SIGHUP, signal.SIG_DFL)

    program = PROGRAM.format(before=before, act=act, seconds=60 if code else 3)
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_signals,
    )
    for number in sent:
        assert process.stdout.readline()
        process.send_signal(number)
    assert process.wait(10) == code
    errors = process.stderr.read()
    assert "KeyboardInterrupt" in errors if "ps1" in before else errors == ""


def test_handlers_are_restored_and_other_threads_have_none():
    before = [signal.getsignal(n) for n in (SIGTERM, SIGINT, signal.SIGCHLD)]
    with pytest.raises(Stopped) as stopped, on_signal(stop):
        os.kill(os.getpid(), SIGTERM)
    assert stopped.value.code == 143 and isinstance(stopped.value, SystemExit)
    ran = []

    def elsewhere():
        with on_signal(stop):
            ran.append(True)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    after = [signal.getsignal(n) for n in (SIGTERM, SIGINT, signal.SIGCHLD)]
    assert ran and after == before


def test_a_forked_process_ends_when_its_parent_asks_it_to():
    """Also if it asks at once: pools do, and Python forgets a signal from before the first step."""
    context = multiprocessing.get_context("fork")
    codes = []
    with on_signal(stop):
        for wait in [0.2] + [0.0] * 20:
            process = context.Process(target=time.sleep, args=(60,))
            process.start()
            time.sleep(wait)
            process.terminate()
            process.join(5)
            codes.append(process.exitcode)
            process.kill()
    assert codes == [-SIGTERM] * 21
    assert SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


class Pids(torchdata.Dataset):
    def __len__(self):
        return 100

    def __getitem__(self, index):
        return os.getpid()


def test_the_workers_of_a_loader_outlive_the_signals_of_others():
    loader = torchdata.DataLoader(
        Pids(),
        batch_size=None,
        num_workers=1,
        worker_init_fn=partial(lambda parent, _: heed_parent_alone(parent), os.getpid()),
        generator=torch.Generator(),
    )
    batches = iter(loader)
    (worker,) = {next(batches) for _ in range(3)}
    for number in ("INT", "TERM", "TERM"):
        subprocess.run(["/bin/sh", "-c", f"kill -{number} {worker}"], check=True)
    assert {*batches} == {worker}  # all of the others
    batches = iter(loader)
    worker = next(batches)
    batches._workers[0].terminate()  # as multiprocessing does when this process ends
    batches._workers[0].join(5)
    assert batches._workers[0].exitcode == 0 and worker


def test_a_worker_ends_whose_parent_has_gone_already():
    context = multiprocessing.get_context("fork")

    def work():
        heed_parent_alone(parent=1 << 22)  # a process that is not its parent
        time.sleep(60)

    process = context.Process(target=work)
    process.start()
    process.join(10)
    assert process.exitcode == 0
