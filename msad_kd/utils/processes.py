"""What the processes of a run do together."""

from collections.abc import Callable
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
