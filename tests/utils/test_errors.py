"""A user's mistake is told in its sentence, whichever process found it."""

import pytest
from torch._utils import ExceptionWrapper
from torch.multiprocessing import ProcessRaisedException

from msad_kd.utils.errors import InputError, input_error_of


def traceback_of(error):
    """The text that another process hands on."""
    try:
        raise error
    except type(error):
        return ExceptionWrapper(where="in worker 0")


def test_of_this_process():
    assert input_error_of(InputError("There is no level p9")) == "There is no level p9"


def test_of_a_data_loaders_worker():
    with pytest.raises(InputError) as caught:
        traceback_of(InputError("image 'a.png' cannot be read")).reraise()
    assert "Traceback" in str(caught.value)
    assert input_error_of(caught.value) == "image 'a.png' cannot be read"


def test_of_a_launched_process():
    text = "-- Process 1 terminated:\n" + traceback_of(InputError("KD.SCALE is 3")).exc_msg
    assert input_error_of(ProcessRaisedException(text, 1, 7)) == "KD.SCALE is 3"


def test_another_error_is_none():
    assert input_error_of(ValueError("some fault of ours")) is None
    text = traceback_of(ValueError("some fault of ours")).exc_msg
    assert input_error_of(ProcessRaisedException(text, 1, 7)) is None
