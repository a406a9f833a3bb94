"""Configs as flat dicts."""

from typing import Any


def flatten_config(node: dict, prefix: str = "") -> dict[str, Any]:
    """Return the keys of a config, joined by dots, with their values.

    Args:
        node: a config or a nested dict.
        prefix: what every returned key starts with, e.g. "MODEL.".
    """
    flat = {}
    for name, value in node.items():
        nested = isinstance(value, dict)
        flat |= flatten_config(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat
