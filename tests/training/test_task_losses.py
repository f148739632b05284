import pytest
import timm
import torch

import timm_spinal
from timm_spinal.errors import UserError
from timm_spinal.training.config import TrainConfig
from timm_spinal.training.parser import parse_config
from timm_spinal.training.task import MarginLoss, SquaredHingeLoss, build_task

CPU = torch.device('cpu')


def test_margin_by_hand():
    scores = torch.tensor([[0.5, 0.3, 0.], [1.2, 0.1, 0.2]])
    target = torch.tensor([0, 2])
    expected = ((0.4 ** 2 + 0.5 * 0.2 ** 2) + (0.7 ** 2 + 0.5 * 1.1 ** 2)) / 2
    assert MarginLoss()(scores, target).item() == pytest.approx(expected)


def test_squared_hinge_by_hand():
    scores = torch.tensor([[0.5, 0.25]])
    assert SquaredHingeLoss()(scores, torch.tensor([1])).item() == pytest.approx((1.5 ** 2 + 0.75 ** 2) / 2)


def test_floors_at_perfect_answers():
    """See docs/papers/xnodr_xnidr.md, section 6: an absent class of length 0 still costs 1."""
    perfect = torch.eye(10)[[3]]
    assert SquaredHingeLoss()(perfect, torch.tensor([3])).item() == pytest.approx(0.9)
    two = torch.zeros(1, 10).index_fill(1, torch.tensor([2, 7]), 1.)
    assert SquaredHingeLoss()(two, two).item() == pytest.approx(0.8)
    assert MarginLoss()(perfect, torch.tensor([3])).item() == 0.


@pytest.mark.parametrize('loss', [MarginLoss, SquaredHingeLoss])
def test_kinds_of_targets(loss):
    torch.manual_seed(0)
    scores, index = torch.rand(4, 5), torch.tensor([0, 3, 4, 1])
    dense = torch.nn.functional.one_hot(index, 5)
    assert loss()(scores, dense).item() == pytest.approx(loss()(scores, index).item())
    smooth = dense * 0.8 + 0.2 / 5
    assert loss(smoothing=0.2)(scores, index).item() == pytest.approx(loss()(scores, smooth).item())
    # several classes per image: every membership towards a half, as timm's binary cross-entropy does it
    pairs = torch.eye(5)[[0, 1, 2, 3]] + torch.eye(5)[[4, 0, 1, 2]]
    assert loss(smoothing=0.2)(scores, pairs).item() == pytest.approx(loss()(scores, pairs * 0.8 + 0.1).item())


def test_half_precision_scores_are_summed_in_float32():
    assert MarginLoss()(torch.zeros(2, 3, dtype=torch.float16), torch.tensor([0, 1])).dtype == torch.float32


@pytest.mark.parametrize('name, loss', [('margin', MarginLoss), ('squared_hinge', SquaredHingeLoss)])
def test_trainer_uses_them_for_several_classes_per_image(name, loss):
    config = parse_config(['--loss', name, '--smoothing', '0.3'])
    model = timm_spinal.attach_head(timm.create_model('test_efficientnet'), 'caps', num_classes=4, head_capsules=8)
    task = build_task(config, model.eval(), False, CPU, multi_label=True)
    images, target = torch.randn(2, 3, 64, 64), torch.tensor([[1., 0., 1., 0.], [0., 0., 1., 1.]])
    expected = loss()(model(images), target * 0.7 + 0.15).item()
    assert task(images, target)['loss'].item() == pytest.approx(expected)


@pytest.mark.parametrize('name, loss', [('margin', MarginLoss), ('squared_hinge', SquaredHingeLoss)])
@pytest.mark.parametrize('mixup', [False, True])
def test_trainer_uses_them(name, loss, mixup):
    config = parse_config(['--loss', name, '--smoothing', '0.3'])
    model = timm_spinal.attach_head(timm.create_model('test_efficientnet'), 'xnodr', num_classes=4, head_capsules=8)
    task = build_task(config, model, mixup, CPU)
    assert type(task.criterion) is loss and task.criterion.smoothing == (0. if mixup else 0.3)
    images, target = torch.randn(3, 3, 64, 64), torch.tensor([0, 3, 1])
    model.eval()
    expected = loss(task.criterion.smoothing)(model(images), target).item()
    assert task(images, target)['loss'].item() == pytest.approx(expected)


def test_lengths_made_logits_are_refused():
    model = timm.create_model('test_efficientnet', num_classes=4)
    timm_spinal.attach_head(model, 'caps', head_logit_scale=True)
    with pytest.raises(UserError, match='--loss margin: .*leave out head_logit_scale, or use --loss ce'):
        build_task(TrainConfig(loss='margin'), model, False, CPU)
    task = build_task(TrainConfig(loss='ce', smoothing=0.), model, False, CPU)
    assert type(task.criterion) is torch.nn.CrossEntropyLoss
