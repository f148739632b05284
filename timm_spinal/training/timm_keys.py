"""Keys that timm's ``train.py`` writes to ``args.yaml`` and this trainer does not have.

A key at a value listed here loads silently; any other value stops with the advice. So a YAML of timm's loads
unless it asks for something that would not happen.
"""
from typing import Any

ANY = object()  # every value has the same outcome here

RENAMED = {'data': 'data_dir', 'recovery_interval': 'checkpoint_steps'}

_LAUNCH = "this belongs to accelerate: use 'accelerate launch' or 'accelerate config'"
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
    'amp': ((False,), 'use mixed_precision: bf16 (or accelerate launch --mixed_precision bf16)'),
    'amp_dtype': (ANY, 'use mixed_precision'),
    'amp_impl': (ANY, 'use mixed_precision'),
    'model_dtype': ((None, 'float32'), 'use mixed_precision'),
    'no_ddp_bb': ((False,), _LAUNCH),
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
