import pytest
import timm
import torch

from timm_spinal.bench import basis, fastest_bases
from timm_spinal.bench.timing import Ratio
from timm_spinal.errors import UserError
from timm_spinal.models import merge_bases

ONE = basis.Setting(batch_size=1, image_size=32, rounds=1)


def test_inference_compares_forms_and_counts_macs():
    """The MACs of spec shared_basis 4.1, and merged the plain net's."""
    assert list(basis.FORMS) == ['as created', 'bases folded', 'all norms folded', 'merged']
    for form in basis.FORMS:
        macs = 1. if form == 'merged' else 2.479 / 3.664
        ratio, got = basis.inference_ratio(basis.Row('resnet34_sb_s32u1', form, 1.), ONE)
        assert ratio.rounds == 1 and ratio.median > 0
        assert got == pytest.approx(macs, abs=3e-3)  # at 32 px the classifier counts for more


@torch.no_grad()
def test_without_norms_the_same_is_computed():
    x = torch.randn(2, 3, 64, 64)
    for name in ('resnet34', 'resnet34_sb_s32u1'):
        torch.manual_seed(0)
        model = timm.create_model(name).eval()
        folded = basis.FORMS['all norms folded'](model)
        assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
        expected = model(x)
        assert (folded(x) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_training_and_penalty_are_timed():
    assert basis.training_ratio(basis.TRAINING, basis.Setting(2, 32, 1)).median > 0
    assert basis.ortho_ratio(basis.Row('resnet18_sb_s32u1', '', 1.), 32, batch_size=2, rounds=1).median > 0


def test_everything_shrinks_with_the_parameters(tmp_path):
    plain, shared = basis.sizes('resnet34', tmp_path), basis.sizes('resnet34_sb_s32u1', tmp_path)
    assert (plain['parameters'], shared['parameters']) == (21_797_672, 8_196_056)
    for key in ('gradients', 'optimizer'):
        assert (plain[key], shared[key]) == (plain['parameters'], shared['parameters'])
    # the file holds running statistics as well
    assert shared['file'] / plain['file'] == pytest.approx(8_196_056 / 21_797_672, abs=0.005)


@pytest.mark.parametrize('faster', ['folded', 'merged', 'both'])
def test_fastest_form_is_what_was_measured(monkeypatch, faster):
    """Times are made up here, one pair for each stage; what is built of them is not."""
    ratios = dict(folded=[0.5] * 4, merged=[1.5] * 4, both=[1.2, 0.8, 0.9, 1.1])[faster]
    made = iter(ratios)
    monkeypatch.setattr(fastest_bases, 'paired_times', lambda a, b, rounds: ((a(), b()), ([next(made)], [1.]))[1])
    torch.manual_seed(0)
    model, x = timm.create_model('resnet18_sb_s32u1', num_classes=5).eval(), torch.randn(1, 3, 32, 32)
    got, forms = fastest_bases.fastest_bases(model, x)
    assert [form.folded_to_merged.median for form in forms.values()] == ratios
    sharing = [name for name, ratio in zip(forms, ratios) if ratio < 1]
    assert [name for name, form in forms.items() if form.form == 'folded'] == sharing
    if sharing:
        assert list(got.shared_stages()) == sharing and got._model_args['sb_folded']
    else:
        assert type(got) is type(merge_bases(model))
    with torch.no_grad():
        torch.testing.assert_close(got(x), model(x), rtol=1e-4, atol=1e-5)


def test_fastest_form_is_measured_with_the_models_own_inputs():
    model = timm.create_model('resnet18_sb_s32u1').eval()
    got, forms = fastest_bases.fastest_bases(model, torch.randn(1, 3, 32, 32), rounds=2)
    assert list(forms) == ['layer1', 'layer2', 'layer3', 'layer4']
    assert all(form.folded_to_merged.rounds == 2 for form in forms.values())
    with pytest.raises(ValueError, match='in training mode'):
        fastest_bases.fastest_bases(model.train(), torch.randn(1, 3, 32, 32))


def test_main_says_what_was_met(monkeypatch, capsys):
    monkeypatch.setattr(basis, 'inference_ratio', lambda row, setting: (Ratio(0.9, 0.8, 1., 3), 0.677))
    monkeypatch.setattr(basis, 'training_ratio', lambda row, setting: Ratio(0.8, 0.8, 0.9, 3))
    monkeypatch.setattr(basis, 'ortho_ratio', lambda row, size: Ratio(0.01, 0.01, 0.02, 3))
    assert basis.main(['--skip', 'size', 'forms']) == 1
    out = capsys.readouterr().out
    assert out.count('missed') == 3 and out.count('met') == 6 and 'MACs 0.677' in out
    assert basis.main(['--skip', 'inference', 'size', 'forms']) == 0


@pytest.mark.parametrize('argv', [['--rounds', '0'], ['-b', '0'], ['--threads', '-1'], ['--img-size', '0']])
def test_bad_input(argv):
    with pytest.raises(UserError, match='must be at least 1'):
        basis.main(argv)
