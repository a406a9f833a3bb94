"""Check entries of a config against type annotations, with errors that say what to change.

Known annotations: classes, ``Any``, ``list[X]``, ``tuple[X, ...]``, ``X | None``,
``Literal["a", "b"]`` for allowed values, and ``Annotated[X, check, "words"]`` for a further check,
which the words describe.
"""

import re
import sys
from collections.abc import Iterable
from dataclasses import MISSING, fields
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from msad_kd.utils.errors import InputError, nearest

Count = Annotated[int, lambda x: x > 0, "a whole number above 0"]
WholeNumber = Annotated[int, lambda x: x >= 0, "a whole number of 0 or more"]
NotNegative = Annotated[float, lambda x: x >= 0, "a number of 0 or more"]
# The limits keep squares and quotients finite in fp32.
Positive = Annotated[float, lambda x: 1e-6 <= x <= 1e6, "a number above 0, from 1e-6 to 1e6"]
Share = Annotated[float, lambda x: 0 <= x < 1, "a number from 0 to below 1"]

_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def check_value(value: Any, annotation: Any, key: str) -> None:
    """Check the value of a config key.

    Raises:
        InputError: if it does not fit the annotation; the message says what would.
    """
    if not _fits(value, annotation):
        raise InputError(f"{key} is {value!r}; it should be {_describe(annotation)}")


def yaml_number(value: Any) -> Any:
    """Return the number for text such as 5e-7, also inside a list; other values unchanged.

    YAML 1.1, and so Detectron2's reader, takes only 5.0e-7 and 5.0e+7 for numbers.
    """
    if isinstance(value, (list, tuple)):
        return type(value)(map(yaml_number, value))
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?e[-+]?\d+", value, re.IGNORECASE):
        return float(value)
    return value


def read_fields(
    entry: Any, key: str, name: str, annotations: dict[str, Any], required: Iterable[str] = ()
) -> dict[str, Any]:
    """Return an entry's fields after checking them; numbers that are text become numbers.

    Args:
        entry: what the config holds; it should be a dict.
        key: the config key or file that holds the entry, such as "KD.LOSSES".
        name: what error messages call the entry, such as "stage 1".
        annotations: the type annotation of each known field.
        required: the fields that must be there.

    Raises:
        InputError: if the entry is not a dict, or a field is unknown, missing or of another type.
    """
    if not isinstance(entry, dict):
        raise InputError(f"{key}: {name} should be a dict, not {entry!r}")
    for field in entry:
        if field not in annotations:
            hint = nearest(str(field), annotations)
            known = ", ".join(annotations)
            raise InputError(f"{key}: {name} has no field '{field}'; known: {known}{hint}")
    for field in required:
        if field not in entry:
            raise InputError(f"{key}: {name} needs '{field}', {_describe(annotations[field])}")
    values = {}
    for field, value in entry.items():
        # The value itself for a text that looks like a number.
        fitting = [x for x in (yaml_number(value), value) if _fits(x, annotations[field])]
        if not fitting:
            words = _describe(annotations[field])
            raise InputError(f"{key}: {field} of {name} should be {words}, not {value!r}")
        values[field] = fitting[0]
    return values


def read_dataclass(cls: type, entry: Any, key: str, name: str) -> Any:
    """Return a dataclass made from an entry, checked by its annotations; see ``read_fields``."""
    unset = [f.name for f in fields(cls) if f.default is f.default_factory is MISSING]
    annotations = get_type_hints(cls, include_extras=True)
    return cls(**read_fields(entry, key, name, annotations, unset))


def _fits(value: Any, annotation: Any) -> bool:
    origin, args = get_origin(annotation) or annotation, get_args(annotation)
    if origin is Any:
        return True
    if origin is Annotated:
        return _fits(value, args[0]) and bool(args[1](value))
    if origin in (Union, UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return (type(value), value) in [(type(arg), arg) for arg in args]
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)) or not args:
            return isinstance(value, (list, tuple))
        args = args[:1] * len(value) if origin is list or args[-1] is ... else args
        return len(value) == len(args) and all(map(_fits, value, args))
    if origin in (int, float):  # true is not a number, nor is NaN; a whole number is a number
        return type(value) in (int, origin) and abs(value) <= sys.float_info.max
    return not isinstance(origin, type) or isinstance(value, origin)


def _describe(annotation: Any) -> str:
    origin, args = get_origin(annotation) or annotation, get_args(annotation)
    if origin is Annotated:
        return args[2]
    if origin in (Union, UnionType):
        return " or ".join(_describe(arg) for arg in args if arg is not NoneType)
    if origin is Literal:
        words = [str(arg).lower() if isinstance(arg, bool) else str(arg) for arg in args]
        return ", ".join(words[:-1]) + " or " * (len(words) > 1) + words[-1]
    if origin in (list, tuple) and args:
        count = "" if args[-1] is ... or origin is list else f"{len(args)} "
        return f"a list of {count}{_describe(args[0]).removeprefix('a ')}s"
    return _WORDS.get(origin, "a list" if origin in (list, tuple) else f"a {origin.__name__}")
