import csv
from dataclasses import replace

import pytest
import timm
import torch

from timm_spinal.errors import UserError
from timm_spinal.models._shared_model import SharedBasisModel
from timm_spinal.training.config import TrainConfig
from timm_spinal.training.parser import parse_config
from timm_spinal.training.task import build_penalties
from timm_spinal.training.train import train

from .runs import small_config

MODEL = dict(model='resnet18_sb_s32u1', model_kwargs=dict(sb_rank=4))


def shared(**kwargs):
    torch.manual_seed(0)
    model = timm.create_model('resnet18_sb_s32u1', sb_rank=4, num_classes=3, **kwargs)
    with torch.no_grad():
        model.layer2.basis.mul_(2.)
    return model


@pytest.mark.parametrize('mode', ['official', 'stage'])
def test_penalty_is_the_weighted_distance(mode):
    model = shared()
    penalty, = build_penalties(TrainConfig(sb_ortho=10., sb_ortho_mode=mode), model).values()
    value = penalty()
    assert value.item() == pytest.approx(10 * model.orthogonality_loss(mode).item()) and value.item() > 0
    # rows of norm 2 in one of four stages of 4, 8, 16 and 32 filters: (4 - 1)^2 on the diagonal
    expected = {'official': 8 * 9 / (16 + 64 + 256 + 1024), 'stage': 8 * 9 / 8}[mode]
    assert value.item() == pytest.approx(10 * expected, rel=1e-4)
    value.backward()
    with_grad = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_grad == {f'layer{g}.basis' for g in (1, 2, 3, 4)}


def test_heads_keep_the_penalty():
    import timm_spinal
    model = timm_spinal.attach_head(shared(), 'spinal', head_width=8)
    assert list(build_penalties(TrainConfig(sb_ortho=1.), model)) == ['ortho']


def test_off_by_default():
    assert build_penalties(TrainConfig(), shared()) == {}
    config = parse_config(['--sb-ortho', '10', '--sb-ortho-mode', 'stage'])
    assert (config.sb_ortho, config.sb_ortho_mode) == (10., 'stage')


@pytest.mark.parametrize('model, message', [
    (lambda: timm.create_model('resnet18', device='meta'), 'has no shared filter bases; take a model such as'),
    (lambda: timm.create_model('resnet18_sb_s32u1', sb_rank=0, sb_unique=4), r'no shared filters \(S0\)'),
])
def test_models_without_shared_filters(model, message):
    with pytest.raises(UserError, match=f'--sb-ortho 10: .*{message}'):
        build_penalties(TrainConfig(sb_ortho=10.), model())


@pytest.mark.parametrize('options, message', [
    (dict(sb_rank=600), '600 shared and 1 unique filters are more than the 576'),
    (dict(sb_rank=0, sb_unique=0), r'without shared \(S0\) and without unique filters \(U0\) is empty'),
])
def test_ranks_that_do_not_fit(tmp_path, options, message):
    config = small_config(tmp_path, model='resnet18_sb_s32u1', model_kwargs=options)
    with pytest.raises(UserError, match=f'model resnet18_sb_s32u1: .*{message}') as error:
        train(config)
    assert '\n' not in str(error.value) and '.;' not in str(error.value) and not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_once_per_update_and_in_the_summary(tmp_path, monkeypatch):
    """Five batches in windows of two are three updates; the column holds the penalty, curves.png its panel."""
    values = []
    original = SharedBasisModel.orthogonality_loss

    def counting(self, mode='official'):
        values.append(original(self, mode))
        return values[-1]

    monkeypatch.setattr(SharedBasisModel, 'orthogonality_loss', counting)
    config = small_config(tmp_path, epochs=1, grad_accum_steps=2, sb_ortho=10., opt='sgd', **MODEL)
    train(config)
    assert len(values) == 1 + 3  # the factory looks at it once
    row, = csv.DictReader((tmp_path / 'run' / 'summary.csv').open())
    images = torch.tensor([8., 8., 4.])
    mean = (10 * torch.stack(values[1:]).detach() * images).sum() / images.sum()
    assert float(row['train_ortho']) == pytest.approx(mean.item(), rel=1e-4)
    assert (tmp_path / 'run' / 'curves.png').stat().st_size > 0
    train(replace(config, sb_ortho=0., experiment='without'))
    assert 'train_ortho' not in (tmp_path / 'without' / 'summary.csv').read_text()
