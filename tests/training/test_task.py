import pytest
import timm
import torch
import torch.nn.functional as F
from timm.loss import (
    AsymmetricLossMultiLabel,
    BinaryCrossEntropy,
    LabelSmoothingCrossEntropy,
    PolyBinaryCrossEntropy,
    SoftTargetCrossEntropy,
)

from timm_spinal.errors import UserError
from timm_spinal.training import task as task_module
from timm_spinal.training.config import TrainConfig
from timm_spinal.training.task import (
    OBJECTIVES,
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    MultiLabelClassificationTask,
    Task,
    TokenDistillationTask,
    build_penalties,
    build_task,
)

CPU = torch.device('cpu')


def student(name='test_vit', **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=4, **kwargs).eval()


@pytest.fixture
def teacher(tmp_path):
    """Name of a saved model, as a teacher without network."""
    torch.manual_seed(1)
    model = timm.create_model('test_resnet', num_classes=4)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    return f'local-dir:{tmp_path}'


@pytest.mark.parametrize('options, mixup, loss', [
    (dict(smoothing=0.), False, torch.nn.CrossEntropyLoss),
    (dict(smoothing=0.1), False, LabelSmoothingCrossEntropy),
    (dict(smoothing=0.1), True, SoftTargetCrossEntropy),
    (dict(bce_loss=True), False, BinaryCrossEntropy),
    (dict(loss='bce', bce_sum=True, bce_target_thresh=0.2), True, BinaryCrossEntropy),
])
def test_classification_loss(options, mixup, loss):
    task = build_task(TrainConfig(**options), student(), mixup, CPU)
    assert type(task) is ClassificationTask and type(task.criterion) is loss


def test_classification_value():
    model = student()
    images, target = torch.randn(3, 3, 64, 64), torch.tensor([0, 3, 1])
    parts = build_task(TrainConfig(smoothing=0.), model, False, CPU)(images, target)
    assert parts['loss'].item() == pytest.approx(F.cross_entropy(model(images), target).item())


@pytest.mark.parametrize('options, mixup, loss, smoothing', [
    (dict(smoothing=0.1), False, BinaryCrossEntropy, 0.1),
    (dict(loss='bce', smoothing=0.1), True, BinaryCrossEntropy, 0.),
    (dict(loss='asl', smoothing=0.), False, AsymmetricLossMultiLabel, 0.),
    (dict(loss='poly', smoothing=0.), False, PolyBinaryCrossEntropy, 0.),
])
def test_losses_of_several_classes_per_image(options, mixup, loss, smoothing):
    task = build_task(TrainConfig(**options), student(), mixup, CPU, multi_label=True)
    assert type(task) is MultiLabelClassificationTask and type(task.criterion) is loss
    assert task.criterion.smoothing == smoothing
    target = torch.tensor([[1., 0., 0., 1.], [0., 1., 1., 0.]])
    assert task(torch.randn(2, 3, 64, 64), target)['loss'].isfinite()


def test_value_of_several_classes_per_image():
    model = student()
    images, target = torch.randn(2, 3, 64, 64), torch.tensor([[1., 0., 0., 1.], [0., 1., 1., 0.]])
    parts = build_task(TrainConfig(smoothing=0.2), model, False, CPU, multi_label=True)(images, target)
    expected = F.binary_cross_entropy_with_logits(model(images), target * 0.8 + 0.1).item()
    assert parts['loss'].item() == pytest.approx(expected)


@pytest.mark.parametrize('name', OBJECTIVES)
def test_every_objective_can_be_told_how_long_the_run_is_and_where_it_stands(name, teacher):
    kind = dict(kd_model_name=teacher, kd_distill_type=name) if 'class' not in name and 'label' not in name else {}
    model = student('deit_tiny_distilled_patch16_224', img_size=32) if name == 'token' else student()
    task = build_task(TrainConfig(**kind), model, False, CPU, multi_label=name == 'multi_label')
    assert isinstance(task, Task) and task.get_trainable_module() is task.trainable_module
    before = task.get_checkpoint_state()['state_dict']
    task.set_length(4, 10, 2)
    task.start_epoch(2, 3, 10)
    assert task.get_task_state().get('batches') == (23 if name == 'wld' else None)
    assert all(torch.equal(value, before[key]) for key, value in task.get_checkpoint_state()['state_dict'].items())


def test_options_reach_bce():
    task = build_task(TrainConfig(bce_loss=True, smoothing=0.2, bce_target_thresh=0.3, bce_sum=True, bce_pos_weight=2.),
                      student(), False, CPU)
    criterion = task.criterion
    assert (criterion.smoothing, criterion.target_threshold, criterion.sum_classes) == (0.2, 0.3, True)
    assert criterion.pos_weight.item() == 2.


def test_logit_distillation_value(teacher):
    config = TrainConfig(kd_model_name=teacher, kd_temperature=2., distill_loss_weight=0.5, smoothing=0.)
    model = student()
    task = build_task(config, model, False, CPU).eval()
    assert type(task) is LogitDistillationTask
    assert not any(p.requires_grad for p in task.teacher.parameters())
    assert not task.train().teacher.training
    images, target = torch.randn(3, 3, 64, 64), torch.tensor([0, 3, 1])
    parts = task.eval()(images, target)
    with torch.no_grad():
        given = F.log_softmax(task.teacher.model(images) / 2, dim=-1)
        learnt = F.log_softmax(model(images) / 2, dim=-1)
    kd = F.kl_div(learnt, given, reduction='batchmean', log_target=True) * 4
    assert parts['kd_loss'].item() == pytest.approx(kd.item(), abs=1e-5)
    assert parts['loss'].item() == pytest.approx(parts['task_loss'].item() + 0.5 * kd.item(), abs=1e-5)


def test_feature_distillation_has_a_projection(teacher):
    task = build_task(TrainConfig(kd_model_name=teacher, kd_distill_type='feature'), student(), False, CPU)
    assert type(task) is FeatureDistillationTask
    assert task.trainable_module.projection.weight.shape == (task.teacher.model.head_hidden_size, 64)


def test_token_distillation(teacher):
    model = student('deit_tiny_distilled_patch16_224', img_size=32)
    config = TrainConfig(kd_model_name=teacher, kd_distill_type='token', kd_token_distill_type='hard')
    task = build_task(config, model, False, CPU)
    assert type(task) is TokenDistillationTask and task.distill_type == 'hard'
    with pytest.raises(UserError, match='set_distilled_training'):
        build_task(config, student(), False, CPU)


@pytest.mark.parametrize('options', [dict(bce_sum=True), dict(loss='ce', bce_target_thresh=0.2),
                                     dict(kd_model_name='no_such_model'), dict(kd_model_name='local-dir:/nowhere')])
def test_errors_are_one_line(options):
    with pytest.raises(UserError) as error:
        build_task(TrainConfig(**options), student(), False, CPU)
    assert '\n' not in str(error.value)


def test_penalties(monkeypatch):
    monkeypatch.setattr(task_module, 'PENALTIES', dict(
        weights=lambda config, model: lambda: model.head.weight.square().sum(), off=lambda config, model: None))
    model = student()
    penalties = build_penalties(TrainConfig(), model)
    assert list(penalties) == ['weights']
    assert penalties['weights']().item() == pytest.approx(model.head.weight.square().sum().item())
