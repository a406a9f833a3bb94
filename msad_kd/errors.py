"""The error for what a user gave and cannot be used."""

__all__ = ["InputError"]


class InputError(ValueError):
    """A file, config key or level does not do; the message is a sentence saying what to change.

    ``train_net.py`` prints it without a traceback.
    """
