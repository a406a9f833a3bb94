"""What the processes of a run do together."""

import pytest
from detectron2.utils import comm

from msad_kd.utils.errors import InputError
from msad_kd.utils.processes import in_main_process


def refuse():
    raise InputError("another run is at work")


def test_the_main_process_returns_and_raises():
    assert in_main_process(lambda: 3) == 3
    with pytest.raises(InputError, match="at work"):
        in_main_process(refuse)
    with pytest.raises(KeyError):  # a mistake of the program keeps its traceback
        in_main_process(lambda: {}["key"])


@pytest.mark.parametrize(("sent", "error"), [((3, None), None), ((None, "at work"), "at work")])
def test_the_others_hear_of_it(monkeypatch, sent, error):
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    monkeypatch.setattr(comm, "all_gather", lambda data: [sent, data])
    if error is None:
        assert in_main_process(refuse) == 3
    else:
        with pytest.raises(InputError, match=error):
            in_main_process(refuse)
