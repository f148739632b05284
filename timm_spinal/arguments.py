"""What all verbs of the command line share: help from the docstring, bad arguments in one line, bounds of numbers."""
import argparse
import math
from typing import Any, Callable, NoReturn

from timm_spinal.errors import UserError


class Parser(argparse.ArgumentParser):
    """The parser of a verb. Bad arguments are one line, and ``--debug`` is always there.

    Args:
        prog: The verb, such as ``timm-spinal plot``.
        doc: The help text before the options: a sentence, and examples.
        kwargs: As for argparse.

    Raises:
        UserError: By `parse_args`, for arguments that are wrong.
    """

    def __init__(self, prog: str | None = None, doc: str | None = None, **kwargs: Any):
        super().__init__(
            prog=prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
            **kwargs)
        if kwargs.get('argument_default') is not argparse.SUPPRESS:  # the trainer's own parser has it among its options
            self.add_argument('--debug', action='store_true', help='show the traceback of an error')

    def error(self, message: str) -> NoReturn:
        raise UserError(f'{message.removeprefix("argument ")}; see {self.prog} --help')


def number(kind: type = int, low: float | None = 1, high: float | None = None) -> Callable[[str], Any]:
    """The ``type`` of an argument that is a finite number within inclusive bounds."""
    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f'{text!r} is not a {"whole" if kind is int else "finite"} number')
        if low is not None and value < low:
            raise argparse.ArgumentTypeError(f'must be at least {low:g}, got {text}')
        if high is not None and value > high:
            raise argparse.ArgumentTypeError(f'must be at most {high:g}, got {text}')
        return value

    return convert
