"""Give an object or a module other attributes for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(target: Any, **attributes: Any) -> Iterator[None]:
    """Let an object or a module have these attributes; afterwards it is as it was before.

    What its class has is hidden, not changed. Of a ``nn.Module``, parameters, buffers and
    submodules are no such attributes.
    """
    own = vars(target)
    before = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            own.pop(name, None)
        own.update(before)
