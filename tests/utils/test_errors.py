"""The message of a user's mistake is found, whichever process raised it."""

import pytest
from torch._utils import ExceptionWrapper
from torch.multiprocessing import ProcessRaisedException

from msad_kd.utils.errors import InputError, NotFiniteError, input_error_of


def passed_on(error):
    """An error as a data loader's worker passes it on."""
    try:
        raise error
    except type(error):
        return ExceptionWrapper(where="in worker 0")


def test_in_this_process():
    assert input_error_of(InputError("There is no level p9")) == "There is no level p9"
    assert input_error_of(ValueError("a fault of ours")) is None


def test_in_a_data_loaders_worker():
    with pytest.raises(InputError) as caught:
        passed_on(InputError("image 'a.png' cannot be read")).reraise()
    assert "Traceback" in str(caught.value)
    assert input_error_of(caught.value) == "image 'a.png' cannot be read"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (InputError("KD.SCALE is 3"), "KD.SCALE is 3"),
        (NotFiniteError("a loss is not finite"), "a loss is not finite"),
        (ValueError("a fault of ours"), None),
    ],
)
def test_in_a_launched_process(error, message):
    text = "-- Process 1 terminated:\n" + passed_on(error).exc_msg
    assert input_error_of(ProcessRaisedException(text, 1, 7)) == message
