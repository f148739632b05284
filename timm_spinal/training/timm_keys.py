"""Names of timm that are not those of options here: keys of its ``args.yaml``, its flags, arguments of its functions.

A key at a value listed here loads silently; any other value stops with the advice. So a YAML of timm's loads
unless it asks for something that would not happen.
"""
from typing import Any

from timm_spinal.errors import UserError

ANY = object()  # every value has the same outcome here

RENAMED = {'data': 'data_dir', 'recovery_interval': 'checkpoint_steps'}

_LAUNCH = "this belongs to accelerate: use 'accelerate launch' or 'accelerate config'"
_PRECISION = 'mixed_precision: bf16 or fp16 (or accelerate launch --mixed_precision bf16)'
_SINGLE = 'multi-label training is not supported: remove it'
_LOSS = 'remove it: it belongs to a loss that is not supported here'
_SIZES = 'scheduled image sizes are not supported: remove it'
_NAFLEX = 'NaFlex loading is not supported: remove it'
_SPLITS = 'augmentation splits are not supported: remove it (AugMix alone: aa: augmix-m3)'
_WANDB = 'use log_with: [wandb] and the WANDB_* environment variables'
_RESUME = "resuming is exact here: use resume to go on, or initial_checkpoint to start from weights only"

# key: (values that need nothing, what to do otherwise)
NOT_OURS: dict[str, tuple[Any, str]] = {
    # devices and processes
    'device': (ANY, _LAUNCH),
    'device_modules': ((None, [], ['timm_spinal']), 'import the module before timm_spinal.train instead'),
    'local_rank': (ANY, _LAUNCH),
    'amp': ((None, False), f'use {_PRECISION}'),
    'amp_dtype': (ANY, f'use {_PRECISION}'),
    'amp_impl': (ANY, f'use {_PRECISION}'),
    'model_dtype': ((None, 'float32'), f'use {_PRECISION}'),
    'synchronize_step': ((False,), _LAUNCH),
    'torchscript': ((False,), 'use torchcompile'),
    'aot_autograd': ((False,), 'use torchcompile'),
    'fuser': (('',), 'use torchcompile'),
    'fast_norm': ((False,), 'use mixed_precision or torchcompile'),
    # loading
    'no_prefetcher': (ANY, 'the loader never prefetches to the device'),
    'use_multi_epochs_loader': (ANY, 'workers always live through all epochs'),
    'worker_seeding': (ANY, 'every image has its own seed'),
    'input_chans': ((None,), 'use in_chans'),
    'train_img_sizes': ((None, []), _SIZES),
    'train_img_size_probs': ((None, []), _SIZES),
    'train_batch_sizes': ((None, []), _SIZES),
    'train_size_probs': ((None, []), _SIZES),
    'train_size_schedule_spread': (ANY, _SIZES),
    'train_size_random_mix': (ANY, _SIZES),
    'train_batches_per_epoch': ((None,), 'use epoch_repeats for longer or shorter epochs'),
    'variable_batch_loss_scale': ((None, 'none'), _SIZES),
    'train_size_schedule': ((None, '', 'constant', 'random'), _SIZES),
    'aug_splits': ((0,), _SPLITS),
    'jsd_loss': ((False,), _SPLITS),
    'resplit': ((False,), _SPLITS),
    'split_bn': ((False,), _SPLITS),
    'drop_connect': ((None,), 'use drop_path'),
    'naflex_loader': ((False,), _NAFLEX),
    'naflex_train_seq_lens': (ANY, _NAFLEX),
    'naflex_max_seq_len': (ANY, _NAFLEX),
    'naflex_patch_sizes': (ANY, _NAFLEX),
    'naflex_patch_size_probs': (ANY, _NAFLEX),
    'naflex_loss_scale': (ANY, _NAFLEX),
    'naflex_patchify_channels_first': (ANY, _NAFLEX),
    'save_images': ((False,), 'remove it'),
    'tta': ((0,), 'test-time augmentation is not supported: remove it'),
    # targets and losses
    'task': ((None, 'classification'), _SINGLE),
    'target_format': ((None, '', 'auto', 'index'), _SINGLE),
    'multilabel_threshold': (ANY, _SINGLE),
    'class_stats': ((None, ''), _LOSS),
    'loss_class_weight': ((None, ''), _LOSS),
    'loss_pos_weight': ((None, ''), 'use bce_pos_weight'),
    'loss_weight_power': (ANY, _LOSS),
    'asl_clip': (ANY, _LOSS),
    'asl_reduction': (ANY, _LOSS),
    'poly_gamma': (ANY, _LOSS),
    'poly_alpha': (ANY, _LOSS),
    'twoway_tp': (ANY, _LOSS),
    'twoway_tn': (ANY, _LOSS),
    'db_neg_scale': (ANY, _LOSS),
    'db_init_bias': (ANY, _LOSS),
    'db_focal_gamma': (ANY, _LOSS),
    # the run
    'pretrained_cfg_overlay': ((None, {}), 'use pretrained_path'),
    'no_resume_opt': ((False,), _RESUME),
    'start_epoch': ((None, 0), _RESUME),
    'save_epochs': ((None, []), 'use checkpoint_steps and checkpoint_hist'),
    'opt_foreach': ((None,), 'use opt_kwargs: {foreach: true}'),
    'sweep_locks': ((None, [], ''), 'remove it'),
    'sweep_attempt': ((None, ''), 'remove it'),
    'log_wandb': ((False,), _WANDB),
    'wandb_project': (ANY, _WANDB),
    'wandb_tags': (ANY, _WANDB),
    'wandb_resume_id': ((None, ''), _WANDB),
}

# flags of timm's validate.py
NOT_OURS_IN_VALIDATION: dict[str, str] = {
    'use_train_size': 'give the size with --img-size',
    'crop_border_pixels': 'use --crop-pct, or --crop-mode border',
    'log_freq': 'one line comes for each model: leave it out',
    'num_gpu': _LAUNCH,
    'test_pool': 'not supported: leave it out',
    'tf_preprocessing': 'not supported: leave it out, or use --interpolation bicubic and --crop-pct 0.875',
    'results_format': 'name the --results-file .csv or .json',
    'real_labels': 'not supported: leave it out, and evaluate on a folder whose classes are the labels you want',
    'valid_labels': 'not supported: give a folder with these classes and their numbers by --class-map',
    'retry': 'give a smaller --batch-size',
    'metrics_avg': 'not supported: leave it out',
}

# options of the form key=value: arguments of timm that are options of their own
ARGUMENTS: dict[str, dict[str, str]] = {
    'model_kwargs': {
        'num_classes': 'num_classes', 'in_chans': 'in_chans', 'img_size': 'img_size', 'input_size': 'input_size',
        'global_pool': 'gp', 'drop_rate': 'drop', 'drop_path_rate': 'drop_path', 'drop_block_rate': 'drop_block',
        'pretrained': 'pretrained', 'pretrained_cfg': 'pretrained_path', 'pretrained_cfg_overlay': 'pretrained_path',
        'checkpoint_path': 'initial_checkpoint', 'model_name': 'model', 'dtype': 'mixed_precision',
    },
    'opt_kwargs': {
        'lr': 'lr', 'opt': 'opt', 'momentum': 'momentum', 'weight_decay': 'weight_decay', 'layer_decay': 'layer_decay',
        'eps': 'opt_eps', 'betas': 'opt_betas', 'opt_eps': 'opt_eps', 'opt_betas': 'opt_betas',
    },
}


def from_timm(raw: dict[Any, Any], path: str) -> dict[Any, Any]:
    """The keys of a YAML file, those that timm calls otherwise under their names here.

    ``amp: true`` with its ``amp_dtype`` becomes ``mixed_precision``. Where timm writes an old and a new name of one
    option, as ``data`` and ``data_dir``, the one with a value counts.

    Args:
        raw: Keys and values of the file.
        path: The file, for messages.

    Raises:
        UserError: Both names have values, and they differ.
    """
    values = {key: value for key, value in raw.items() if key not in RENAMED}
    for old, new in RENAMED.items():
        if old in raw and values.get(new) in (None, '', 0):
            values[new] = raw[old]
        elif raw.get(old) not in (None, '', 0, values.get(new)):
            raise UserError(f'config {path}: {old} is {raw[old]!r} and {new} is {values[new]!r}; remove {old}')
    if values.get('amp') is True:
        values['amp'] = False
        if values.get('mixed_precision') is None:
            values['mixed_precision'] = {'bfloat16': 'bf16'}.get(str(raw.get('amp_dtype')), 'fp16')
    return values
