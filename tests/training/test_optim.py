import math

import pytest
import timm
import torch
from accelerate import Accelerator
from timm.optim import list_optimizers
from timm.task import ClassificationTask

from timm_spinal.errors import UserError
from timm_spinal.training.config import TrainConfig
from timm_spinal.training.optim import (
    apply_freeze,
    can_fuse,
    clip_gradients,
    create_optimizer,
    create_scheduler,
    load_scheduler_state,
    resolve_lr,
    scheduler_state,
)


@pytest.mark.parametrize('options, batch, lr', [
    (dict(lr=0.3), 512, 0.3),
    (dict(lr_base=0.1), 512, 0.2),
    (dict(lr_base=0.1, opt='adamw'), 512, 0.1 * math.sqrt(2)),
    (dict(lr_base=0.1, opt='lamb', lr_base_scale='linear'), 512, 0.2),
    (dict(lr_base=0.1, lr_base_size=128, lr_base_scale='sqrt'), 512, 0.2),
])
def test_lr(options, batch, lr):
    assert resolve_lr(TrainConfig(**options), batch) == pytest.approx(lr)


def model(name='test_vit'):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3)


def test_groups_of_weight_decay():
    optimizer = create_optimizer(TrainConfig(opt='adamw', weight_decay=0.05, opt_betas=[0.8, 0.9]), model(), 0.1)
    sizes = {g['weight_decay']: g['params'] for g in optimizer.param_groups}
    assert set(sizes) == {0., 0.05}
    assert all(p.ndim > 1 for p in sizes[0.05]) and any(p.ndim <= 1 for p in sizes[0.])
    assert optimizer.defaults['betas'] == (0.8, 0.9) and optimizer.param_groups[0]['lr'] == 0.1


def test_layer_decay():
    optimizer = create_optimizer(TrainConfig(layer_decay=0.5, layer_decay_min_scale=0.2), model(), 0.1)
    scales = sorted({g['lr_scale'] for g in optimizer.param_groups})
    assert scales[0] == 0.2 and scales[-1] == 1. and 0.5 in scales


def test_frozen_parameters_are_left_out():
    net = model()
    apply_freeze(net, 'backbone')
    optimizer = create_optimizer(TrainConfig(), net, 0.1)
    assert sum(p.numel() for g in optimizer.param_groups for p in g['params']) == 64 * 3 + 3


@pytest.mark.parametrize('options, text', [
    (dict(opt='adammw'), "unknown optimizer 'adammw'; the nearest are .*adamw"),
    (dict(opt='adamw', opt_kwargs=dict(betaz=1)), "optimizer adamw: .*betaz"),
])
def test_optimizer_errors(options, text):
    with pytest.raises(UserError, match=text):
        create_optimizer(TrainConfig(**options), model(), 0.1)


# bnb and fused need packages that timm does not bring; kron compiles for a minute
@pytest.mark.parametrize('name', ['lookahead_adamw', *list_optimizers(exclude_filters=['*bnb*', 'fused*', 'kron*'])])
def test_every_optimizer_takes_a_step_under_accelerate(name):
    accelerator = Accelerator()
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(8, 2))
    optimizer = create_optimizer(TrainConfig(opt=name), net, 0.01)
    net, optimizer = accelerator.prepare(net, optimizer)
    before = [p.clone() for p in net.parameters()]
    for _ in range(2):
        loss = net(torch.ones(2, 1, 4, 4)).square().sum()
        second = getattr(optimizer.optimizer, 'is_second_order', False)
        accelerator.backward(loss, **(dict(create_graph=True) if second else {}))
        optimizer.step()
        optimizer.zero_grad()
    after = list(net.parameters())
    assert all(p.isfinite().all() for p in after)
    assert any(not torch.equal(a, b) for a, b in zip(after, before))


def lrs(config, epochs, updates, per_update):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.)
    scheduler, total = create_scheduler(config, optimizer, updates)
    values = [optimizer.param_groups[0]['lr']]
    for epoch in range(epochs):
        for i in range(updates):
            scheduler.step_update(epoch * updates + i + 1)
            if per_update:
                values.append(optimizer.param_groups[0]['lr'])
        scheduler.step(epoch + 1)
        if not per_update:
            values.append(optimizer.param_groups[0]['lr'])
    return values, total


def test_cosine_per_epoch_and_per_update():
    half = [0.5 + 0.5 * math.cos(math.pi * t / 4) for t in range(5)]
    values, epochs = lrs(TrainConfig(epochs=4, warmup_epochs=0), 4, 3, per_update=False)
    assert values == pytest.approx(half[:4] + [0.]) and epochs == 4
    values, epochs = lrs(TrainConfig(epochs=2, warmup_epochs=0, sched_on_updates=True), 2, 2, per_update=True)
    assert values == pytest.approx(half[:4] + [0.]) and epochs == 2


def test_epochs_of_the_schedule():
    config = TrainConfig(epochs=4, warmup_epochs=2, warmup_prefix=True, cooldown_epochs=3)
    assert lrs(config, 1, 1, False)[1] == 9


@pytest.mark.parametrize('name', ['cosine', 'tanh', 'step', 'multistep', 'poly', 'constant', 'wsd', 'rsqrt', 'plateau'])
def test_every_schedule(name):
    values, _ = lrs(TrainConfig(sched=name, epochs=10, warmup_epochs=2, warmup_lr=0.01), 10, 2, per_update=False)
    assert values[0] == pytest.approx(0.01) and max(values) <= 1. and values[2] > values[1] > values[0]


def test_no_schedule():
    assert create_scheduler(TrainConfig(sched='none'), torch.optim.SGD([torch.zeros(1)], lr=1.), 3)[0] is None


def test_schedule_error():
    with pytest.raises(UserError, match='schedule wsd'):
        create_scheduler(TrainConfig(sched='wsd', epochs=2, warmup_epochs=5), torch.optim.SGD([torch.zeros(1)]), 3)


def test_plateau_goes_on_where_it_was():
    config = TrainConfig(sched='plateau', warmup_epochs=0, patience_epochs=1)
    metrics = [1., 1., 1., 1., 1., 1.]

    def follow(stop):
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.)
        scheduler, _ = create_scheduler(config, optimizer, 1)
        for epoch, metric in enumerate(metrics):
            if epoch == stop:
                saved, lr = scheduler_state(scheduler), optimizer.param_groups[0]['lr']
                optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.)
                scheduler, _ = create_scheduler(config, optimizer, 1)
                optimizer.param_groups[0]['lr'] = lr
                load_scheduler_state(scheduler, saved)
            scheduler.step(epoch + 1, metric)
        return optimizer.param_groups[0]['lr']

    assert follow(None) == pytest.approx(0.01)
    assert [follow(stop) for stop in range(1, 6)] == [follow(None)] * 5


def gradients(task):
    return [p.grad.clone() for p in task.trainable_module.parameters()]


def task_with_gradients():
    torch.manual_seed(0)
    task = ClassificationTask(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)), verbose=False)
    (100 * task.trainable_module(torch.ones(3, 4)).sum()).backward()
    return task


@pytest.mark.slow
def test_clip_norm():
    task = task_with_gradients()
    clip_gradients(Accelerator(), task, 0.5, 'norm')
    norm = torch.stack([g.norm() for g in gradients(task)]).norm()
    assert norm.item() == pytest.approx(0.5, rel=1e-4)


def test_clip_value():
    task = task_with_gradients()
    clip_gradients(Accelerator(), task, 0.25, 'value')
    assert max(g.abs().max().item() for g in gradients(task)) == 0.25


def test_clip_agc_leaves_the_head():
    task = task_with_gradients()
    before = gradients(task)
    clip_gradients(Accelerator(), task, 0.01, 'agc')
    after = gradients(task)
    weight = task.trainable_module[0].weight.detach()
    assert torch.equal(before[2], after[2]) and torch.equal(before[3], after[3])
    assert torch.all(after[0].norm(dim=1) <= 0.01 * weight.norm(dim=1).clamp(min=1e-3) * 1.001)


@pytest.mark.parametrize('opt, options, fused', [
    ('adamw', {}, True), ('sgd', {}, True), ('momentum', {}, True), ('lookahead_adamw', {}, True), ('lamb', {}, False),
    ('adamw', dict(foreach=True), False), ('adamw', dict(fused=False), False), ('adamw', dict(amsgrad=True), True),
])
def test_optimizers_are_fused_on_cuda(opt, options, fused):
    config = TrainConfig(opt=opt, opt_kwargs=options)
    assert can_fuse(config, torch.device('cuda')) == fused and not can_fuse(config, torch.device('cpu'))
    if fused:  # timm passes it on; on a CPU they can be fused as well
        config = TrainConfig(opt=opt, opt_kwargs=dict(options, fused=True))
        optimizer = create_optimizer(config, torch.nn.Linear(2, 2), 0.1)
        assert all(group['fused'] for group in optimizer.param_groups)
