"""Options that cannot go together, and names that timm or torch would refuse late or not at all."""
import dataclasses
from pathlib import Path
from typing import Any, Collection

from timm_spinal.errors import UserError

# arguments of timm's models that are options of their own
_MODEL_ARGUMENTS = {
    'num_classes': 'num_classes', 'in_chans': 'in_chans', 'img_size': 'img_size', 'input_size': 'input_size',
    'global_pool': 'gp', 'drop_rate': 'drop', 'drop_path_rate': 'drop_path', 'drop_block_rate': 'drop_block',
    'pretrained': 'pretrained', 'pretrained_cfg': 'pretrained_path', 'pretrained_cfg_overlay': 'pretrained_path',
    'checkpoint_path': 'initial_checkpoint', 'model_name': 'model', 'dtype': 'mixed_precision',
}
_NOT_FOR_RUNS = ('features_only', 'out_indices', 'scriptable', 'exportable', 'device', 'cache_dir')
RESULTS = ('.csv', '.json')  # formats of --results-file
# what --no-aug switches off
AUGMENTATION = (
    'aa', 'train_crop_mode', 'scale', 'ratio', 'hflip', 'vflip', 'rotation', 'perspective', 'color_jitter',
    'color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob', 'reprob', 'aug_repeats',
)


def check_options(config: Any, given: Collection[str] = ()) -> None:
    """Refuse options that contradict each other, before anything is read or written.

    Args:
        config: A config of any command; checks of options that it has not are left out.
        given: Names of the options from the command line, which win over those of a file.

    Raises:
        UserError: Names the options and the way out.
    """
    set_ = _not_default(config)
    # of a file --no-aug may undo these, and args.yaml of such a run has both
    augment = [name for name in AUGMENTATION if set_.get(name) and name in given]
    if set_.get('no_aug') and augment:
        raise UserError(f'{_flag(augment[0])} and --no-aug contradict each other; leave one out (--aug undoes a no_aug '
                        'of the config file)')
    if set_.get('bce_loss') and set_.get('loss', 'bce') != 'bce':
        raise UserError(f'--bce-loss and --loss {config.loss} contradict each other; leave one out')
    if set_.get('pretrained_path') and set_.get('initial_checkpoint'):
        raise UserError('--pretrained-path and --initial-checkpoint would both fill the model; leave one out')
    if set_.get('val_split_fraction') and 'val_split' in set_:
        raise UserError(f'--val-split {config.val_split} and --val-split-fraction contradict each other; leave one out '
                        '(--val-split-fraction 0 undoes that of the config file)')
    size = set_.get('input_size')
    for name, same in (('in_chans', size and size[0] == config.in_chans),
                       ('img_size', size and size[1:] == [config.img_size] * 2)):
        if size and name in set_ and not same:
            raise UserError(f'{_flag(name)} {set_[name]} and --input-size {" ".join(map(str, size))} contradict each '
                            'other; leave one out')
    if size and min(size[1:]) < 8:
        raise UserError(f'--input-size {" ".join(map(str, size))}: is too small for an image; give at least 8 pixels')
    _check_model_kwargs(set_.get('model_kwargs', {}))
    _check_optimizer_kwargs(config, set_.get('opt_kwargs', {}))
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


def _not_default(config: Any) -> dict[str, Any]:
    """The options that were set, to anything but their default."""
    found = {}
    for f in dataclasses.fields(config):
        default = f.default_factory() if f.default is dataclasses.MISSING else f.default  # type: ignore
        if getattr(config, f.name) != default:
            found[f.name] = getattr(config, f.name)
    return found


def _check_model_kwargs(kwargs: dict[str, Any]) -> None:
    for name in kwargs:
        if name in _MODEL_ARGUMENTS:
            raise UserError(f'--model-kwargs {name}: use {_flag(_MODEL_ARGUMENTS[name])}')
        if name in _NOT_FOR_RUNS:
            raise UserError(f'--model-kwargs {name}: is no option of a model that classifies; leave it out')


def _check_optimizer_kwargs(config: Any, kwargs: dict[str, Any]) -> None:
    names = ('lr', 'opt', 'momentum', 'weight_decay', 'layer_decay', 'opt_eps', 'opt_betas')
    for name in kwargs:
        own = next((n for n in (name, f'opt_{name}') if n in names), None)
        if own is not None:
            raise UserError(f'--opt-kwargs {name}: use {_flag(own)}')


def _check_backend(name: str) -> None:
    from torch import compiler
    if name not in compiler.list_backends(exclude_tags=()):
        known = ', '.join(compiler.list_backends())
        raise UserError(f'--torchcompile {name}: torch has no such backend; it has {known}')


def _flag(name: str) -> str:
    return f'--{name.replace("_", "-")}'
