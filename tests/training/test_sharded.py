"""FSDP2 between two processes on the CPU, by `shard_on_cpu`; and what is refused with sharded weights."""
import csv
import errno
import json
import re

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from timm_spinal.errors import UserError
from timm_spinal.training.distributed import create_accelerator
from timm_spinal.training.sharded import errors_of_shards, is_elementwise, sharding_errors_named
from timm_spinal.training.train import train
from timm_spinal.validate import ValidateConfig, validate

from .runs import small_config

FSDP2 = ('--use_fsdp', '--fsdp_version', '2')
# nothing random but the order: 16 images, 2 updates of 2 processes x 4 images
SAME = dict(drop=0., no_aug=True, lr=0.002, epoch_repeats=16 / 22, epochs=2, keep='last')
LAYER_NORM = dict(SAME, model='test_vit', img_size=64)
BATCH_NORM = dict(SAME, model='test_resnet', img_size=64)


@pytest.fixture
def sharded(launch, tmp_path):
    """``sharded(*launcher_flags, NAME=options, ...)``: trains sharded, one run after the other; results by name."""
    def start(*flags, **runs):
        small_config(tmp_path)  # its images
        (tmp_path / 'runs.json').write_text(json.dumps(runs))
        done = launch(2, *flags, '-m', 'tests.training.shard_on_cpu', str(tmp_path / 'runs.json'), kind=FSDP2)
        return {name: json.loads((tmp_path / f'{name}.json').read_text()) for name in runs}, done.stdout
    return start


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / 'model.safetensors')


def assert_near(one, other, atol=1e-6) -> None:
    assert one.keys() == other.keys() and one
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], atol=atol, rtol=0., msg=lambda m, name=name: f'{name}: {m}')


def assert_same_losses(one, other, columns) -> None:
    """Of each epoch, to 1e-6."""
    first, second = ([*csv.DictReader((folder / 'summary.csv').open())] for folder in (one, other))
    assert len(first) == len(second) == 2
    for a, b in zip(first, second):
        for column in columns:
            assert float(a[column]) == pytest.approx(float(b[column]), abs=1e-6), column


@pytest.mark.slow
@pytest.mark.parametrize('options, columns', [
    (LAYER_NORM, ('train_loss', 'eval_loss')),
    # the statistics of two processes are averaged, those of one follow each other: evaluation differs
    (BATCH_NORM, ('train_loss',)),
], ids=['layer_norm', 'batch_norm'])
def test_two_processes_equal_one(sharded, tmp_path, options, columns):
    """Losses and weights of one process with the same batches, and the written weights are those evaluated.

    With clipping; a run stopped inside an epoch, where each process has its own BatchNorm statistics, goes on to the
    same bits; the test split is evaluated with the best weights, which are not the last.
    """
    options = dict(options, clip_grad=0.1, opt='sgd')
    part = dict(options, checkpoint_steps=1, epochs=3)
    tested = dict(options, keep='best', val_split_fraction=0.3, test_split='validation', epochs=3, lr=0.5)
    results, _ = sharded(
        two=options, whole=dict(part, experiment='whole'), part=dict(part, until=4),
        resumed=dict(part, experiment='part', resume='auto'), tested=tested)
    one = train(small_config(tmp_path, experiment='one', grad_accum_steps=2, **options))

    assert (tmp_path / 'two' / 'last' / 'step-00000004' / 'pytorch_model_fsdp_0').is_dir()
    assert_same_losses(tmp_path / 'two', tmp_path / 'one', columns)
    trained = [{k: v for k, v in weights(tmp_path / name).items() if 'running' not in k and 'num_batches' not in k}
               for name in ('two', 'one')]
    assert_near(*trained)
    assert {results['two'][k] == one[k] for k in ('params', 'trained_params', 'updates')} == {True}
    row, = validate(ValidateConfig(
        data_dir=str(tmp_path / 'images'), checkpoint=str(tmp_path / 'two'), batch_size=5, workers=0))
    assert row['loss'] == pytest.approx(results['two']['loss'], abs=1e-6) and row['images'] == 22

    with pytest.raises(UserError, match='its weights are in shards; give .*/two,'):
        validate(ValidateConfig(checkpoint=str(tmp_path / 'two' / 'last' / 'step-00000004')))

    assert results['part'] == {} and results['resumed']['updates'] == results['whole']['updates'] == 6
    whole, part = (weights(tmp_path / name) for name in ('whole', 'part'))
    assert whole.keys() == part.keys() and all(torch.equal(v, part[k]) for k, v in whole.items())

    found = results['tested']
    assert found['best_epoch'] < 2 and found['test_images'] == 22
    row, = validate(ValidateConfig(
        data_dir=str(tmp_path / 'images'), checkpoint=str(tmp_path / 'tested'), batch_size=5, workers=0))
    assert found['test_loss'] == pytest.approx(row['loss'], abs=1e-6)


@pytest.mark.slow
def test_options_with_sharded_weights(sharded, tmp_path):
    """Accumulation, a teacher that stays whole, frozen parts, shared bases, a compiler and channels last."""
    train(small_config(tmp_path, experiment='teacher', **{**LAYER_NORM, 'epochs': 1}))
    vit = dict(LAYER_NORM, epochs=1, opt='adamw', lr=1e-4)
    runs = dict(
        accumulation=dict(vit, batch_size=2, grad_accum_steps=2, clip_grad=0.5),
        wld=dict(vit, kd_model_name=str(tmp_path / 'teacher'), kd_distill_type='wld', kd_fade_end=1.),
        logit=dict(vit, kd_model_name=str(tmp_path / 'teacher'), kd_distill_type='logit', kd_cache=None),
        frozen=dict(vit, freeze='backbone'),
        bases=dict(vit, model='resnet32_sb_s16u1_cifar', img_size=32),
        compiled=dict(vit, torchcompile='aot_eager'),
        channels_last=dict(BATCH_NORM, epochs=1, channels_last=True),
    )
    results, _ = sharded(**runs)
    for name, options in runs.items():
        assert 'error' not in results[name], results[name]
        processes = dict(grad_accum_steps=4) if name == 'accumulation' else dict(grad_accum_steps=2)
        one = train(small_config(tmp_path, experiment=f'one_{name}', **{**options, **processes}))
        assert results[name]['updates'] == one['updates'] == 2
        if name not in ('bases', 'channels_last'):  # whose BatchNorm statistics differ, as above
            assert results[name]['loss'] == pytest.approx(one['loss'], abs=1e-6), name
        trained = [{k: v for k, v in weights(tmp_path / run).items() if 'running' not in k and 'num_batches' not in k}
                   for run in (name, f'one_{name}')]
        assert_near(*trained, atol=1e-5)


@pytest.mark.slow
def test_what_cannot_be_sharded_ends_with_one_line(sharded, tmp_path):
    """In a real launch: an optimizer, an option, a checkpoint of another kind of launch, layers wrapped alone."""
    train(small_config(tmp_path, experiment='plain', **{**LAYER_NORM, 'epochs': 1}))
    runs = dict(
        lamb=dict(LAYER_NORM, opt='lamb'),
        ema=dict(LAYER_NORM, model_ema=True),
        other=dict(LAYER_NORM, experiment='plain', resume='auto'),
        wrapped=dict(SAME, model='resnet18_pspinal'),
    )
    results, _ = sharded('--fsdp_auto_wrap_policy', 'SIZE_BASED_WRAP', '--fsdp_min_num_params', '1', **runs)
    assert results['lamb']['error'].startswith('--opt lamb works on whole weights')
    assert results['ema']['error'].startswith('--model-ema needs the whole weights')
    assert 'the kind of launch that it was written with' in results['other']['error']
    assert re.match('FSDP: this model cannot be sharded so .*ModuleList.* choose another --fsdp_auto_wrap_policy',
                    results['wrapped']['error'])
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ['images', 'plain']


# ---- refused before anything is made ----------------------------------------------------------------------------


@pytest.fixture
def fsdp(monkeypatch):
    """An accelerator says that it shards; version 1, since no plugin of version 2 is there."""
    monkeypatch.setattr('accelerate.Accelerator.distributed_type', property(lambda self: DistributedType.FSDP))


@pytest.mark.parametrize('options, message', [
    (dict(opt='muon'), '--opt muon works on whole weights'),
    (dict(opt='adagrad'), '--opt adagrad works on whole weights'),
    (dict(model_ema=True), '--model-ema needs the whole weights'),
    (dict(clip_grad=0.1, clip_mode='agc'), '--clip-mode agc needs the whole weights'),
    (dict(clip_grad=0.1, clip_mode='value'), '--clip-mode value needs the whole weights'),
    (dict(), 'FSDP of version 1: .*--fsdp_version 2'),
])
def test_options_that_need_whole_weights_are_refused(tmp_path, fsdp, options, message):
    with pytest.raises(UserError, match=message):
        create_accelerator(small_config(tmp_path, **options), [])


@pytest.mark.parametrize('options, flag', [
    (dict(sb_ortho=1., model='resnet32_sb_s16u1_cifar'), '--sb-ortho'), (dict(freeze_epochs=1), '--freeze-epochs')])
def test_options_of_classification_are_refused(tmp_path, fsdp, options, flag):
    with pytest.raises(UserError, match=f'{flag} needs the whole weights'):
        train(small_config(tmp_path, **options))
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('variable, name', [
    ('ACCELERATE_USE_DEEPSPEED', 'DeepSpeed'), ('ACCELERATE_USE_MEGATRON_LM', 'Megatron-LM')])
def test_other_kinds_of_sharding_are_refused(tmp_path, monkeypatch, variable, name):
    monkeypatch.setenv(variable, 'true')
    with pytest.raises(UserError, match=f'^{name} .*launch with --use_fsdp --fsdp_version 2, or with --multi_gpu$'):
        train(small_config(tmp_path))
    assert not (tmp_path / 'run').exists()


def test_fsdp_that_accelerate_does_not_run_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('ACCELERATE_USE_FSDP', 'true')
    monkeypatch.setenv('ACCELERATE_USE_CPU', 'true')
    create_accelerator(small_config(tmp_path), [])
    said = capsys.readouterr().out.splitlines()
    assert said == ['warning: FSDP does not run: Accelerate shards weights on GPUs only, not on cpu, so all of them '
                    'are in each of 1 processes (DDP)']


@pytest.mark.parametrize('name, elementwise', [
    ('sgd', True), ('adamw', True), ('lion', True), ('rmsproptf', True), ('adopt', True), ('lookahead_adamw', True),
    ('lamb', False), ('lars', False), ('adafactor', False), ('muon', False), ('adamp', False), ('cadamw', False),
    ('novograd', False), ('adahessian', False), ('adagrad', False)])
def test_elementwise_optimizers(name, elementwise):
    from timm.optim import create_optimizer_v2
    before = torch.get_rng_state()
    assert is_elementwise(lambda module: create_optimizer_v2(module, name, lr=0.1, weight_decay=0.05)) is elementwise
    assert torch.equal(torch.get_rng_state(), before)


def test_a_failure_of_a_process_is_that_of_all():
    """torch's exception of checkpoints is no `Exception`: who waits for a full disk would not see it."""
    from torch.distributed.checkpoint.api import CheckpointException
    full = OSError(errno.ENOSPC, 'No space left on device')
    with pytest.raises(OSError, match='No space left'), errors_of_shards():
        raise CheckpointException('save', {1: (full, None)})
    with pytest.raises(KeyboardInterrupt), errors_of_shards():
        raise KeyboardInterrupt


def test_errors_of_sharded_operators_are_one_line(fsdp):
    accelerator = Accelerator()
    with pytest.raises(UserError, match='^FSDP: .*got mixed torch.Tensor and DTensor.*launch with --multi_gpu$'), \
            sharding_errors_named(accelerator):
        raise RuntimeError('aten.convolution.default: got mixed torch.Tensor and DTensor,\nneed to convert')
    with pytest.raises(RuntimeError, match='out of memory'), sharding_errors_named(accelerator):
        raise RuntimeError('out of memory')
