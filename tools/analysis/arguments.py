"""Build and run the command lines of these tools."""

import argparse
from pathlib import Path

from msad_kd.checkpoint.files import write_json
from msad_kd.config.imports import add_code_options
from msad_kd.utils.arguments import positive as positive  # the tools import it from here
from msad_kd.utils.errors import InputError, in_one_sentence


def parser_for(doc, config_help):
    """Return the parser of a tool that measures models of a config.

    Args:
        doc: the tool's docstring, whose first line becomes the description.
        config_help: what the config is of.
    """
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--config-file", required=True, help=config_help)
    parser.add_argument("--json", help="also write the numbers to this file")
    parser.add_argument("opts", nargs="*", help="KEY VALUE pairs on top of the config")
    return parser


def run(parser, main, arguments=None):
    """Return what ``main`` returns for a command line; an expected error ends it in one sentence.

    Args:
        parser: the parser.
        main: it takes the parsed arguments.
        arguments: the words of the command line; by default those of this process.
    """
    add_code_options(parser)
    args = parser.parse_args(arguments)
    with in_one_sentence(parser.prog):
        return main(args)


def check_target(path):
    """Check, before what takes long, that a file can be written; ``path`` may be None.

    Raises:
        InputError: if it is a folder.
    """
    if path is not None and Path(path).is_dir():
        raise InputError(f"'{path}' is a folder; name a file to write")


def report(parser, measure, markdown, arguments=None):
    """Run the command line of a parser from ``parser_for``: measure, print and write the result.

    Args:
        parser: the parser.
        measure: it takes the parsed arguments, and returns what is written as JSON.
        markdown: it takes that, and returns the text that is printed.
        arguments: as in ``run``.
    """

    def main(args):
        check_target(args.json)
        result = measure(args)
        print(f"\n{markdown(result)}")
        if args.json:
            write_json(args.json, result)

    run(parser, main, arguments)
