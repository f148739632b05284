"""What an option is: a dataclass field whose metadata say all that the package knows of it.

The parser, the checks of a resumed run, cards and comparisons read the metadata and keep no lists of names. `convert`
turns a value from YAML or the command line into one of the option's type.
"""
import math
import re
import types
import typing
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar, Literal

OnResume = Literal['fixed', 'told', 'silent']
Command = Literal['training', 'validation', 'frozen', 'detection']
COMMANDS: tuple[Command, ...] = typing.get_args(Command)


def option(
        default: Any,
        help: str,
        *,
        choices: tuple = (),
        low: float | None = None,
        high: float | None = None,
        greater_than: float | None = None,
        ascending: bool = False,
        flags: tuple[str, ...] = (),
        const: Any = None,
        nargs: int | None = None,
        path: bool = False,
        on_resume: OnResume | None = None,
        changes_result: bool | None = None,
        recipe: bool | None = None,
        applies_to: tuple[Command, ...] | None = None,
        not_frozen: str | None = None,
        requires: tuple[str, ...] = (),
) -> Any:
    """A dataclass field, and in its metadata what the option means; to be used in a subclass of `Options`.

    Args:
        default: Value where none is given.
        help: Text for ``--help``.
        choices: The values that there are.
        low: Least value, of a list that of each item.
        high: Greatest value.
        greater_than: Bound that the value must exceed.
        ascending: No item of a list may be smaller than the one before it.
        flags: Further spellings of the flag.
        const: Value of the flag without a value.
        nargs: Number of items of a list.
        path: The value names a file or a folder, or may do so.
        on_resume: What happens when a run is resumed with another value. 'fixed': it is refused, because the model, the
            data or the kind of optimizer state would be another; 'told' (the default): one line says so; 'silent':
            nothing is said.
        changes_result: Whether another value may give other weights; by default unless ``on_resume`` is 'silent'.
        recipe: Whether others need it to repeat the run, so that it stands on the card: the default. False for what
            belongs to one machine or one start.
        applies_to: The commands on which it has an effect: 'training' of a classifier, 'validation', 'frozen' (the
            comparison of heads on frozen features), 'detection'. A command whose config has the option all the same
            offers no flag for it.
        not_frozen: Why it has no effect on frozen features.
        requires: Options without which it has no effect, as ``name`` or ``name=value``.
    """
    metadata = {name: value for name, value in locals().items() if name != 'default'}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Options:
    """Base of the groups of options, and of the configs that are made of them.

    Keyword arguments of a class statement are arguments of `option` for those of its options that do not have them
    themselves. A config names its ``command``, which its own options apply to.
    """
    command: ClassVar[Command | None] = None

    def __init_subclass__(cls, command: Command | None = None, **shared: Any) -> None:
        super().__init_subclass__()
        if command is not None:
            cls.command = command
        applies_to = (command,) if command else COMMANDS
        shared = dict(on_resume='told', recipe=True, applies_to=applies_to, not_frozen='') | shared
        for f in vars(cls).values():
            if isinstance(f, Field):
                meaning = {**f.metadata, **shared, **{k: v for k, v in f.metadata.items() if v is not None}}
                if meaning['changes_result'] is None:
                    meaning['changes_result'] = meaning['on_resume'] != 'silent'
                f.metadata = types.MappingProxyType(meaning)


def with_default(owner: type[Options], name: str, default: Any, **changes: Any) -> Any:
    """An option of another group with another default, for a subclass that means the same by it.

    Args:
        owner: The dataclass that has the option.
        name: Its name.
        default: The default here.
        changes: Other arguments of `option` that are different here.
    """
    metadata = next(f.metadata for f in fields(owner) if f.name == name)
    return option(default, **{**metadata, **changes})


def option_names(cls: type[Options], **meaning: Any) -> tuple[str, ...]:
    """Names of the options of a config or group that have a meaning, in their order.

    Args:
        cls: The dataclass.
        meaning: Arguments of `option` and their values; of a tuple, such as ``requires``, one item.
    """
    def has(metadata: Any, key: str, value: Any) -> bool:
        return value in metadata[key] if isinstance(metadata[key], tuple) else metadata[key] == value

    return tuple(f.name for f in fields(cls) if all(has(f.metadata, k, v) for k, v in meaning.items()))


def to_flag(name: str) -> str:
    """An option's name as it stands on the command line."""
    return '--' + name.replace('_', '-')


def typed_fields(cls: type[Options]) -> dict[str, Field]:
    """The fields of a config by name, each with its type resolved."""
    hints = typing.get_type_hints(cls)
    typed = {}
    for f in fields(cls):
        f.type = hints[f.name]
        typed[f.name] = f
    return typed


def kind_of(hint: Any) -> tuple[Any, bool]:
    """The type of an option without None, and whether None is allowed."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        args = [a for a in typing.get_args(hint) if a is not type(None)]
        return args[0], True
    return hint, False


def convert(value: Any, option: Field) -> Any:
    """A value from YAML or the command line as the type of an option; ValueError says what is wrong with it."""
    kind, optional = kind_of(option.type)
    meta = option.metadata
    if value is None and optional:
        return None
    if value is True and meta['const'] is not None:
        return meta['const']
    if typing.get_origin(kind) is dict:
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise ValueError(f'{value!r} is not a mapping; write key: value pairs')
        return {str(k): _literal(v) for k, v in value.items()}
    if typing.get_origin(kind) is list:
        items = [] if value is None else value if isinstance(value, (list, tuple)) else [value]
        if meta['nargs'] and len(items) != meta['nargs']:
            raise ValueError(f'has {len(items)} values; give {meta["nargs"]}')
        item_type = typing.get_args(kind)[0]
        converted = [_convert_one(v, item_type, meta) for v in items]
        if meta['ascending'] and converted != sorted(converted):
            raise ValueError(f'{converted} is in falling order; write the smaller value first')
        return converted
    return _convert_one(value, kind, meta)


def _convert_one(value: Any, kind: Any, meta: Any) -> Any:
    try:
        converted = _CONVERTERS[kind](value)
    except (TypeError, ValueError, OverflowError) as e:
        raise ValueError(f'{_short(value)} is not {_TYPE_NAMES[kind]}') from e
    if meta['choices'] and converted not in meta['choices']:
        known = ', '.join(repr(c) if c == '' else str(c) for c in meta['choices'])
        raise ValueError(f'{_short(value)} is not one of {known}')
    low, high, bound = meta['low'], meta['high'], meta['greater_than']
    if kind is int:  # what C code below takes
        low, high = -2 ** 31 if low is None else low, 2 ** 31 - 1 if high is None else high
    if low is not None and converted < low:
        raise ValueError(f'{value!r} is too small; give at least {low:.10g}')
    if bound is not None and converted <= bound:
        raise ValueError(f'{value!r} is too small; give more than {bound:g}')
    if high is not None and converted > high:
        raise ValueError(f'{_short(value)} is too large; give at most {high:.10g}')
    return converted


def _short(value: Any, most: int = 40) -> str:
    text = repr(value)
    return text if len(text) <= most else f'{text[:most]}...'


def _to_int(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError
    return int(value)


def _to_float(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(number := float(value)):
        raise ValueError
    return number


def _to_bool(value: Any) -> bool:
    if isinstance(value, str):
        value = _TRUTH.get(value.lower(), value)
    if not isinstance(value, bool):
        raise ValueError
    return value


def _to_str(value: Any) -> str:
    if value is None:
        return ''
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError
    return str(value)


def _literal(value: Any) -> Any:
    """A value of ``key: value`` pairs, which have no type of their own: 1e-3, a text in YAML, is a number."""
    if isinstance(value, str) and re.fullmatch(r'[-+]?[0-9.]+[eE][-+]?[0-9]+', value):
        return float(value)
    return value


_TRUTH = {'true': True, 'false': False, 'yes': True, 'no': False, 'on': True, 'off': False}
_CONVERTERS: dict[Any, Any] = {int: _to_int, float: _to_float, bool: _to_bool, str: _to_str}
_TYPE_NAMES = {int: 'a whole number', float: 'a finite number', bool: 'true or false', str: 'a text'}
