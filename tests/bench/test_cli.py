"""The command line of the comparisons, and what their sides are."""
import inspect

import pytest
import torch

from timm_spinal.bench.cli import COMPARISONS
from timm_spinal.bench.layers import head_call
from timm_spinal.bench.models import plain_model
from timm_spinal.bench.runner import Setting
from timm_spinal.cli import main

SMALL = ['--img-size', '32', '-b', '2', '--rounds', '1']


@pytest.mark.parametrize('name, plain', [
    ('resnet50_pspinal', 'resnet50'), ('icresnext50_32x4d', 'resnext50_32x4d'), ('resnet34_sb_s48u1d', 'resnet34'),
    ('resnet50_sbpp', 'resnet50'), ('resnet32_sb_s16u1_cifar', 'resnet32_cifar'),
    ('icresnet20_cifar', 'resnet20_cifar'),
])
def test_the_plain_model_beside_a_name(name, plain):
    assert plain_model(name) == plain


@pytest.mark.parametrize('name', COMPARISONS)
def test_names_of_a_prepared_comparison_stand_in_their_order(name):
    """The first side is what the comparison is about."""
    comparison = COMPARISONS[name]
    pairs = comparison.pairs(comparison.models)
    first = {'routing': 'lean', 'train': 'our', 'step': 'our', 'data': 'our', 'features': 'features'}.get(name)
    for pair in pairs:
        if pair.note is not None:
            assert pair.against.name == plain_model(pair.what.name)
            assert (pair.what.args[0], pair.against.args[0]) == (pair.what.name, pair.against.name)
        else:
            assert pair.what.name.startswith(first or 'packed')
    assert pairs and comparison.title


@pytest.mark.parametrize('name', ('routing', 'xnor'))
def test_both_sides_of_a_layer_give_the_same(name):
    setting = Setting(batch_size=2)
    pairs = [pair for pair in COMPARISONS[name].pairs(()) if '1,000' not in pair.form and '10,000' not in pair.form]
    assert len(pairs) == 4
    for pair in pairs:
        torch.testing.assert_close(pair.what.call(setting)(), pair.against.call(setting)(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize('layer', ('xnodr', 'xnidr'))
@pytest.mark.parametrize('packed', (True, False))
def test_the_packed_side_is_packed(layer, packed):
    call = head_call(Setting(batch_size=1), layer, 3, packed)
    head = inspect.getclosurevars(inspect.unwrap(call)).nonlocals['head']
    assert any(getattr(module, 'packed', False) for module in head.modules()) == packed


def test_a_larger_head_takes_longer(capsys):
    """So the ratio is that of the model with the head to the plain one, and the sizes stand in that order."""
    assert main(['bench', 'test_efficientnet_caps', *SMALL, '--rounds', '5', '--img-size', '64', '-b', '8']) == 0
    head, sizes, line = capsys.readouterr().out.splitlines()
    assert line.startswith('test_efficientnet_caps / test_efficientnet, eager: ')
    assert float(line.split(': ')[1].split()[0]) > 1.5
    large, small = (float(side.split(': ')[1].split()[0]) for side in sizes.split('; '))
    assert sizes.startswith('test_efficientnet_caps: ') and large > small == pytest.approx(0.36, abs=0.01)


def test_any_two_models_in_any_form(capsys):
    forms = ['eager', 'folded', 'merged', 'packed', 'training']
    assert main(['bench', 'test_resnet_xnodr', 'test_efficientnet', *SMALL, '--forms', *forms]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split(': ')[0] for line in lines] == [f'test_resnet_xnodr / test_efficientnet, {f}' for f in forms]


@pytest.mark.slow
def test_onnxruntime_and_int8(capsys):
    pytest.importorskip('onnxruntime')
    assert main(['bench', 'test_resnet_mlp', *SMALL, '--forms', 'onnxruntime', 'int8']) == 0
    assert [line.split(', ')[1].split(':')[0] for line in capsys.readouterr().out.splitlines()[2:]] == [
        'onnxruntime', 'int8']


@pytest.mark.parametrize('argv, text', [
    (['nosuch'], 'nosuch: neither a comparison nor a model has this name; '),
    (['resnet18'], 'resnet18: there is no plain model to compare it with; name a second model'),
    (['routing', 'resnet18'], 'bench routing: it measures layers and takes no models; leave out resnet18'),
    (['ic', '--forms', 'int8'], '--forms int8: the comparison ic has none of these'),
    (['heads', '--device', 'cud'], '--device cud: torch finds no such device'),
    (['heads', '--rounds', '0'], '--rounds: must be at least 1, got 0'),
])
def test_errors_are_one_line(argv, text, capsys):
    assert main(['bench', *argv]) == 2
    err = capsys.readouterr().err
    assert text in err and len(err.splitlines()) == 1


@pytest.mark.slow
def test_compiled_forms(capsys):
    assert main(['bench', 'test_resnet_mlp', *SMALL, '--forms', 'compiled', 'compiled training']) == 0
    assert [line.split(', ')[1].split(':')[0] for line in capsys.readouterr().out.splitlines()[2:]] == [
        'compiled', 'compiled training']
