import csv
from dataclasses import asdict, replace

import pytest
import torch
from PIL import Image

from timm_spinal.cli import main as cli
from timm_spinal.compare import gradflow as module
from timm_spinal.compare.gradflow import GradflowConfig, GradientWatch, gradflow
from timm_spinal.compare.gradflow_report import GradientRecord, read_records, report, smooth
from timm_spinal.errors import UserError
from timm_spinal.training.train import train

from ..training.runs import assert_same_state, at_update, small_config

BASES = ['stages.1.basis', 'stages.2.basis', 'stages.3.basis']


def small(tmp_path, **options):
    """Two epochs of five batches on noise images."""
    config = small_config(
        tmp_path, model='resnet32_sb_s8u1_cifar', model_kwargs=dict(depth=2), epochs=2, opt='sgd', experiment='flow',
        drop=0., **options)
    return GradflowConfig(**asdict(config), grad_interval=2)


@pytest.mark.slow
def test_gradient_is_that_of_the_loss_alone(tmp_path, monkeypatch):
    """Equal to what training without the penalty steps by; with it, the penalty's gradient is left out."""
    stepped = []

    class Both(GradientWatch):
        def __init__(self, run, interval, rows):
            super().__init__(run, interval, rows)
            for name, basis in self.bases.items():
                basis.register_post_accumulate_grad_hook(lambda p, name=name: stepped.append((
                    run.folder.name, run.progress.updates, name, p.grad.abs().mean().item(),
                    p.grad.abs().max().item())))

    monkeypatch.setattr(module, 'GradientWatch', Both)
    output = gradflow(small(tmp_path))
    rows = read_records(output / 'gradients.csv')
    assert [row.arm for row in rows] == ['without_penalty'] * 15 + ['with_penalty'] * 15
    assert [(row.update, row.basis) for row in rows[:15]] == [(u, b) for u in (0, 2, 4, 6, 8) for b in BASES]
    assert [row.epoch for row in rows[:15:3]] == pytest.approx([0., 0.4, 0.8, 1.2, 1.6])
    total = {step[:3]: step[3:] for step in stepped}
    for row in rows[:15]:
        assert (row.mean, row.max) == pytest.approx(total[row[0], row.update, row.basis], rel=1e-4)
    # the same weights and images at first, so the same gradient; what training steps by is then another one
    for without, with_ in zip(rows[:3], rows[15:18]):
        assert with_[4:] == pytest.approx(without[4:], rel=1e-5)
    apart = [abs(total[row[0], row.update, row.basis][0] / row.mean - 1) for row in rows[18:]]
    assert max(apart) > 0.01
    assert Image.open(output / 'gram.png').width > 300 and Image.open(output / 'gradients.png').width > 300
    text = (output / 'report.md').read_text()
    assert 'greater with the penalty in' in text and 'Validation top-1 with penalty' in text


@pytest.mark.slow
@pytest.mark.parametrize('options', [dict(), dict(grad_accum_steps=2, clip_grad=0.1, model_ema=True)])
def test_watching_changes_nothing(tmp_path, options):
    config = small(tmp_path, sb_ortho=10., **options)
    gradflow(config)
    plain = small_config(
        tmp_path, **{k: v for k, v in asdict(config).items() if k not in ('grad_interval', 'experiment')},
        experiment='plain')
    train(plain)
    assert_same_state(replace(plain, output=str(tmp_path / 'flow'), experiment='with_penalty'), plain)


@pytest.mark.slow
def test_resumed(tmp_path, monkeypatch):
    """Stopped in the second epoch of the first arm: it goes on and ends with the same records."""
    whole = gradflow(small(tmp_path))
    config = replace(small(tmp_path), experiment='again')

    def stop():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_update(patch, 8, stop)
        gradflow(config)
    assert [row.update for row in read_records(tmp_path / 'again' / 'with_penalty' / 'gradients.csv')][::3] == [0, 2, 4]
    again = gradflow(replace(config, resume='auto'))
    assert read_records(again / 'gradients.csv') == read_records(whole / 'gradients.csv')
    (again / 'gradients.csv').unlink()
    gradflow(replace(config, resume='auto'))  # nothing is left to train
    assert read_records(again / 'gradients.csv') == read_records(whole / 'gradients.csv')


@pytest.mark.parametrize('flags, message', [
    (['--model', 'resnet32_cifar'], '--sb-ortho 10: resnet32_cifar has no shared filter bases'),
    (['--model', 'resnet32_sb_s16u1_cifar', '--torchcompile'], '--torchcompile: a compiled model'),
    (['--model', 'resnet32_sb_s16u1_cifar', '--grad-checkpointing'], '--grad-checkpointing: each gradient would'),
    (['--grad-interval', '0'], "--grad-interval: '0' is too small; give at least 1"),
    (['--grad-intervall', '3'], 'did you mean --grad-interval'),
])
def test_refusals_write_nothing(tmp_path, capsys, flags, message):
    small(tmp_path)
    before = sorted(tmp_path.rglob('*'))
    given = ['--data-dir', str(tmp_path / 'images'), '--output', str(tmp_path), '--workers', '0', '--batch-size', '4']
    assert cli(['gradflow', *given, *flags]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob('*')) == before


@pytest.mark.slow
def test_an_earlier_run_is_kept(tmp_path):
    config = small(tmp_path)
    output = gradflow(config)
    before = (output / 'gradients.csv').read_bytes()
    with pytest.raises(UserError, match='contains a run already; continue with --resume auto'):
        gradflow(config)
    assert (output / 'gradients.csv').read_bytes() == before


def test_report_by_hand():
    rows = [GradientRecord('without', u, 0., b, m, 10 * m, n)
            for b, m, n in (('a', 1e-3, 2.), ('b', 4e-3, 1.)) for u in range(3)]
    rows += [GradientRecord('with', u, 0., b, m, 10 * m, 1.) for b, m in (('a', 3e-3), ('b', 3e-3)) for u in range(3)]
    text = report(rows, {'without': dict(top1=50.), 'with': dict(top1=60.5)}, GradflowConfig(model='m', sb_ortho=10.))
    table = [[cell.strip() for cell in line.strip('|').split('|')] for line in text.splitlines() if line[:3] == '| a']
    assert text.count(r'mean \|dL/dB\|, without | with | ratio') == 1
    assert [table[0][i] for i in (1, 2, 3, 6, 7, 9)] == ['1.00e-03', '3.00e-03', '3.00', '3.00', '2.00e-03', '1.50']
    assert 'mean |dL/dB|: greater with the penalty in 1 of 2 bases (0.75 to 3.00 times). From the smallest to the ' \
           'greatest basis it differs 4.0 times without and 1.0 times with it.' in text
    assert 'a 2.00 and 1.00' in text and 'top-1 with: 60.50 %' in text


def test_smooth():
    assert smooth([1., 9., 2., 3., 8.], 3).tolist() == [5., 2., 3., 3., 5.5]


@pytest.mark.slow
def test_two_processes_record_the_gradient_of_all_images(tmp_path, launch):
    config = small(tmp_path)
    launch(2, '-m', 'timm_spinal.compare.gradflow', '--data-dir', config.data_dir, '--model', config.model,
           '--model-kwargs', 'depth=2', '--img-size', '32', '--batch-size', '4', '--epochs', '1', '--opt', 'sgd',
           '--workers', '0', '--output', str(tmp_path), '--experiment', 'two', '--grad-interval', '1')
    rows = list(csv.DictReader((tmp_path / 'two' / 'gradients.csv').open()))
    # 22 images, filled up to three batches of four in each process
    assert len(rows) == 2 * 3 * 3 and all(float(row['mean']) > 0 for row in rows)
    assert torch.tensor([float(row['max']) for row in rows]).isfinite().all()
