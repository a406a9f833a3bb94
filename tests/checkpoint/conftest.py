"""The fixture of the tests with payloads."""

from payloads import bomb  # noqa: F401
