"""One typed config for the trainer and one for validation, read from YAML and flags.

`TrainConfig` is the union of the groups in `options.py` and `distill_options.py`. `parse_config` builds an argparse
parser from its fields: ``--config FILE`` gives defaults, flags win, and both go through the same converters. A key or
flag that is unknown stops with the nearest known one; keys of timm's own trainer that do not exist here are in
`timm_keys.py`.
"""
import argparse
import ast
import dataclasses
import difflib
import math
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence, TypeVar

import yaml

from timm_spinal.arguments import Parser
from timm_spinal.errors import UserError
from timm_spinal.files import read_yaml

from .distill_options import DistillOptions
from .option_checks import check_options
from .options import (
    AugmentOptions,
    AverageOptions,
    DataOptions,
    LoaderOptions,
    ModelOptions,
    ObjectiveOptions,
    OptimizerOptions,
    RunOptions,
    ScheduleOptions,
    option,
)
from .timm_keys import ANY, NOT_OURS, NOT_OURS_IN_VALIDATION, RENAMED, from_timm


# the last base is the first group of fields
@dataclass
class LoopConfig(RunOptions, AverageOptions, ScheduleOptions, OptimizerOptions, LoaderOptions):
    """What the loop depends on, whatever it trains."""


@dataclass
class TrainConfig(LoopConfig, DistillOptions, ObjectiveOptions, AugmentOptions, ModelOptions, DataOptions):
    """Everything that a training run depends on, under the names of timm's ``train.py``."""


@dataclass
class ValidateConfig(LoaderOptions, ModelOptions, DataOptions):
    """Validation"""
    val_split: str = option('validation', 'name of the split to evaluate', flags=('--split',))
    val_num_samples: int | None = option(
        None, 'images in the split, for streamed sources; pairs of multimnist', low=1, flags=('--num-samples',))
    checkpoint: str = option('', 'run folder, checkpoint folder or weights file to evaluate')
    use_ema: bool = option(False, 'evaluate the moving average of the weights')
    crops: int = option(
        1, 'crops of each image: 1, or 10: the corners, the centre and their mirror images, whose probabilities are '
        'averaged', choices=(1, 10))
    results_file: str = option('', 'write the result to this .json or .csv file')


ConfigT = TypeVar('ConfigT', bound=LoopConfig | ValidateConfig)


def parse_config(
        argv: Sequence[str] | None = None,
        cls: type[ConfigT] = TrainConfig,  # type: ignore[assignment]
        prog: str | None = None,
        doc: str | None = None,
) -> ConfigT:
    """Read a config from command line arguments.

    Args:
        argv: Arguments without the program's name; ``sys.argv[1:]`` when None.
        cls: `TrainConfig`, another `LoopConfig` or `ValidateConfig`.
        prog: Name of the program in the help text.
        doc: What the help text says before the options.

    Raises:
        UserError: Unknown flag or key, value of the wrong type or out of its bounds, unreadable YAML, options that
            contradict each other.
    """
    import sys
    argv = [_dashes(arg) for arg in (sys.argv[1:] if argv is None else argv)]
    parser = _build_parser(cls, prog, doc)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [arg for arg in unknown if arg.startswith('--')] or unknown[:1]
        raise UserError('; '.join(_unknown_flag(flag, cls) for flag in flags))
    values = vars(given)
    path = values.pop('config', '')
    config = cls(**{**(load_yaml(path, cls) if path else {}), **values})
    check_options(config, given=values)
    return config


def find_config(name: str | Path) -> Path:
    """The file that ``--config`` means: a path, or the name of a config of ours, such as ``finetune``."""
    if Path(name).is_file() or Path(name).is_absolute():
        return Path(name)
    return next((path for path in _configs() if path == _configs_folder() / f'{name}.yaml'), Path(name))


def _configs_folder() -> Path:
    package = Path(__file__).parents[1]
    inside = package / 'configs'
    return inside if inside.is_dir() else package.with_name('configs')  # beside it in a checkout


def _configs() -> list[Path]:
    return sorted(_configs_folder().glob('*.yaml'))


def load_yaml(path: str | Path, cls: type = TrainConfig) -> dict[str, Any]:
    """Read and check a YAML file of options, as `find_config` finds it; returns the values that it sets.

    Raises:
        UserError: No such file, not a mapping, unknown key, value of the wrong type or out of its bounds.
    """
    near = difflib.get_close_matches(Path(path).stem, [config.stem for config in _configs()], n=1) or ['finetune']
    raw = read_yaml(path, 'config', 'give an existing YAML file to --config, or the name of a config of ours, such as '
                    f'{near[0]}', find_config(path))
    fields, values, unknown = _fields(cls), {}, []
    for key, value in from_timm(raw, str(path)).items():
        if key in fields:
            try:
                values[key] = _convert(value, fields[key])
            except ValueError as e:
                raise UserError(f'config {path}: {key}: {e}') from e
        elif key in NOT_OURS:
            allowed, advice = NOT_OURS[key]
            if allowed is not ANY and value not in allowed:
                raise UserError(f"config {path}: {key}: {value!r} is timm's and not available here; {advice}")
        elif issubclass(cls, LoopConfig) or key not in _fields(TrainConfig):
            unknown.append(key)
    if unknown:
        raise UserError(f'config {path}: {unknown_keys(unknown, fields)}')
    return values


def to_yaml(config: LoopConfig | ValidateConfig) -> str:
    """The whole config as YAML (``args.yaml``); `parse_config` reads it back to an equal config."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, default_flow_style=None)


# ---- fields to parser -------------------------------------------------------------------------------------------


def _fields(cls: type) -> dict[str, dataclasses.Field]:
    hints = typing.get_type_hints(cls)
    fields = {}
    for f in dataclasses.fields(cls):
        f.type = hints[f.name]
        fields[f.name] = f
    return fields


def _build_parser(cls: type, prog: str | None, doc: str | None) -> argparse.ArgumentParser:
    # SUPPRESS: only what was given on the command line comes out, so that it can win over the YAML
    parser = Parser(prog=prog, doc=doc, argument_default=argparse.SUPPRESS)
    parser.add_argument('-c', '--config', metavar='FILE', help='YAML file of options, or the name of a config '
                        'of ours: finetune is the one for your own images; flags win over it')
    fields = _fields(cls)
    left = {name for name in fields if _offers(cls, fields[name])}
    # a field that a subclass gives another default stays in its group
    for owner in reversed(cls.__mro__):
        names = [n for n in owner.__dict__.get('__annotations__', {}) if n in left]
        left -= set(names)
        if names:
            group = parser.add_argument_group((owner.__doc__ or owner.__name__).splitlines()[0])
            for name in names:
                _add_flag(group, fields[name])
    return parser


def _offers(cls: type, field: dataclasses.Field) -> bool:
    """Whether a command has a flag for a field; fields without one are read from a YAML all the same."""
    trains = issubclass(cls, LoopConfig)
    return field.name not in getattr(cls, 'no_effect', ()) and (trains or not field.metadata['training_only'])


def _add_flag(group: Any, field: dataclasses.Field) -> None:
    kind, optional = _kind(field.type)
    flag, meta = '--' + field.name.replace('_', '-'), field.metadata
    default = field.default_factory() if field.default is dataclasses.MISSING else field.default  # type: ignore
    text = meta['help'].replace('%', '%%')
    if kind is bool:
        group.add_argument(flag, *meta['flags'], dest=field.name, action='store_true',
                           help=f'{text} (default: {str(default).lower()})')
        negation = '--' + flag[5:] if flag.startswith('--no-') else '--no-' + flag[2:]
        group.add_argument(negation, dest=field.name, action='store_false', help=argparse.SUPPRESS)
        return
    origin = typing.get_origin(kind)
    kwargs: dict[str, Any] = dict(dest=field.name, metavar=_metavar(kind, meta))
    if origin is dict:
        kwargs.update(nargs='*', action=_KeyValues, field=field)
    elif origin is list:
        kwargs.update(nargs=meta['nargs'] or '+', action=_Converted, field=field)
    elif meta['const'] is not None:
        kwargs.update(nargs='?', const=meta['const'], action=_Converted, field=field)
    else:
        kwargs.update(action=_Converted, field=field)
    shown = '' if default in (None, '', [], {}) else f' (default: {default})'
    group.add_argument(flag, *meta['flags'], help=text + shown, **kwargs)


def _metavar(kind: Any, meta: Any) -> str:
    if meta['choices']:
        return '|'.join(str(c) or "''" for c in meta['choices'])
    if typing.get_origin(kind) is dict:
        return 'K=V'
    item = typing.get_args(kind)[0] if typing.get_origin(kind) is list else kind
    return {int: 'N', float: 'X', str: 'TEXT'}[item]


class _Converted(argparse.Action):
    """Store a value after the same checks that a YAML value gets."""

    def __init__(self, field: dataclasses.Field, **kwargs: Any):
        super().__init__(**kwargs)
        self.field = field

    def __call__(self, parser, namespace, values, option_string=None):
        try:
            setattr(namespace, self.dest, _convert(values, self.field))
        except ValueError as e:
            raise UserError(f'{option_string}: {e}') from e


class _KeyValues(_Converted):
    """``key=value`` pairs; values are Python literals where they can be, else strings (as timm's ParseKwargs)."""

    def __call__(self, parser, namespace, values, option_string=None):
        pairs = {}
        for item in values:
            key, sep, text = item.partition('=')
            if not sep:
                raise UserError(f'{option_string}: {item!r} is not of the form key=value; write {item}=VALUE')
            try:
                pairs[key] = ast.literal_eval(text)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                pairs[key] = {'true': True, 'false': False, 'none': None}.get(text.lower(), text)
        super().__call__(parser, namespace, pairs, option_string)


# ---- values -----------------------------------------------------------------------------------------------------


def _kind(hint: Any) -> tuple[Any, bool]:
    """The type of a field without None, and whether None is allowed."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        args = [a for a in typing.get_args(hint) if a is not type(None)]
        return args[0], True
    return hint, False


def _convert(value: Any, field: dataclasses.Field) -> Any:
    """A value from YAML or the command line as the type of its field; ValueError says what is wrong with it."""
    kind, optional = _kind(field.type)
    meta = field.metadata
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
        if meta['ordered'] and converted != sorted(converted):
            raise ValueError(f'{converted} falls; write the smaller value first')
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
    low, high, above = meta['low'], meta['high'], meta['above']
    if kind is int:  # what C code below takes
        low, high = -2 ** 31 if low is None else low, 2 ** 31 - 1 if high is None else high
    if low is not None and converted < low:
        raise ValueError(f'{value!r} is too small; give at least {low:.10g}')
    if above is not None and converted <= above:
        raise ValueError(f'{value!r} is too small; give more than {above:g}')
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


# ---- names ------------------------------------------------------------------------------------------------------


def _dashes(arg: str) -> str:
    """``--batch_size=8`` as ``--batch-size=8``; values stay as they are."""
    if not arg.startswith('--'):
        return arg
    name, sep, value = arg.partition('=')
    return name.replace('_', '-') + sep + value


def _unknown_flag(arg: str, cls: type) -> str:
    if not arg.startswith('-'):
        return f'unexpected argument {arg!r}; options are flags, data goes to --data-dir'
    flag = arg.partition('=')[0]
    key = flag.lstrip('-').replace('-', '_')
    no_effect = getattr(cls, 'no_effect', {})
    if key in no_effect or key in _fields(TrainConfig) and not issubclass(cls, LoopConfig):
        return f'{flag}: has no effect here ({no_effect.get(key, "it belongs to training")}); leave it out'
    if not issubclass(cls, LoopConfig) and key in NOT_OURS_IN_VALIDATION:
        return f"flag {flag} is timm's and not available here; {NOT_OURS_IN_VALIDATION[key]}"
    if key in RENAMED:
        return f'unknown flag {flag}; use --{RENAMED[key].replace("_", "-")}'
    if key in NOT_OURS:
        return f"flag {flag} is timm's and not available here; {NOT_OURS[key][1]}"
    names = [name.replace('_', '-') for name, field in _fields(cls).items() if _offers(cls, field)]
    return f'unknown flag {flag}; {_nearest(flag.lstrip("-"), names, "--")}'


def unknown_keys(unknown: Sequence[Any], known: typing.Iterable[str], other: str = 'see --help for all of them') -> str:
    """One message about all unknown keys of a file: each with the nearest known one, or with ``other``."""
    known = list(known)
    return ' '.join(f'unknown key {key!r}; {_nearest(str(key), known, other=other)}' for key in unknown)


def _nearest(
        name: str,
        known: typing.Iterable[str],
        prefix: str = '',
        other: str = 'see --help for all of them',
) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f'did you mean {prefix}{close[0]}?' if close else other
