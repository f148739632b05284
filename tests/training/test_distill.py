import csv
import gc
import json
import shutil
import weakref
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import load_file

from timm_spinal.errors import UserError
from timm_spinal.training import distill
from timm_spinal.training.distill import check_distillation
from timm_spinal.training.parser import parse_config
from timm_spinal.training.train import open_run, train, train_epochs

from .runs import RANDOM, assert_same_state, command, last_state, resumed, small_config, train_until


def rows(config):
    with open(f'{config.output}/{config.experiment}/summary.csv') as f:
        return [{k: float(v) if v else None for k, v in row.items()} for row in csv.DictReader(f)]


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    """A run folder of a teacher that knows the validation images by heart."""
    folder = tmp_path_factory.mktemp('teacher')
    result = train(small_config(folder, model='test_vit', epochs=12, lr=0.003, opt='adamw', drop=0., no_aug=True,
                                batch_size=11, train_split='validation', smoothing=0.))
    assert 60 < result['top1'] < 99
    return folder / 'run'


@pytest.fixture
def wld(tmp_path, teacher):
    """Config of a run that has the teacher in TMP/teacher."""
    config = small_config(tmp_path)
    shutil.copytree(teacher, tmp_path / 'teacher')
    return replace(
        config, mean=[0.5] * 3, std=[0.5] * 3, kd_model_name=str(tmp_path / 'teacher'), kd_distill_type='wld')


# 20 images an epoch, so that there are as many updates whichever way they are shared out
EXACT = dict(model='test_vit', drop=0., no_aug=True, opt='sgd', epochs=1, epoch_repeats=0.9, smoothing=0., lr=0.005,
             distill_loss_weight=0.2)


def test_run(wld, tmp_path):
    """Weights of the updates 0 .. 14 of 15: 1 - t / 7.5."""
    result = train(wld)
    weights = [max(0., 1 - t / 7.5) for t in range(15)]
    found = rows(wld)
    assert [row['train_kd_weight'] for row in found] == pytest.approx(
        [sum(weights[i:i + 5]) / 5 for i in (0, 5, 10)])
    assert found[0]['train_kd_loss'] > 0 and found[2]['train_kd_loss'] is None
    assert found[2]['train_loss'] == pytest.approx(found[2]['train_task_loss'], rel=1e-6)
    assert result['teacher'] == str(tmp_path / 'teacher') and result['teacher_top1'] is None
    assert set(timm.create_model(f'local-dir:{tmp_path / "run"}', pretrained=True).state_dict()) == set(
        timm.create_model('test_efficientnet', num_classes=2).state_dict())
    seconds = [row['seconds'] for row in found]
    assert 0 < seconds[0] < seconds[1] < seconds[2] == pytest.approx(result['seconds'], rel=1e-3)


class Killed(Exception):
    pass


@pytest.mark.slow
def test_killed_and_resumed_is_bit_identical(wld, tmp_path, monkeypatch):
    """Mixing, accumulation and an average; killed while the teacher pulls, and again after it has gone."""
    whole = replace(wld, experiment='whole', kd_fade_end=0.6, **RANDOM)
    broken = replace(whole, experiment='broken')
    train(whole)
    train_until(monkeypatch, broken, 3, Killed())
    train_until(monkeypatch, resumed(broken), 5, Killed())
    shutil.rmtree(tmp_path / 'teacher')  # past the fade it is not even looked for
    train(resumed(broken))
    assert_same_state(whole, broken)
    one, two = rows(whole), rows(broken)
    assert [row['train_kd_weight'] for row in one] == [row['train_kd_weight'] for row in two]
    assert one[-1]['train_kd_weight'] == 0. < one[1]['train_kd_weight']
    plain = replace(whole, experiment='plain', kd_model_name=None, kd_distill_type='logit', kd_fade_end=0.5)
    train(plain)
    assert any(not torch.equal(v, last_state(whole)[k]) for k, v in last_state(plain).items())


@pytest.mark.slow
def test_weight_of_zero_is_a_plain_run(wld, tmp_path):
    """To the bit, and the teacher need not be there."""
    plain = replace(wld, experiment='plain', kd_model_name=None, kd_distill_type='logit', **RANDOM)
    nothing = replace(wld, experiment='nothing', distill_loss_weight=0., kd_model_name='/nowhere', **RANDOM)
    train(plain)
    train(nothing)
    assert_same_state(plain, nothing)


def test_accumulation_equals_a_large_batch(wld, tmp_path):
    options = dict(EXACT, kd_fade_end=1., checkpoint_steps=1, checkpoint_hist=9)
    large = replace(wld, experiment='large', batch_size=4, **options)
    small = replace(large, experiment='small', batch_size=2, grad_accum_steps=2)
    train(large)
    train(small)
    one, two = (load_file(tmp_path / name / 'last' / 'step-00000005' / 'model.safetensors')
                for name in ('large', 'small'))
    for key in one:
        torch.testing.assert_close(one[key], two[key], atol=5e-6, rtol=1e-4)


@pytest.mark.slow
def test_two_processes_equal_one(wld, tmp_path, launch):
    """Also: the check counts every image once."""
    options = dict(EXACT, epochs=2, kd_fade_end=1., checkpoint_steps=1, checkpoint_hist=9, kd_check=0.)
    one = replace(wld, experiment='one', batch_size=4, **options)
    two = replace(wld, experiment='two', batch_size=2, **options)
    train(one)
    said = launch(2, *command(two)[1:]).stdout
    assert 'of 22 validation images' in said
    top1 = [json.loads((tmp_path / name / 'result.json').read_text())['teacher_top1'] for name in ('one', 'two')]
    assert top1[0] == pytest.approx(top1[1])
    first, second = (load_file(tmp_path / name / 'last' / 'step-00000010' / 'model.safetensors')
                     for name in ('one', 'two'))
    for key in first:
        torch.testing.assert_close(first[key], second[key], atol=5e-6, rtol=1e-4)


@pytest.mark.slow
def test_check_changes_nothing_but_the_report(wld, tmp_path, capsys):
    plain = replace(wld, experiment='plain', epochs=1)
    checked = replace(plain, experiment='checked', kd_check=0.)
    train(plain)
    capsys.readouterr()
    result = train(checked)
    assert_same_state(plain, checked)
    teacher = json.loads((tmp_path / 'teacher' / 'result.json').read_text())
    assert result['teacher_top1'] == pytest.approx(teacher['top1'])
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith('teacher ')]
    assert said == [f'teacher {tmp_path / "teacher"}: top-1 {teacher["top1"]:.2f} % of 22 validation images']
    again = train(resumed(checked, epochs=2))
    assert again['teacher_top1'] == result['teacher_top1'] and 'teacher ' not in capsys.readouterr().out


@pytest.mark.parametrize('kind', ['wld', 'logit'])
def test_a_poor_teacher_is_refused(wld, tmp_path, kind, monkeypatch):
    with pytest.raises(UserError, match='on the validation data is below the 99 % of --kd-check'):
        train(replace(wld, kd_check=99., kd_distill_type=kind))

    class Always(torch.nn.Module):
        def forward(self, x):
            return torch.tensor([1., 0.]).expand(len(x), 2)

    original = distill.evaluate
    monkeypatch.setattr(distill, 'evaluate', lambda accelerator, teacher, *rest: original(
        accelerator, Always(), *rest))
    with pytest.raises(UserError, match='top-1 50.00 % on the validation data is no better than chance'):
        train(replace(wld, kd_check=0., kd_distill_type=kind))
    assert sorted(p.name for p in tmp_path.iterdir()) == ['images', 'teacher']


def test_teacher_sees_the_mixed_images_and_is_given_up(wld):
    config = replace(wld, mixup=1., cutmix=1., kd_fade_end=0.4)
    with open_run(config) as run:
        seen, given, mixed = [], [], []
        run.task.teacher.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        run.task.trained.register_forward_pre_hook(
            lambda module, args: given.append(args[0].clone()) if module.training else None)
        mix = run.data.mixup

        def recorded(images, target):
            images, soft = mix(images.clone(), target)
            mixed.append(images.clone())
            return images, soft

        run.data.mixup = recorded
        alive = weakref.ref(run.task.teacher.model)
        train_epochs(run)
        assert len(seen) == 6 and len(given) == len(mixed) == 15  # lambda is 0 from t = 0.4 * 15 on
        assert all(torch.equal(t, s) and torch.equal(s, m) for t, s, m in zip(seen, given, mixed))
        gc.collect()
        assert run.task.teacher is None and alive() is None


def test_half_precision(wld):
    config = replace(wld, epochs=1, mixed_precision='bf16', stop_epoch=1, batch_size=11, img_size=32)
    train(config)
    assert rows(config)[0]['train_kd_loss'] > 0


WLD = dict(kd_model_name='test_resnet', kd_distill_type='wld')


@pytest.mark.parametrize('options, text', [
    (dict(kd_distill_type='wld'), '--kd-distill-type wld: there is no teacher; give one with --kd-model-name'),
    (dict(kd_check=50.), '--kd-check: there is no teacher'),
    (dict(kd_cache='x'), '--kd-cache: there is no teacher'),
    (dict(WLD, kd_fade_end=0.), r'--kd-fade-end 0: is not in \(0, 1\]'),
    (dict(WLD, kd_fade_end=1.5), r'--kd-fade-end 1.5: is not in \(0, 1\]'),
    (dict(WLD, kd_two_stage=True, kd_fade='constant'), '--kd-two-stage: with --kd-fade constant the first stage'),
    (dict(WLD, task_loss_weight=0.5), '--task-loss-weight: .*--distill-loss-weight'),
    (dict(WLD, loss='margin'), '--loss margin: works on the lengths of capsules, but --kd-distill-type wld'),
    (dict(WLD, loss='squared_hinge'), '--loss squared_hinge: works on the lengths of capsules, but'),
    (dict(WLD, kd_distill_type='logit', loss='margin'), '--loss margin: '),
    (dict(WLD, kd_distill_type='logit', kd_fade='step'), '--kd-fade: has no effect on --kd-distill-type logit'),
    (dict(WLD, kd_distill_type='token', kd_cache='x'), '--kd-cache: has no effect on --kd-distill-type token'),
    (dict(WLD, kd_distill_type='logit', kd_loss_type='mse'), '--kd-loss-type mse: only wld has it'),
    (dict(WLD, kd_distill_type='feature', kd_check=0.), '--kd-check: feature distillation uses no logits'),
    (dict(WLD, kd_cache='x'), '--kd-cache: augmented images differ in every epoch, .*; add --no-aug'),
    (dict(WLD, kd_cache='x', no_aug=True, cutmix=1.), '--kd-cache: mixed images differ in every'),
    (dict(WLD, kd_cache='x', no_aug=True, dataset='hfids/x'), '--kd-cache: the images of a streamed source'),
])
def test_settings_that_cannot_work(tmp_path, options, text):
    config = small_config(tmp_path, **options)
    with pytest.raises(UserError, match=text) as error:
        train(config)
    assert '\n' not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ['images']


@pytest.mark.slow
@pytest.mark.parametrize('options, text', [
    (dict(num_classes=3), 'has 3 classes, the student 2'),
    (dict(in_chans=1), 'takes images of 1 channels, the student 3'),
    (dict(mean=[0.1, 0.2, 0.3]), 'was trained on another input range'),
])
def test_teachers_of_other_runs(wld, tmp_path, options, text):
    shutil.rmtree(tmp_path / 'teacher')
    train(small_config(tmp_path, experiment='teacher', model='test_resnet', epochs=1, **options))
    with pytest.raises(UserError, match=f'teacher {tmp_path / "teacher"}: {text}') as error:
        train(wld)
    assert '\n' not in str(error.value) and not (tmp_path / 'run').exists()
    if 'mean' in options:
        train(replace(wld, kd_renormalize=True, epochs=1))


def test_a_student_without_logits(wld):
    with pytest.raises(UserError, match='the student: its scores are lengths of capsules.*head_logit_scale=True'):
        train(replace(wld, model='test_resnet_xnodr'))


def test_flags():
    given = ['--kd-model-name', 'resnet50.a1_in1k', '--kd-distill-type', 'wld']
    config = parse_config([*given, '--kd-check', '--kd-cache', '--no-aug'])
    assert (config.kd_check, config.kd_cache, config.kd_fade, config.kd_fade_end) == (0., 'beside', 'linear', 0.5)
    check_distillation(config)
    assert parse_config([*given, '--kd-check', '90', '--kd-cache', 'out']).kd_check == 90.
    with pytest.raises(UserError, match='--kd-fade: .cosine. is not one of linear, step, constant'):
        parse_config([*given, '--kd-fade', 'cosine'])
