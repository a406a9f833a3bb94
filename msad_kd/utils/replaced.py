"""Give an object or a module other attributes for a while."""

from typing import Any


class replaced:  # noqa: N801  it reads as a function, as contextlib's context managers do
    """Lets an object or a module have these attributes; afterwards it is as it was before.

    What its class has is hidden, not changed. Of a ``nn.Module``, parameters, buffers and
    submodules are no such attributes. It may be entered again after it was left.
    """

    def __init__(self, target: Any, **attributes: Any):
        self.target, self.attributes = target, attributes

    def __enter__(self) -> None:
        own = vars(self.target)
        self.before = {name: own[name] for name in self.attributes if name in own}
        own.update(self.attributes)

    def __exit__(self, *exception: Any) -> None:
        own = vars(self.target)
        for name in self.attributes:
            own.pop(name, None)
        own.update(self.before)
