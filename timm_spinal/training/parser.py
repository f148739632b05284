"""A config from the command line and from YAML: ``--config FILE`` gives defaults, and flags win over it.

`parse_config` builds an argparse parser from the fields of a config; flags and YAML keys go through the same
converters. One that is unknown stops with the nearest known one and its help line; what timm's own trainer has beside
the options here stands in `timm_keys.py`.
"""
import argparse
import ast
import dataclasses
import difflib
import sys
import typing
from pathlib import Path
from typing import Any, Collection, Mapping, Sequence, TypeVar

from timm_spinal.arguments import Parser, did_you_mean
from timm_spinal.errors import UserError
from timm_spinal.files import read_yaml

from .config import AUG, LoopConfig, TrainConfig
from .options import Options, convert, kind_of, option_names, to_flag, typed_fields
from .timm_keys import ANY, ARGUMENTS, NOT_OURS, NOT_OURS_IN_VALIDATION, RENAMED, from_timm

ConfigT = TypeVar('ConfigT', bound=Options)


def parse_config(
        argv: Sequence[str] | None = None,
        cls: type[ConfigT] = TrainConfig,  # type: ignore[assignment]
        prog: str | None = None,
        doc: str | None = None,
        positional: str = '',
) -> ConfigT:
    """Read a config from command line arguments.

    Args:
        argv: Arguments without the program's name; ``sys.argv[1:]`` when None.
        cls: Class of the config; it names the command whose options are flags.
        prog: Name of the program in the help text.
        doc: What the help text says before the options.
        positional: Name of an option that is given without a flag, and must be.

    Raises:
        UserError: Unknown flag or key, value of the wrong type or out of its bounds, unreadable YAML, options that
            contradict each other.
    """
    values = vars(_build_parser(cls, prog, doc, positional).parse_args(
        [_dashes(arg) for arg in (sys.argv[1:] if argv is None else argv)]))
    path = values.pop('config', '')
    config = cls(**{**(load_yaml(path, cls) if path else {}), **values})
    check_options(config, given=values)
    return config


def find_config(name: str | Path) -> Path:
    """The file that ``--config`` means: a path, or the name of a file in ``configs``, such as ``finetune``."""
    if Path(name).is_file() or Path(name).is_absolute():
        return Path(name)
    return next((path for path in _configs() if path == _configs_folder() / f'{name}.yaml'), Path(name))


def _configs_folder() -> Path:
    package = Path(__file__).parents[1]
    inside = package / 'configs'
    return inside if inside.is_dir() else package.with_name('configs')  # beside it in a checkout


def _configs() -> list[Path]:
    return sorted(_configs_folder().glob('*.yaml'))


def load_yaml(path: str | Path, cls: type[Options] = TrainConfig) -> dict[str, Any]:
    """Read and check a YAML file of options, as `find_config` finds it; returns the values that it sets.

    Raises:
        UserError: No such file, not a mapping, unknown key, value of the wrong type or out of its bounds.
    """
    near = difflib.get_close_matches(Path(path).stem, [config.stem for config in _configs()], n=1) or ['finetune']
    raw = read_yaml(path, 'config', 'give an existing YAML file to --config, or the name of a file in configs/, such '
                                    f'as {near[0]}', find_config(path))
    fields, values, unknown = typed_fields(cls), {}, []
    for key, value in from_timm(raw, str(path)).items():
        if key in fields:
            try:
                values[key] = convert(value, fields[key])
            except ValueError as e:
                raise UserError(f'config {path}: {key}: {e}') from e
        elif key in NOT_OURS:
            allowed, advice = NOT_OURS[key]
            if allowed is not ANY and value not in allowed:
                raise UserError(f"config {path}: {key}: {value!r} is timm's and not available here; {advice}")
        elif issubclass(cls, LoopConfig) or key not in typed_fields(TrainConfig):
            unknown.append(key)
    if unknown:
        lines = {name: field.metadata['help'] for name, field in fields.items()}
        raise UserError(f'config {path}: {unknown_keys(unknown, lines)}')
    return values


def unknown_keys(unknown: Sequence[Any], known: Mapping[str, str], other: str = 'see --help for all of them') -> str:
    """One message about all unknown keys of a file: each with the nearest known one, or with ``other``.

    Args:
        unknown: The keys.
        known: Known keys, each with its help line, or with '' where it has none.
        other: What to say where none is near.
    """
    return ' '.join(f'unknown key {key!r}; {did_you_mean(str(key), known, other)}' for key in unknown)


# ---- fields to parser -------------------------------------------------------------------------------------------


class _ConfigParser(Parser):
    """The parser of a config: unknown flags that are timm's, or another command's, are told so."""

    def __init__(self, cls: type[Options], prog: str | None, doc: str | None):
        # SUPPRESS: only what was given on the command line comes out, so that it can win over the YAML
        super().__init__(prog=prog, doc=doc, argument_default=argparse.SUPPRESS)
        self.cls = cls

    def unknown_flag(self, flag: str) -> str:
        key, command = flag.lstrip('-').replace('-', '_'), self.cls.command
        field = {**typed_fields(TrainConfig), **typed_fields(self.cls)}.get(key)
        if field is not None and command not in field.metadata['applies_to']:
            if command == 'detection':
                return f'unknown flag {flag}: it belongs to the training of classifiers; leave it out'
            reason = field.metadata['not_frozen'] if command == 'frozen' else ''
            return f'{flag}: has no effect here ({reason or "it belongs to training"}); leave it out'
        if not issubclass(self.cls, LoopConfig) and key in NOT_OURS_IN_VALIDATION:
            return f"flag {flag} is timm's and not available here; {NOT_OURS_IN_VALIDATION[key]}"
        if key in RENAMED:
            return f'unknown flag {flag}; use {to_flag(RENAMED[key])}'
        if key in NOT_OURS:
            return f"flag {flag} is timm's and not available here; {NOT_OURS[key][1]}"
        return super().unknown_flag(flag)

    def unexpected(self, arg: str) -> str:
        if arg.startswith('-'):
            return self.unknown_flag(arg)
        return f'unexpected argument {arg!r}; options are flags, data goes to --data-dir'


def _build_parser(cls: type[Options], prog: str | None, doc: str | None, positional: str) -> Parser:
    parser = _ConfigParser(cls, prog, doc)
    parser.add_argument('-c', '--config', metavar='FILE', help='YAML file of options, or the name of a file in '
                        'configs/, such as finetune, the recipe for your own images; flags override it')
    fields = typed_fields(cls)
    left = {name for name in fields if cls.command in fields[name].metadata['applies_to']} - {positional}
    if positional:
        parser.add_argument(positional, action=_Converted, field=fields[positional],
                            help=fields[positional].metadata['help'])
    # a field that a subclass gives another default stays in its group
    for owner in reversed(cls.__mro__):
        names = [n for n in owner.__dict__.get('__annotations__', {}) if n in left]
        left -= set(names)
        if names:
            group = parser.add_argument_group((owner.__doc__ or owner.__name__).splitlines()[0])
            for name in names:
                _add_flag(group, fields[name])
    return parser


def _add_flag(group: Any, field: dataclasses.Field) -> None:
    kind, optional = kind_of(field.type)
    flag, meta = to_flag(field.name), field.metadata
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
            setattr(namespace, self.dest, convert(values, self.field))
        except ValueError as e:
            raise UserError(f'{option_string or self.dest}: {e}') from e


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


def _dashes(arg: str) -> str:
    """``--batch_size=8`` as ``--batch-size=8``; values stay as they are."""
    if not arg.startswith('--'):
        return arg
    name, sep, value = arg.partition('=')
    return name.replace('_', '-') + sep + value


# ---- options that cannot go together, and names that timm or torch would refuse late or not at all ---------------

_NOT_FOR_RUNS = ('features_only', 'out_indices', 'scriptable', 'exportable', 'device', 'cache_dir')
RESULTS = ('.csv', '.json')  # formats of --results-file


def check_options(config: Options, given: Collection[str] = ()) -> None:
    """Refuse options that contradict each other, before anything is read or written.

    Args:
        config: A config of any command; checks of options that it has not are left out.
        given: Names of the options from the command line, which win over those of a file.

    Raises:
        UserError: Names the options and the way out.
    """
    set_ = _not_default(config)
    # of a file --no-aug may undo these, and args.yaml of such a run has both
    augment = [name for name in option_names(type(config), requires=AUG) if set_.get(name) and name in given]
    if set_.get('no_aug') and augment:
        raise UserError(f'{to_flag(augment[0])} and --no-aug contradict each other; leave one out (--aug undoes a '
                        'no_aug of the config file)')
    if set_.get('bce_loss') and set_.get('loss', 'bce') != 'bce':
        raise UserError(f'--bce-loss and --loss {set_["loss"]} contradict each other; leave one out')
    if set_.get('pretrained_path') and set_.get('initial_checkpoint'):
        raise UserError('--pretrained-path and --initial-checkpoint would both fill the model; leave one out')
    if set_.get('val_split_fraction') and 'val_split' in set_:
        raise UserError(f'--val-split {set_["val_split"]} and --val-split-fraction contradict each other; leave one '
                        'out (--val-split-fraction 0 undoes that of the config file)')
    size = set_.get('input_size')
    for name, same in (('in_chans', size and size[0] == set_.get('in_chans')),
                       ('img_size', size and size[1:] == [set_.get('img_size')] * 2)):
        if size and name in set_ and not same:
            raise UserError(f'{to_flag(name)} {set_[name]} and --input-size {" ".join(map(str, size))} contradict each '
                            'other; leave one out')
    if size and min(size[1:]) < 8:
        raise UserError(f'--input-size {" ".join(map(str, size))}: is too small for an image; give at least 8 pixels')
    _check_kwargs(set_)
    if set_.get('torchcompile'):
        _check_backend(set_['torchcompile'])
    if set_.get('torchcompile_mode') and not set_.get('torchcompile'):
        raise UserError('--torchcompile-mode: nothing is compiled; add --torchcompile')
    if set_.get('early_stop_patience') and set_.get('keep') == 'last':
        raise UserError('--early-stop-patience and --keep last contradict each other: with the second one every '
                        'evaluation is the best so far; leave one out')
    if set_.get('results_file'):
        check_output_file(set_['results_file'], '--results-file', RESULTS)


def check_output_file(path: str | Path, flag: str, suffixes: tuple[str, ...]) -> None:
    """Refuse a file that could not be written at the end.

    Raises:
        UserError: Another suffix, a folder of that name, or a folder around it that is not there.
    """
    path = Path(path)
    if path.suffix not in suffixes:
        raise UserError(f'{flag} {path}: unknown format; name a {" or ".join(suffixes)} file')
    if path.is_dir():
        raise UserError(f'{flag} {path}: is a folder; name a file')
    if not path.absolute().parent.is_dir():
        raise UserError(f'{flag} {path}: there is no folder {path.parent}; make it first')


def _not_default(config: Options) -> dict[str, Any]:
    """The options that were set, to anything but their default."""
    changed = {}
    for f in dataclasses.fields(config):
        default = f.default_factory() if f.default is dataclasses.MISSING else f.default  # type: ignore
        if getattr(config, f.name) != default:
            changed[f.name] = getattr(config, f.name)
    return changed


def _check_kwargs(set_: dict[str, Any]) -> None:
    for option, names in ARGUMENTS.items():
        for name in set_.get(option, {}):
            if name in names:
                raise UserError(f'{to_flag(option)} {name}: use {to_flag(names[name])}')
            if option == 'model_kwargs' and name in _NOT_FOR_RUNS:
                raise UserError(f'--model-kwargs {name}: it is not an option of a classification model; leave it out')


def _check_backend(name: str) -> None:
    from torch import compiler
    if name not in compiler.list_backends(exclude_tags=()):
        known = ', '.join(compiler.list_backends())
        raise UserError(f'--torchcompile {name}: torch has no such backend; it has {known}')
