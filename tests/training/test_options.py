"""What options say of themselves, over all fields of all configs; values for those that everybody knows."""
import dataclasses
from dataclasses import dataclass
from typing import get_args

import pytest

from timm_spinal.active_share import ActiveShareConfig
from timm_spinal.compare.gradflow import GradflowConfig
from timm_spinal.compare.options import FrozenConfig
from timm_spinal.detection.options import DetectionConfig
from timm_spinal.hub.options import TrainAndPushConfig
from timm_spinal.training.config import AUG, WLD, DistillOptions, LoopConfig, TrainConfig, ValidateConfig
from timm_spinal.training.options import (
    COMMANDS,
    OnResume,
    Options,
    convert,
    kind_of,
    option,
    option_names,
    to_flag,
    typed_fields,
    with_default,
)
from timm_spinal.training.parser import parse_config
from timm_spinal.training.resume_checks import OF_OPTIMIZER
from timm_spinal.training.timm_keys import ARGUMENTS, NOT_OURS, RENAMED

CONFIGS = [TrainConfig, TrainAndPushConfig, GradflowConfig, ValidateConfig, ActiveShareConfig, FrozenConfig,
           DetectionConfig]
OF_COMMAND = {cls.command: cls for cls in (TrainConfig, ValidateConfig, FrozenConfig, DetectionConfig)}


@pytest.mark.parametrize('cls', CONFIGS)
def test_each_option_says_what_it_means(cls):
    for name, field in typed_fields(cls).items():
        meta, where = field.metadata, f'{cls.__name__}.{name}'
        assert meta['help'] and meta['help'] == ' '.join(meta['help'].split()), where
        assert meta['on_resume'] in get_args(OnResume), where
        assert meta['applies_to'] and set(meta['applies_to']) <= set(COMMANDS), where
        assert all(isinstance(meta[k], bool) for k in ('recipe', 'changes_result', 'path', 'ascending')), where
        assert all(isinstance(meta[k], tuple) for k in ('choices', 'flags', 'requires')), where
        # what belongs to one machine or one start gives no other weights, but for code of others that is run
        assert meta['changes_result'] or meta['on_resume'] == 'silent', where
        assert meta['recipe'] or meta['on_resume'] == 'silent' or name == 'dataset_trust_remote_code', where
        assert not meta['path'] or kind_of(field.type)[0] is str, where
        for other, _, value in (text.partition('=') for text in meta['requires']):
            required = typed_fields(TrainConfig)[other]
            assert other != name and (not value or convert(value, required) is not None), where


@pytest.mark.parametrize('cls', CONFIGS)
def test_each_default_is_a_value_of_its_option(cls):
    for name, field in typed_fields(cls).items():
        default = getattr(cls(), name)
        assert convert(default, field) == default, f'{cls.__name__}.{name}'


@pytest.mark.parametrize('cls', CONFIGS)
def test_a_command_has_the_flags_that_apply_to_it_and_says_why_not_of_the_others(cls, capsys):
    with pytest.raises(SystemExit):
        parse_config(['--help'], cls)
    shown = set(capsys.readouterr().out.replace(',', ' ').split())
    for field in dataclasses.fields(cls):
        assert (to_flag(field.name) in shown) == (cls.command in field.metadata['applies_to'])
        if 'frozen' not in field.metadata['applies_to'] and cls is FrozenConfig:
            assert field.metadata['not_frozen']


@pytest.mark.parametrize('command', COMMANDS)
def test_what_applies_to_a_command_is_among_its_options(command):
    theirs = {f.name for f in dataclasses.fields(OF_COMMAND[command])}
    for cls in OF_COMMAND.values():
        assert set(option_names(cls, applies_to=command)) <= theirs


def test_tables_of_timms_names_name_options():
    ours = {f.name for f in dataclasses.fields(TrainConfig)}
    assert all(set(names.values()) <= ours and kind in ours for kind, names in ARGUMENTS.items())
    assert not (set(RENAMED) | set(NOT_OURS)) & ours
    assert set(RENAMED.values()) <= ours


@pytest.mark.parametrize('name, on_resume, changes_result, recipe', [
    ('model', 'fixed', True, True), ('data_dir', 'fixed', True, True), ('seed', 'fixed', True, True),
    ('batch_size', 'fixed', True, True), ('freeze_modules', 'fixed', True, True), ('layer_decay', 'fixed', True, True),
    ('kd_model_name', 'fixed', True, True), ('lr', 'told', True, True), ('mixup', 'told', True, True),
    ('eval_metric', 'told', True, True), ('mixed_precision', 'told', True, True), ('epochs', 'silent', True, True),
    ('stop_epoch', 'silent', True, True), ('early_stop_patience', 'silent', True, True),
    ('dataset_download', 'silent', False, True), ('kd_check', 'silent', False, True),
    ('validation_batch_size', 'silent', False, True), ('workers', 'silent', False, False),
    ('output', 'silent', False, False), ('debug', 'silent', False, False), ('resume', 'silent', False, False),
    ('dataset_trust_remote_code', 'told', True, False),
])
def test_what_well_known_options_mean(name, on_resume, changes_result, recipe):
    meta = typed_fields(TrainConfig)[name].metadata
    assert (meta['on_resume'], meta['changes_result'], meta['recipe']) == (on_resume, changes_result, recipe)


@pytest.mark.parametrize('cls, name, commands', [
    (TrainConfig, 'seed', COMMANDS), (TrainConfig, 'data_dir', ('training', 'validation', 'frozen')),
    (TrainConfig, 'hflip', ('training', 'frozen')), (TrainConfig, 'mixup', ('training',)),
    (TrainConfig, 'model', ('training', 'validation')), (TrainConfig, 'lr', ('training', 'detection')),
    (TrainConfig, 'torchcompile', ('training', 'validation')), (TrainConfig, 'freeze', ('training',)),
    (ValidateConfig, 'use_ema', ('validation',)), (FrozenConfig, 'heads', ('frozen',)),
    (DetectionConfig, 'backbone', ('detection',)), (DetectionConfig, 'lr_base', ('training', 'detection')),
])
def test_what_well_known_options_apply_to(cls, name, commands):
    assert typed_fields(cls)[name].metadata['applies_to'] == commands


def test_names_that_are_asked_for_by_meaning():
    assert option_names(TrainConfig, path=True) == (
        'data_dir', 'class_map', 'pretrained_path', 'initial_checkpoint', 'kd_model_name', 'kd_cache')
    assert option_names(DetectionConfig, path=True) == ('data_dir', 'backbone_path')
    assert set(option_names(TrainConfig, requires=AUG)) == {
        'aa', 'train_crop_mode', 'scale', 'ratio', 'hflip', 'vflip', 'rotation', 'perspective', 'color_jitter',
        'color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob', 'reprob', 'aug_repeats',
        'pad_crop'}
    assert option_names(DistillOptions, requires=WLD) == (
        'kd_fade', 'kd_fade_end', 'kd_right_only', 'kd_two_stage', 'kd_renormalize', 'kd_cache')
    assert option_names(DetectionConfig, on_resume='fixed', applies_to='detection') == (
        'data_dir', 'train_split', 'val_split', 'keep_empty', 'model', 'backbone', 'trainable_layers', 'frozen_bn',
        'fpn_channels', 'anchor_scale', 'backbone_kwargs', 'detector_kwargs', 'batch_size', 'seed', 'opt',
        'layer_decay', 'grad_accum_steps', 'model_ema')
    assert {'lr', 'opt', 'epochs', 'sched'} <= OF_OPTIMIZER and not {'stop_epoch', 'seed', 'batch_size'} & OF_OPTIMIZER


def test_an_option_with_another_default_means_the_same():
    ours, theirs = typed_fields(DetectionConfig), typed_fields(TrainConfig)
    for name in ('batch_size', 'lr_base', 'decay_milestones', 'sched', 'output'):
        assert getattr(DetectionConfig(), name) != getattr(TrainConfig(), name) or name == 'output'
        same = {k: v for k, v in ours[name].metadata.items() if k not in ('help', 'choices')}
        assert same == {k: theirs[name].metadata[k] for k in same}
    assert ours['eval_metric'].metadata['choices'] == ('ap', 'ap50', 'ap75')


def test_what_a_class_says_holds_for_its_options_that_do_not():
    @dataclass
    class Group(Options, applies_to=('validation',), recipe=False, on_resume='fixed'):
        a: int = option(1, 'a')
        b: int = option(2, 'b', recipe=True, on_resume='silent', applies_to=('frozen',))
        c: int = with_default(LoopConfig, 'epochs', 3)

    means = [(f.metadata['applies_to'], f.metadata['recipe'], f.metadata['on_resume'], f.metadata['changes_result'])
             for f in dataclasses.fields(Group)]
    assert means == [(('validation',), False, 'fixed', True), (('frozen',), True, 'silent', False),
                     (('training', 'detection'), True, 'silent', True)]
    assert Group().c == 3
