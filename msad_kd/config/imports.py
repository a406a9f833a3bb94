"""Modules of the user's, which register what a config names: data sets, models, losses."""

import argparse
import importlib
import os
import sys

from msad_kd.utils.errors import InputError
from msad_kd.utils.unpickle import TrustFiles

# The modules' names, for this process and those that it starts.
VARIABLE = "MSAD_KD_IMPORT"


def import_module(name: str) -> None:
    """Import a user's module.

    Raises:
        InputError: if there is no such module.
    """
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.split(".")[0] and error.name != name:
            raise  # the module exists, and one that it imports does not
        raise InputError(
            f"--import: there is no module '{name}' in the current folder or on PYTHONPATH"
        ) from error


def import_modules() -> None:
    """Import the modules that ``--import`` named, in this process or in that which started it."""
    for name in os.environ.get(VARIABLE, "").split():
        import_module(name)


class Import(argparse.Action):
    """The option ``--import MODULE`` of a command; it may be given several times."""

    def __init__(self, option_strings, dest, **keywords):
        words = "Python module to import first, so that a config can name what it registers"
        keywords = {"metavar": "MODULE", "help": words, **keywords}
        super().__init__(option_strings, argparse.SUPPRESS, **keywords)

    def __call__(self, parser, namespace, value, option_string=None):
        """Remember the module for ``import_modules``."""
        # A process that is started may have another current folder.
        here, paths = os.getcwd(), os.environ.get("PYTHONPATH", "").split(os.pathsep)
        if here not in paths:
            os.environ["PYTHONPATH"] = os.pathsep.join([here, *filter(None, paths)])
            sys.path.insert(0, here)
        os.environ[VARIABLE] = " ".join([*os.environ.get(VARIABLE, "").split(), value])


def add_code_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--import`` and ``--trust-files``, without which no code but ours and Detectron2's runs.

    Both hold for the processes that a command starts, too.
    """
    parser.add_argument("--import", action=Import)
    parser.add_argument("--trust-files", action=TrustFiles)
