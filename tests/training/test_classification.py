import copy
import csv
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import BatchNormAct2d

from timm_spinal.errors import UserError
from timm_spinal.training.checkpoint import find_checkpoints
from timm_spinal.training.distributed import create_accelerator
from timm_spinal.training.model import check_batch_of_one, count_statistics_once, create_model, needs_registration
from timm_spinal.training.parser import load_yaml
from timm_spinal.training.train import train

from ..conftest import forget_accelerate
from .images import make_split
from .runs import last_state, small_config


@pytest.mark.parametrize('options, text', [
    (dict(model='resnet50_pspinl'), "unknown model 'resnet50_pspinl'; the nearest are .*resnet50_pspinal.*"
                                    r'register_head_variant'),
    (dict(model='local-dir:/nowhere'), 'model local-dir:/nowhere: '),
    (dict(model='test_efficientnet_spinal', model_kwargs=dict(head_widht=8)),
     "model test_efficientnet_spinal: unknown option 'head_widht'; its head takes head_layers, .*head_width"),
    (dict(model_kwargs=dict(nonsense=1)), "model test_efficientnet: unknown option 'nonsense'; see --model-kwargs"),
    (dict(model='test_vit', model_kwargs=dict(img_size=17)), 'model test_vit: '),
    (dict(initial_checkpoint='/nowhere.safetensors'), 'initial_checkpoint /nowhere.safetensors: no such file'),
    (dict(pretrained_path='/nowhere.safetensors'), 'pretrained_path /nowhere.safetensors: no such file'),
    (dict(model='test_efficientnet_gn', pretrained=True), 'model test_efficientnet_gn: '),
    (dict(resume='auto', experiment=''), '--resume auto: does not say which run'),
    (dict(resume='/nowhere'), 'resume /nowhere: no checkpoint there'),
    (dict(experiment='../elsewhere'), "--experiment '../elsewhere': is a path, not a name"),
    (dict(experiment='..', resume='auto'), "--experiment '..': is a path, not a name"),
    (dict(experiment='run '), "--experiment 'run ': begins or ends with a space"),
    (dict(opt='sdg'), "unknown optimizer 'sdg'; the nearest are .*sgd"),
    (dict(log_with=['papyrus']), 'accelerate: .*papyrus'),
    (dict(log_with=['dvclive']), '--log-with dvclive: its package is not installed'),
    (dict(sync_bn=True), '--sync-bn: torch has it on CUDA only'),
    (dict(kd_model_name='nonsense'), "teacher nonsense: unknown model 'nonsense'"),
    (dict(data_dir='/nowhere'), '/nowhere'),
    (dict(num_classes=1), '--num-classes 1: the data have 2 classes'),
    (dict(model='test_resnet', img_size=None, input_size=[3, 8, 8], batch_size=1), '--batch-size 1: a BatchNorm layer'),
    (dict(model='test_efficientnet_spinal', batch_size=1), '--batch-size 1: a BatchNorm layer'),
])
def test_errors_are_one_line_and_nothing_is_written(tmp_path, options, text):
    config = small_config(tmp_path, **options)
    with pytest.raises(UserError, match=text) as error:
        train(config)
    assert '\n' not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ['images']


def test_unreadable_image_is_named(tmp_path):
    config = small_config(tmp_path, epochs=1)
    bad = tmp_path / 'images' / 'validation' / 'bee' / '3.png'
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(UserError, match=f'{bad}'):
        train(config)
    result = train(replace(config, experiment='skip', skip_unreadable=True, workers=1))
    assert result['skipped'] == 1 and result['eval_size'] == 22


def test_existing_run_is_not_overwritten(tmp_path):
    config = small_config(tmp_path, epochs=1)
    train(config)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / 'run').rglob('*')}
    with pytest.raises(UserError, match='contains a run already; continue with --resume auto'):
        train(config)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / 'run').rglob('*')} == before


def test_folder_without_a_name(tmp_path):
    config = small_config(tmp_path, epochs=1, experiment='')
    train(config)
    train(config)
    runs = sorted(p.name for p in tmp_path.iterdir() if p.name != 'images')
    assert len(runs) == 2 and all('test_efficientnet-32' in name for name in runs)


def test_resume_auto_starts_when_there_is_nothing(tmp_path):
    assert train(small_config(tmp_path, epochs=1, resume='auto'))['epochs'] == 1


def test_resume_path_goes_on_in_the_same_folder(tmp_path):
    config = small_config(tmp_path, epochs=1)
    train(config)
    result = train(replace(config, experiment='', epochs=2, resume=str(tmp_path / 'run')))
    assert result['epochs'] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ['images', 'run']


@pytest.mark.slow
def test_same_seed_same_result_other_seed_other(tmp_path):
    one, two, other = (small_config(tmp_path, epochs=1, experiment=str(i), seed=seed) for i, seed in
                       enumerate((5, 5, 6)))
    losses = [train(config)['loss'] for config in (one, two, other)]
    assert losses[0] == losses[1] != losses[2]


def test_test_split_is_evaluated_with_the_best_weights(tmp_path):
    config = small_config(tmp_path, epochs=2, test_split='train')
    result = train(config)
    model = timm.create_model(f'local-dir:{tmp_path / "run"}', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    dataset = timm.data.create_dataset('', root=config.data_dir, split='train', transform=transform)
    images = torch.stack([dataset[i][0] for i in range(len(dataset))])
    targets = torch.tensor([dataset[i][1] for i in range(len(dataset))])
    with torch.no_grad():
        assert result['test_top1'] == pytest.approx(100 * (model(images).argmax(1) == targets).float().mean().item())
    assert result['test_images'] == 22


def test_keep_says_whose_weights_are_kept(tmp_path):
    """Of a run whose learning rate ruins what the first epoch has learned."""
    ruin = dict(epochs=2, eval_metric='loss', lr=0.05, sched='step', decay_epochs=1, decay_rate=100., clip_grad=1.)
    results = {keep: train(small_config(tmp_path, experiment=keep, keep=keep, **ruin)) for keep in ('best', 'last')}
    rows = [line.split(',') for line in (tmp_path / 'last' / 'summary.csv').read_text().split()]
    losses = [float(row[rows[0].index('eval_loss')]) for row in rows[1:]]
    assert results['last']['best_epoch'] == 1 and results['last']['loss'] == losses[1]
    weights = [load_file(tmp_path / keep / 'model.safetensors') for keep in results]
    assert results['best']['best_epoch'] == 0 and results['best']['loss'] == losses[0]
    assert any(not torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_initial_checkpoint_and_pretrained_path(tmp_path):
    torch.manual_seed(1)
    source = timm.create_model('test_efficientnet', num_classes=2)
    save_file(source.state_dict(), tmp_path / 'two.safetensors')
    other = timm.create_model('test_efficientnet', num_classes=7)
    save_file(other.state_dict(), tmp_path / 'seven.safetensors')
    exact = create_model(small_config(tmp_path, initial_checkpoint=str(tmp_path / 'two.safetensors')), 2)
    assert all(torch.equal(a, b) for a, b in zip(exact.state_dict().values(), source.state_dict().values()))
    adapted = create_model(small_config(tmp_path, pretrained_path=str(tmp_path / 'seven.safetensors')), 2)
    assert torch.equal(adapted.conv_stem.weight, other.conv_stem.weight) and adapted.classifier.out_features == 2
    with pytest.raises(UserError, match='size mismatch'):
        create_model(small_config(tmp_path, initial_checkpoint=str(tmp_path / 'seven.safetensors')), 2)


def test_pickle_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / 'ran'), 'w'))

    torch.save(dict(state_dict=Evil()), tmp_path / 'evil.pth')
    with pytest.raises((UserError, Exception)):
        create_model(small_config(tmp_path, initial_checkpoint=str(tmp_path / 'evil.pth')), 2)
    assert not (tmp_path / 'ran').exists()


def test_settings_reach_the_model(tmp_path):
    config = small_config(
        tmp_path, bn_momentum=0.02, bn_eps=1e-2, head_init_scale=0., head_init_bias=-3., drop=0.3, in_chans=1)
    model = create_model(config, 5)
    assert model.bn1.momentum == 0.02 and model.bn1.eps == 1e-2
    assert model.classifier.weight.abs().sum() == 0 and torch.all(model.classifier.bias == -3.)
    assert model.drop_rate == 0.3 and model.conv_stem.in_channels == 1 and model.num_classes == 5


@pytest.mark.slow
def test_channels_last_and_checkpointing_train_to_the_same_weights(tmp_path):
    plain = small_config(tmp_path, experiment='plain', epochs=1, drop=0., model='test_resnet')
    train(plain)
    for name, options in dict(last=dict(channels_last=True), memory=dict(grad_checkpointing=True)).items():
        train(replace(plain, experiment=name, **options))
        one, two = (load_file(find_checkpoints(tmp_path / n / 'last')[0] / 'model.safetensors')
                    for n in ('plain', name))
        torch.testing.assert_close(one['fc.weight'], two['fc.weight'], atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize('options', [
    dict(model='test_efficientnet', drop=0.2),  # timm's own; its blocks, batch norm and activation in one layer
    dict(model='resnet20_cifar', drop=0.),
    dict(model='test_efficientnet_xnodr', drop=0., loss='margin', smoothing=0.),
    dict(model='icresnet20_cifar', drop=0., grad_accum_steps=2, model_ema=True),
])
def test_computing_activations_again_changes_no_number(tmp_path, options):
    """Weights and statistics, to rounding; the count of batches of BatchNorm exactly."""
    plain = small_config(tmp_path, experiment='plain', epochs=2, opt='momentum', **options)
    again = replace(plain, experiment='again', grad_checkpointing=True)
    losses = [train(config)['loss'] for config in (plain, again)]
    one, two = last_state(plain), last_state(again)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and one.keys() == two.keys()
    counts = [k for k in one if k.endswith('num_batches_tracked')]
    assert counts and all(torch.equal(one[k], two[k]) for k in counts)
    for key in one:
        torch.testing.assert_close(one[key], two[key], atol=1e-5, rtol=1e-4, msg=key)


def test_statistics_count_once_with_a_cumulative_mean_and_after_an_error():
    """Modules of the kind that timm and torch have, and one whose second forward pass breaks off."""
    from torch.utils.checkpoint import checkpoint
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4, momentum=None), BatchNormAct2d(4), torch.nn.BatchNorm2d(4))
    whole = copy.deepcopy(model)
    count_statistics_once(model)
    for step in range(3):
        x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(step))
        for reentrant in (False, True):
            checkpoint(model, x.requires_grad_(), use_reentrant=reentrant).square().sum().backward()
            whole(x).sum()
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), whole.buffers()))
    assert [m.momentum for m in model[1:]] == [None, 0.1, 0.1]


def test_batch_of_one_is_tried_without_a_trace():
    model = timm.create_model('test_efficientnet')
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state, mode = torch.get_rng_state(), model.training
    check_batch_of_one(model, (3, 64, 64), [])
    with pytest.raises(UserError, match='needs at least 2 images'):
        check_batch_of_one(model, (3, 16, 16), [])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and model.training == mode


def test_batch_of_one_trains_where_it_can(tmp_path):
    assert train(small_config(tmp_path, epochs=1, batch_size=1, img_size=64, model='test_vit'))['updates'] == 20


def test_needs_registration():
    assert not needs_registration('resnet50_pspinal') and not needs_registration('resnet50')


@pytest.mark.parametrize('options, flag', [
    (dict(model_ema=True), '--model-ema'), (dict(clip_grad=1., clip_mode='agc'), '--clip-mode agc')])
def test_sharded_weights_refuse_what_does_not_fit(tmp_path, monkeypatch, options, flag):
    monkeypatch.setattr('accelerate.Accelerator.distributed_type', property(lambda self: 'FSDP'))
    from accelerate.utils import DistributedType
    monkeypatch.setattr('accelerate.Accelerator.distributed_type', property(lambda self: DistributedType.FSDP))
    with pytest.raises(UserError, match=f'{flag} needs the whole weights on each device'):
        create_accelerator(small_config(tmp_path, **options), [])


def test_accelerate_setting_of_accumulation_holds_unless_given(tmp_path, monkeypatch):
    monkeypatch.setenv('ACCELERATE_GRADIENT_ACCUMULATION_STEPS', '3')
    assert create_accelerator(small_config(tmp_path), []).gradient_accumulation_steps == 3
    assert create_accelerator(small_config(tmp_path, grad_accum_steps=2), []).gradient_accumulation_steps == 2


def test_precision_of_the_launch_is_kept_with_the_run(tmp_path, monkeypatch, capsys):
    """What was used, not what was asked for."""
    config = small_config(tmp_path, epochs=1)
    monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', 'bf16')
    assert train(config)['mixed_precision'] == 'bf16'
    assert load_yaml(tmp_path / 'run' / 'args.yaml')['mixed_precision'] == 'bf16'
    monkeypatch.delenv('ACCELERATE_MIXED_PRECISION')
    with pytest.raises(UserError, match='^--mixed-precision no: Accelerate has already set another precision') as error:
        train(replace(config, experiment='second'))
    assert '\n' not in str(error.value) and not (tmp_path / 'second').exists()
    forget_accelerate()
    assert train(replace(config, epochs=2, resume='auto'))['mixed_precision'] == 'no'
    assert "resuming with another mixed_precision: 'bf16' -> None" in capsys.readouterr().out


@pytest.mark.slow
def test_distillation_run(tmp_path):
    """A teacher that was trained here; its losses have their columns."""
    teacher = small_config(tmp_path, experiment='teacher', epochs=1, model='test_resnet')
    train(teacher)
    for kind, column in dict(logit='train_kd_loss', feature='train_kd_loss').items():
        config = small_config(tmp_path, experiment=kind, epochs=1, kd_model_name=f'local-dir:{tmp_path / "teacher"}',
                              kd_distill_type=kind, model_ema=True)
        train(config)
        row = next(csv.DictReader((tmp_path / kind / 'summary.csv').open()))
        assert float(row[column]) > 0
        parts = float(row['train_task_loss']) + float(row[column])
        assert float(row['train_loss']) == pytest.approx(parts, rel=1e-5)
        timm.create_model(f'local-dir:{tmp_path / kind}', pretrained=True)


@pytest.mark.slow
def test_compiled_run_saves_plain_names(tmp_path):
    config = small_config(tmp_path, epochs=1, torchcompile='eager', model='test_vit')
    train(config)
    state = load_file(tmp_path / 'run' / 'model.safetensors')
    assert state.keys() == timm.create_model('test_vit', img_size=32, num_classes=2).state_dict().keys()


def test_three_classes_named_in_order(tmp_path):
    make_split(tmp_path / 'images' / 'train', classes=('c', 'a', 'b'), size=36)
    make_split(tmp_path / 'images' / 'validation', classes=('c', 'a', 'b'), size=36)
    train(small_config(tmp_path, epochs=1))
    model = timm.create_model(f'local-dir:{tmp_path / "run"}', pretrained=True)
    assert list(model.pretrained_cfg['label_names']) == ['a', 'b', 'c'] and model.num_classes == 3
