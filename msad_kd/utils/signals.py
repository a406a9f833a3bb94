"""What a process does when it is asked to end: by a scheduler, torchrun, Ctrl-C or a hang-up."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
EXIT_CODES = tuple(128 + number for number in SIGNALS)  # as a shell counts them


# For so many seconds after a signal, another one counts as the same: schedulers signal a job's
# processes, and wrappers, torchrun and launchers pass the signal on. A second Ctrl-C is meant,
# except in one of several processes of a run.
_deaf = dict.fromkeys(SIGNALS, 2.0) | {signal.SIGINT: 0.0}


def expect_repeated_signals() -> None:
    """Take signals within five seconds as one, because this process is one of several of a run."""
    _deaf.update(dict.fromkeys(SIGNALS, 5.0))


class Stopped(SystemExit):
    """Ends a process that was asked to by a signal, with exit code 128 + its number."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.number = number


def stop(number: int) -> None:
    """Raise ``Stopped``."""
    raise Stopped(number)


def _die(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


@contextmanager
def on_signal(act: Callable[[int], None], again: Callable[[int], None] = _die):
    """Call ``act(number)`` at the first of SIGNALS, and ``again(number)`` at those that follow.

    It does nothing outside the main thread, and for signals that are ignored, as under nohup. The
    handlers that were there before are restored in the end.

    Args:
        act: what to do at the first signal.
        again: what to do at the next ones, but not for a SIGTERM or SIGHUP within two seconds; by
            default the process ends at once, or at a Ctrl-C in a notebook what runs in it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pid, handlers = os.getpid(), {number: signal.getsignal(number) for number in SIGNALS}
    caught = [n for n in SIGNALS if handlers[n] not in (signal.SIG_IGN, None)]
    first = None

    def handle(number, frame):
        nonlocal first
        if os.getpid() != pid:  # a fork: it ends by SIGTERM, see below, or with its parent
            return
        if first is not None:
            if time.monotonic() - first >= _deaf[number]:
                again(number)
            return
        first = time.monotonic()
        if again is _die and signal.SIGINT in caught and not _deaf[signal.SIGINT]:
            # Even where no Python code is run any more. A notebook has to outlive a Ctrl-C.
            default = handlers[signal.SIGINT] if hasattr(sys, "ps1") else signal.SIG_DFL
            signal.signal(signal.SIGINT, default)
        # The signal may have ended the workers of a data loader too, for which torch would raise.
        handlers[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
        act(number)

    global _handled
    _handled += 1
    try:
        for number in caught:
            signal.signal(number, handle)
        yield
    finally:
        _handled -= 1
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)


# Python forgets a signal from between a fork and the first instruction in the child, and a pool
# would wait for ever for a worker that it has ended in that moment. So SIGTERM is held back there.
_handled = 0  # how many ``on_signal`` are at work
_forking = threading.local()


def _before_fork() -> None:
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM} if _handled else ())


def _after_fork_in_parent() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _after_fork_in_child() -> None:
    if _handled and callable(signal.getsignal(signal.SIGTERM)):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)


def heed_parent_alone(parent: int) -> None:
    """Let a worker that reads data ignore SIGINT, and SIGTERM unless its parent sends it.

    Schedulers, torchrun and terminals signal all processes of a run at once. Without its workers, a
    run could not finish its step. The worker ends with its parent, also with one that was killed
    before torch's own watchdog had begun to look.

    Args:
        parent: the parent's process id.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, 1)
        if received and received.si_pid == parent:
            break
    os._exit(0)
