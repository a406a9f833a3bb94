"""What a process does when it is asked to end: by a scheduler, torchrun, Ctrl-C or a hang-up."""

import os
import signal
import threading
from collections.abc import Callable
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
EXIT_CODES = tuple(128 + number for number in SIGNALS)  # as a shell counts them


class Stopped(SystemExit):
    """Ends a process that was asked to by a signal, with exit code 128 + its number."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.number = number


def stop(number: int) -> None:
    """Raise ``Stopped``."""
    raise Stopped(number)


@contextmanager
def on_signal(act: Callable[[int], None]):
    """Call ``act(number)`` at the first of SIGNALS; a second one ends the process at once.

    It does nothing outside the main thread, and for signals that are ignored, as under nohup. The
    handlers that were there before are restored in the end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pid, handlers = os.getpid(), {number: signal.getsignal(number) for number in SIGNALS}
    caught = [n for n in SIGNALS if handlers[n] not in (signal.SIG_IGN, None)]

    def handle(number, frame):
        if os.getpid() != pid:  # a fork: a data loader's worker ends with its parent
            return
        for other in caught:
            signal.signal(other, signal.SIG_DFL)
        # The signal may have ended the workers of a data loader too, for which torch would raise.
        handlers[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
        act(number)

    try:
        for number in caught:
            signal.signal(number, handle)
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)


def heed_parent_alone() -> None:
    """Let a data loader's worker ignore SIGINT, and SIGTERM unless its parent sends it.

    Schedulers, torchrun and terminals signal all processes of a run at once. Without its workers, a
    run could not finish its step.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
