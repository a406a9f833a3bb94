"""What the processes of a run do together, and the files that they may open."""

import resource
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from detectron2.utils import comm

from msad_kd.utils.errors import InputError

T = TypeVar("T")


def in_main_process(function: Callable[[], T]) -> T:
    """Call a function in the main process, and return what it returns in all of them.

    Every process has to call this.

    Raises:
        InputError: in all processes, if the function raises it.
    """
    result, message = None, None
    if comm.is_main_process():
        try:
            result = function()
        except InputError as error:
            message = str(error)
    result, message = comm.all_gather((result, message))[0]
    if message is not None:
        raise InputError(message)
    return result


def keep_many_files_open() -> None:
    """Raise the limit of open files: a tensor that a loader's worker hands over is one or two."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(ValueError, OSError):  # where the system allows less than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
