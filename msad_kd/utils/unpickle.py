"""Reading pickles without running the code that a file may hold."""

_trusted = False


def trust_files() -> None:
    """Let the files that this process reads run code from now on (``--trust-files``)."""
    global _trusted
    _trusted = True


def trusted() -> bool:
    """Return whether ``trust_files`` was called in this process."""
    return _trusted
