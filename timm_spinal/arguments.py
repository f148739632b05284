"""What all verbs of the command line share: help from the docstring, bad arguments in one line, bounds of numbers."""
import argparse
import difflib
import math
import sys
from typing import Any, Callable, Mapping, NoReturn, Sequence

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

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's, but flags that do not exist are named before anything else is found wrong."""
        args = list(sys.argv[1:] if args is None else args)
        if unknown := self._unknown_flags(args):
            raise UserError('; '.join(map(self.unknown_flag, unknown)))
        values, rest = self.parse_known_args(args, namespace)
        if rest:
            raise UserError(self.unexpected(rest[0]))
        return values

    def _unknown_flags(self, args: list[str]) -> list[str]:
        known = {flag for action in self._actions for flag in action.option_strings}
        before = args[:args.index('--')] if '--' in args else args
        if {'-h', '--help'} & set(before):
            return []
        flags = [arg.partition('=')[0] for arg in before if arg.startswith('--') and ' ' not in arg]
        return [flag for flag in flags if flag not in known]

    def unknown_flag(self, flag: str) -> str:
        """What to say of a flag that does not exist: the nearest one, with its help line."""
        lines = {
            name.removeprefix('--'): ' '.join((action.help % {**vars(action), 'prog': self.prog}).split())
            for action in self._actions if action.help and action.help is not argparse.SUPPRESS
            for name in action.option_strings if name.startswith('--')}
        return f'unknown flag {flag}; {did_you_mean(flag.lstrip("-"), lines, f"see {self.prog} --help", "--")}'

    def unexpected(self, arg: str) -> str:
        """What to say of an argument that no option takes."""
        return f'unexpected argument {arg!r}; see {self.prog} --help'

    def error(self, message: str) -> NoReturn:
        raise UserError(f'{message.removeprefix("argument ")}; see {self.prog} --help')


def did_you_mean(name: str, known: Mapping[str, str], other: str, prefix: str = '') -> str:
    """A question for the known name that an unknown one is nearest to, or ``other`` where none is near.

    Args:
        name: What does not exist.
        known: What does: name -> help line, which is shown where there is one. Several words with which help lines
            begin mean the shortest name of those.
        other: What to say in place of the question.
        prefix: Of known names, for the message.
    """
    words = name.replace('-', ' ').replace('_', ' ')
    near = sorted((key for key, line in known.items() if ' ' in words and line.startswith(words)), key=len)
    near = near or difflib.get_close_matches(name, known, n=1)
    if not near:
        return other
    line = known[near[0]]
    return f'did you mean {prefix}{near[0]}{": " if line else ""}{line}?'


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
