import dataclasses

import pytest
import yaml
from timm.optim import optimizer_kwargs
from timm.scheduler import scheduler_kwargs

from timm_spinal.compare.options import FrozenConfig
from timm_spinal.detection.options import DetectionConfig
from timm_spinal.errors import UserError
from timm_spinal.training.config import TrainConfig, ValidateConfig, to_yaml
from timm_spinal.training.parser import load_yaml, parse_config
from timm_spinal.training.timm_keys import ANY, NOT_OURS, RENAMED

# what timm's train.py writes to args.yaml when it is run with nothing but a folder
TIMM_ARGS = '''
aa: null
amp: false
amp_dtype: float16
aug_repeats: 0
aug_splits: 0
batch_size: 128
bce_loss: false
bce_pos_weight: null
bce_sum: false
bce_target_thresh: null
bn_eps: null
bn_momentum: null
channels_last: false
checkpoint_hist: 10
class_map: ''
clip_grad: null
clip_mode: norm
color_jitter: 0.4
color_jitter_prob: null
cooldown_epochs: 0
crop_pct: null
cutmix: 0.0
cutmix_minmax: null
data: /data/images
data_dir: null
dataset: ''
dataset_download: false
dataset_trust_remote_code: false
decay_epochs: 90
decay_milestones: [90, 180, 270]
decay_rate: 0.1
device: cuda
device_modules: null
dist_bn: reduce
distill_loss_weight: null
drop: 0.0
drop_block: null
drop_connect: null
drop_path: null
epoch_repeats: 0.0
epochs: 300
eval_metric: top1
experiment: ''
fast_norm: false
fuser: ''
gaussian_blur_prob: null
gp: null
grad_accum_steps: 1
grad_checkpointing: false
grayscale_prob: null
head_init_bias: null
head_init_scale: null
hflip: 0.5
img_size: null
in_chans: null
initial_checkpoint: ''
input_img_mode: null
input_key: null
input_size: null
interpolation: ''
jsd_loss: false
kd_distill_type: logit
kd_loss_type: kl
kd_model_name: null
kd_student_feature_dim: null
kd_teacher_feature_dim: null
kd_temperature: 4.0
kd_token_distill_type: soft
layer_decay: null
layer_decay_min_scale: 0
layer_decay_no_opt_scale: null
local_rank: 0
log_interval: 50
log_wandb: false
lr: null
lr_base: 0.1
lr_base_scale: ''
lr_base_size: 256
lr_cycle_decay: 0.5
lr_cycle_limit: 1
lr_cycle_mul: 1.0
lr_k_decay: 1.0
lr_noise: null
lr_noise_pct: 0.67
lr_noise_std: 1.0
mean: null
min_lr: 0
mixup: 0.0
mixup_mode: batch
mixup_off_epoch: 0
mixup_prob: 1.0
mixup_switch_prob: 0.5
model: resnet50
model_dtype: null
model_ema: false
model_ema_decay: 0.9998
model_ema_force_cpu: false
model_ema_warmup: false
model_kwargs: {}
momentum: 0.9
naflex_loader: false
naflex_loss_scale: linear
naflex_max_seq_len: 576
naflex_patch_size_probs: null
naflex_patch_sizes: null
naflex_patchify_channels_first: false
naflex_train_seq_lens: [128, 256, 576, 784, 1024]
no_aug: false
no_ddp_bb: false
no_prefetcher: false
no_resume_opt: false
num_classes: null
opt: sgd
opt_betas: null
opt_eps: null
opt_kwargs: {}
output: ''
patience_epochs: 10
pin_mem: false
pretrained: false
pretrained_path: null
ratio: [0.75, 1.3333333333333333]
recount: 1
recovery_interval: 0
remode: pixel
reprob: 0.0
resplit: false
resume: ''
save_images: false
scale: [0.08, 1.0]
sched: cosine
sched_on_updates: false
seed: 42
smoothing: 0.1
split_bn: false
start_epoch: null
std: null
sync_bn: false
synchronize_step: false
target_key: null
task_loss_weight: null
torchcompile: null
torchcompile_mode: null
torchscript: false
train_batch_sizes: null
train_batches_per_epoch: null
train_crop_mode: null
train_interpolation: random
train_num_samples: null
train_size_probs: null
train_size_random_mix: 0.1
train_size_schedule_spread: 0.65
train_split: train
tta: 0
use_multi_epochs_loader: false
val_interval: 1
val_num_samples: null
val_split: validation
variable_batch_loss_scale: none
validation_batch_size: null
vflip: 0.0
wandb_project: null
wandb_resume_id: ''
wandb_tags: []
warmup_epochs: 5
warmup_lr: 1.0e-05
warmup_prefix: false
weight_decay: 2.0e-05
worker_seeding: all
workers: 4
'''


@pytest.fixture
def yaml_file(tmp_path):
    def write(text):
        path = tmp_path / 'run.yaml'
        path.write_text(text)
        return str(path)
    return write


def test_timm_args_yaml_loads_and_gives_timms_defaults(yaml_file):
    config = parse_config(['--config', yaml_file(TIMM_ARGS)])
    # the defaults here are timm's, but for these
    differs = dict(data_dir='/data/images', checkpoint_hist=10, decay_epochs=90., kd_loss_type='kl', workers=4)
    assert config == dataclasses.replace(TrainConfig(), **differs)


def test_every_timm_key_is_ours_or_in_the_table():
    ours = {f.name for f in dataclasses.fields(TrainConfig)}
    keys = set(yaml.safe_load(TIMM_ARGS))
    assert keys <= ours | set(NOT_OURS) | set(RENAMED)
    assert not ours & (set(NOT_OURS) | set(RENAMED))
    assert set(RENAMED.values()) <= ours


def test_flags_win_over_yaml_and_yaml_over_defaults(yaml_file):
    path = yaml_file('lr: 0.5\nepochs: 3\nmodel_ema: true\nmodel_kwargs: {head_width: 64}\n')
    config = parse_config(['--lr', '0.25', '-c', path, '--no-model-ema'])
    assert (config.lr, config.epochs, config.model_ema, config.model_kwargs) == (0.25, 3, False, {'head_width': 64})
    assert config.batch_size == TrainConfig().batch_size


def test_flags_are_spelled_as_in_timm():
    config = parse_config([
        '-b', '32', '-vb', '64', '-j', '0', '--lr_base', '3e-3', '--no-aug', '--opt-betas', '0.9', '0.95', '--dr=0.2',
        '--model-kwargs', 'head_layers=2', 'head_act_layer=gelu', 'head_shared=True', '--torchcompile', '--mean', '0.5',
        '--input-size', '1', '28', '28', '--cutmix-minmax', '0.2', '0.8', '--log-with', 'tensorboard', 'wandb',
    ])
    assert (config.batch_size, config.validation_batch_size, config.workers) == (32, 64, 0)
    assert (config.lr_base, config.no_aug, config.opt_betas, config.decay_rate) == (3e-3, True, [0.9, 0.95], 0.2)
    assert config.model_kwargs == {'head_layers': 2, 'head_act_layer': 'gelu', 'head_shared': True}
    assert (config.torchcompile, config.mean, config.input_size) == ('inductor', [0.5], [1, 28, 28])
    assert (config.cutmix_minmax, config.log_with) == ([0.2, 0.8], ['tensorboard', 'wandb'])


def test_yaml_of_a_config_reads_back_equal(yaml_file):
    config = parse_config(['--opt', 'adamw', '--lr', '1e-3', '--model-kwargs', 'a=1', 'b=x', '--scale', '0.9', '1',
                           '--torchcompile', 'aot_eager', '--resume', 'auto'])
    assert parse_config(['--config', yaml_file(to_yaml(config))]) == config


def test_numbers_written_as_text_are_numbers(yaml_file):
    # YAML 1.1 reads 3e-4 as a text
    path = yaml_file("lr: 3e-4\nepochs: '10'\nmean: ['0.5', 0.4, 0.3]\nwarmup_epochs: 2.0\n")
    config = parse_config(['--config', path])
    assert (config.lr, config.epochs, config.mean, config.warmup_epochs) == (3e-4, 10, [0.5, 0.4, 0.3], 2)


def test_timms_factories_read_the_config():
    config = parse_config(['--opt', 'lamb', '--lr', '0.01', '--layer-decay', '0.7', '--sched', 'step', '--epochs', '9'])
    assert optimizer_kwargs(config)['layer_decay'] == 0.7
    assert scheduler_kwargs(config)['sched'] == 'step' and scheduler_kwargs(config)['num_epochs'] == 9


@pytest.mark.parametrize('argv, words', [
    (['--modle', 'x'], '--modle; did you mean --model: name of the model: any of timm or timm_spinal (default: '
     'resnet50)?'),
    (['--batchsize=3'], '--batchsize; did you mean --batch-size: training images per process and step (default: 128)?'),
    (['--lrr', '1'], 'unknown flag --lrr; did you mean --lr: learning rate; not given: lr_base scaled by the global '
     'batch size?'),
    (['--learning_rate', '1'], 'unknown flag --learning-rate; did you mean --lr: learning rate; not given'),
    (['--zzzzzz'], 'unknown flag --zzzzzz; see train --help'),
    (['-q'], 'unknown flag -q; see train --help'),
    (['--amp'], 'mixed_precision'),
    (['--recovery-interval', '5'], '--checkpoint-steps'),
    (['my/images'], '--data-dir'),
    (['--lr', 'fast'], "--lr: 'fast' is not a finite number"),
    (['--lr', 'nan'], 'finite'),
    (['--epochs', '1.5'], 'whole number'),
    (['--epochs', '0'], 'at least 1'),
    (['--hflip', '2'], 'at most 1'),
    (['--sched', 'cosin'], 'not one of cosine'),
    (['--input-size', '3', '224'], '3 arguments'),
    (['--model-kwargs', 'head_width'], 'key=value'),
    (['--config', 'no/such.yaml'], 'no/such.yaml'),
])
def test_bad_arguments_are_one_line(argv, words):
    with pytest.raises(UserError) as error:
        parse_config(argv, prog='train')
    assert words in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('text, words', [
    ('learning_rate: 1', "unknown key 'learning_rate'; did you mean lr: learning rate; not given"),
    ('batchsize: 8', "unknown key 'batchsize'; did you mean batch_size: training images per process and step?"),
    ('lr: [1, 2]', 'lr: [1, 2] is not a finite number'),
    ('model_ema: 1', 'true or false'),
    ('epochs: true', 'whole number'),
    ('model_kwargs: head', 'mapping'),
    ('amp: maybe', 'mixed_precision'),
    ('jsd_loss: true', 'augmix'),
    ('task: multilabel', 'multi-label'),
    ('- a\n- b', 'instead of keys'),
    ('a: b: c', 'not valid YAML'),
    ('lr: 0.1\nlr: 0.2', "the key 'lr' is there twice"),
    ('model_kwargs: {head_width: 1, head_width: 2}', "the key 'head_width' is there twice"),
    ('batchsize: 8\nepoch: 3\nzzzzzz: 1', "unknown key 'batchsize'; did you mean batch_size: training images per "
     "process and step? unknown key 'epoch'; did you mean epochs: number of epochs? unknown key 'zzzzzz'; see --help"),
    ('epochs: 1:30', "'1:30' is not a whole number"),
    ('lr: 1:30.5', "'1:30.5' is not a finite number"),
    ('a: ' + '[' * 3000 + ']' * 3000, 'nested too deeply'),
    ('epochs: ' + '9' * 5000, "9999... is not a whole number"),
    ('epochs: 1' + '0' * 30, 'too large; give at most 2147483647'),
    ('lr: 1e999', 'finite'),
    ('lr: .nan', 'finite'),
    ('data: a\ndata_dir: b', "data is 'a' and data_dir is 'b'; remove data"),
])
def test_bad_yaml_is_one_line(yaml_file, text, words):
    with pytest.raises(UserError) as error:
        load_yaml(yaml_file(text))
    assert words in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('text, values', [
    ('experiment: 2026-01-01', dict(experiment='2026-01-01')),
    ('experiment: 1:30', dict(experiment='1:30')),
    ('experiment: on', dict(experiment='on')),
    ('pretrained: yes\nno_aug: off', dict(pretrained=True, no_aug=False)),
    ('epochs: 010', dict(epochs=10)),
    ('model_kwargs: {head_dropout: 1e-1}', dict(model_kwargs=dict(head_dropout=0.1))),
    ('amp: true', dict(mixed_precision='fp16')),
    ('amp: true\namp_dtype: bfloat16', dict(mixed_precision='bf16')),
    ('amp: true\nmixed_precision: bf16', dict(mixed_precision='bf16')),
    ('amp: false\namp_dtype: bfloat16', {}),
    ('data: x\ndata_dir: null', dict(data_dir='x')),
    ('data: null\ndata_dir: y', dict(data_dir='y')),
    ('data: y\ndata_dir: y', dict(data_dir='y')),
    ('\ufeffepochs: 3', dict(epochs=3)),
])
def test_yaml_means_what_it_says(yaml_file, text, values):
    assert load_yaml(yaml_file(text)) == values


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / 'run.yaml').write_bytes(b'lr: \xff\xfe')
    for path in (tmp_path / 'run.yaml', tmp_path, tmp_path / 'a\0b'):
        with pytest.raises(UserError, match='config ') as error:
            load_yaml(path)
        assert '\n' not in str(error.value)


@pytest.mark.parametrize('argv, words', [
    (['--seed', '4294967296'], 'at most 4294967295'),
    (['--epochs', '2147483648'], 'at most 2147483647'),
    (['--scale', '-1', '2'], "--scale: '-1' is too small"), (['--scale', '0.5', '2'], "'2' is too large"),
    (['--scale', '1', '0.5'], 'write the smaller value first'), (['--ratio', '0', '0'], 'give more than 0'),
    (['--cutmix-minmax', '0.9', '0.1'], 'write the smaller value first'), (['--std', '0', '0', '0'], 'more than 0'),
    (['--torchcompile', 'nosuch'], '--torchcompile nosuch: torch has no such backend'),
    (['--torchcompile-mode', 'default'], 'add --torchcompile'),
    (['--model-kwargs', 'num_classes=1'], '--model-kwargs num_classes: use --num-classes'),
    (['--model-kwargs', 'features_only=True'], 'leave it out'),
    (['--opt-kwargs', 'lr=0.1'], '--opt-kwargs lr: use --lr'), (['--opt-kwargs', 'eps=1'], 'use --opt-eps'),
    (['--no-aug', '--aa', 'rand-m9'], '--aa and --no-aug contradict'),
    (['--no-aug', '--vflip', '0.5'], '--vflip and --no-aug'),
    (['--img-size', '1'], 'at least 8'), (['--input-size', '3', '1', '1'], 'at least 8 pixels'),
    (['--crop-pct', '1e5'], 'at most 4'),
    (['--keep', 'last', '--early-stop-patience', '3'], '--early-stop-patience and --keep last contradict'),
    (['--bce-loss', '--loss', 'asl'], '--bce-loss and --loss asl'),
    (['--input-size', '3', '64', '64', '--img-size', '32'], '--img-size 32 and --input-size 3 64 64'),
    (['--val-split', 'test', '--val-split-fraction', '0.1'], '--val-split test and --val-split-fraction'),
    (['--pretrained-path', 'a.pth', '--initial-checkpoint', 'b.pth'], 'leave one out'),
    (['--modle', 'x', '--batchsize', '3'], '(default: resnet50)?; unknown flag --batchsize; did you mean --batch-size'),
])
def test_values_that_would_fail_later(argv, words):
    with pytest.raises(UserError) as error:
        parse_config(argv)
    assert words in str(error.value) and '\n' not in str(error.value)


def test_a_flag_may_undo_the_file(yaml_file):
    path = yaml_file('aa: rand-m9\nscale: [0.5, 1]\n')
    assert parse_config(['--config', path, '--no-aug']).no_aug
    path = yaml_file('no_aug: true\n')
    with pytest.raises(UserError, match='--aug undoes'):
        parse_config(['--config', path, '--aa', 'rand-m9'])
    assert parse_config(['--config', path, '--aa', 'rand-m9', '--aug']).aa == 'rand-m9'


@pytest.mark.parametrize('argv, field, value', [
    (['-m', 'resnet18'], 'model', 'resnet18'), (['--split', 'test'], 'val_split', 'test'),
    (['--num-samples', '5'], 'val_num_samples', 5),
])
def test_validation_takes_timms_flags(argv, field, value):
    assert getattr(parse_config(argv, ValidateConfig), field) == value


@pytest.mark.parametrize('flag', [
    '--use-train-size', '--crop-border-pixels', '--log-freq', '--num-gpu', '--test-pool', '--tf-preprocessing',
    '--results-format', '--real-labels', '--valid-labels', '--retry', '--metrics-avg', '--amp',
    '--amp-dtype', '--device', '--fuser', '--no-prefetcher', '--model-dtype', '--aot-autograd', '--fast-norm',
])
def test_validation_answers_timms_other_flags(flag):
    with pytest.raises(UserError, match=f"flag {flag} is timm's and not available here; ..."):
        parse_config([flag], ValidateConfig)


@pytest.mark.parametrize('cls, flag, words', [
    (FrozenConfig, '--mixup', 'has no effect here (features are made of single images)'),
    (FrozenConfig, '--lr-base', 'has no effect here (it belongs to training)'),
    (DetectionConfig, '--crop-pct', 'unknown flag --crop-pct: it belongs to the training of classifiers'),
    (DetectionConfig, '--bacbone', 'unknown flag --bacbone; did you mean --backbone: any model of timm'),
])
def test_options_of_other_commands(cls, flag, words):
    with pytest.raises(UserError) as error:
        parse_config([flag, '1'], cls)
    assert words in str(error.value)


def test_commands_that_do_not_train_have_no_options_of_training():
    for flag in ('--mixup', '--drop-path', '--freeze', '--epochs', '--bn-momentum'):
        with pytest.raises(UserError, match=f'{flag}: has no effect here'):
            parse_config([flag, '1'], ValidateConfig)


@pytest.mark.parametrize('key', sorted(k for k, (allowed, _) in NOT_OURS.items() if allowed is not ANY))
def test_timm_only_keys_pass_at_timms_default_and_stop_otherwise(yaml_file, key):
    allowed, advice = NOT_OURS[key]
    assert load_yaml(yaml_file(yaml.safe_dump({key: allowed[0]}))) == {}
    with pytest.raises(UserError, match='not available') as error:
        load_yaml(yaml_file(yaml.safe_dump({key: 'something else'})))
    assert advice in str(error.value)


def test_recovery_interval_becomes_checkpoint_steps(yaml_file):
    assert load_yaml(yaml_file('recovery_interval: 500')) == {'checkpoint_steps': 500}


def test_validate_config_reads_a_training_yaml(yaml_file):
    path = yaml_file(to_yaml(parse_config(['--data-dir', 'x', '--lr', '1', '--img-size', '96'])))
    config = parse_config(['--config', path, '--checkpoint', 'run'], cls=ValidateConfig)
    assert (config.data_dir, config.img_size, config.checkpoint) == ('x', 96, 'run')


def test_help_shows_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(['--help'])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert all('--' + f.name.replace('_', '-') in shown for f in dataclasses.fields(TrainConfig))
    assert all(f.metadata['help'] for f in dataclasses.fields(TrainConfig))
