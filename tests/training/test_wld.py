import gc
import weakref

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.task import TrainingTask, resume_task_checkpoint

from timm_spinal.errors import UserError
from timm_spinal.training.wld import WLDTask

SIZE = 32


def make(name='test_resnet', seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model(name, **{**dict(num_classes=4), **kwargs})


def make_task(seed=0, epochs=2, batches=4, student='test_resnet', **kwargs):
    return WLDTask(make(student, seed), make(seed=9), epochs, batches, criterion_kwargs=dict(loss_type='ce'),
                   verbose=False, **kwargs)


def batch(seed=0, n=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, SIZE, SIZE, generator=generator), torch.randint(0, 4, (n,), generator=generator)


def logits(task, images):
    with torch.no_grad():
        return task.trainable_module(images), task.teacher.model(images)


def test_mse_value():
    task = make_task(distill_loss_weight=0.7).eval()
    images, target = batch()
    student, teacher = logits(task, images)
    parts = task(images, target)
    distance = sum((student[i, k] - teacher[i, k]) ** 2 for i in range(6) for k in range(4)) / 24
    assert isinstance(task, TrainingTask)
    assert parts['kd_loss'].item() == pytest.approx(distance.item(), rel=1e-5)
    assert parts['task_loss'].item() == pytest.approx(F.cross_entropy(student, target).item(), rel=1e-6)
    assert parts['loss'].item() == pytest.approx(parts['task_loss'].item() + 0.7 * distance.item(), rel=1e-5)
    assert parts['kd_weight'].item() == pytest.approx(0.7) and torch.equal(parts['output'], student)


def test_kl_value():
    task = make_task(loss_type='kl', temperature=3.).eval()
    images, target = batch()
    student, teacher = logits(task, images)
    p, q = (teacher / 3).softmax(-1), (student / 3).softmax(-1)
    distance = 9 * (p * (p.log() - q.log())).sum(-1).mean().item()
    parts = task(images, target)
    assert parts['kd_loss'].item() == pytest.approx(distance, rel=1e-4)
    assert parts['loss'].item() == pytest.approx(parts['task_loss'].item() + 0.5 * distance, rel=1e-4)


def test_mse_is_kl_at_great_temperature():
    """tau^2 KL -> 1/2 mean_k (z_s - z_t)^2 on centred logits (docs/papers/ic_networks.md, section 6)."""
    task = make_task(loss_type='kl', temperature=100.)
    torch.manual_seed(0)
    student, teacher = torch.randn(50, 4), torch.randn(50, 4)
    difference = student - teacher
    centred = difference - difference.mean(-1, keepdim=True)
    found = task.distance(student, teacher, torch.zeros(50, dtype=torch.int64)).item()
    assert found == pytest.approx(0.5 * centred.square().mean().item(), rel=0.02)


@pytest.mark.parametrize('soft', [False, True])
def test_right_only(soft):
    task = make_task(right_only=True).eval()
    images, target = batch()
    student, teacher = logits(task, images)
    target = teacher.argmax(-1)
    target[:2] = (target[:2] + 1) % 4  # the teacher is wrong on two of six
    each = (student - teacher).square().mean(-1)
    given = 0.8 * F.one_hot(target, 4) + 0.05 if soft else target
    assert task.distance(student, teacher, given).item() == pytest.approx((each[2:].sum() / 6).item(), rel=1e-6)


def test_two_stages():
    task = make_task(two_stage=True, fade='step', distill_loss_weight=2.)
    images, target = batch()
    for expected in [True] * 4 + [False] * 4:
        parts = task(images, target)
        whole = 2. * parts['kd_loss'] if expected else parts['task_loss']
        assert torch.equal(parts['loss'], whole) and ('kd_loss' in parts) == expected


@pytest.mark.parametrize('fade, end, weights', [
    ('linear', 0.5, [1., .8, .6, .4, .2, 0., 0., 0., 0., 0.]),
    ('linear', 1., [1., .9, .8, .7, .6, .5, .4, .3, .2, .1]),
    ('step', 0.3, [1., 1., 1., 0., 0., 0., 0., 0., 0., 0.]),
    ('step', 0.7, [1.] * 7 + [0.] * 3),
    ('constant', 0.5, [1.] * 10),
])
@pytest.mark.parametrize('accum', [1, 3])
def test_fade_counts_updates(fade, end, weights, accum):
    """Two epochs of five updates; with accumulation the last update of an epoch has fewer batches."""
    batches = 5 if accum == 1 else 13
    task = make_task(epochs=2, batches=batches, fade=fade, fade_end=end, grad_accum_steps=accum)
    assert task.total == 10
    found = []
    for i in range(2 * batches):
        task.batches = i
        found.append(task.distill_weight)
    per_epoch = [b // accum for b in range(batches)]
    assert found == pytest.approx([weights[5 * epoch + u] for epoch in range(2) for u in per_epoch])
    assert [w == 0 for w in found] == [weights[5 * epoch + u] == 0 for epoch in range(2) for u in per_epoch]


@pytest.mark.parametrize('accum', [1, 3])
def test_an_epoch_begun_anywhere_goes_on_as_if_it_had_been_counted(accum):
    counted, told = (make_task(epochs=2, batches=5, fade_end=1., grad_accum_steps=accum) for _ in range(2))
    images, target = batch()
    for _ in range(8):
        counted(images, target)
    told.set_length(2, 5, accum)
    told.start_epoch(1, 3, 5)
    assert told.updates == counted.updates == (8 if accum == 1 else 3)
    assert told.distill_weight == counted.distill_weight < 1.
    assert told(images, target)['kd_weight'] == counted(images, target)['kd_weight']
    assert told.batches == counted.batches == 9


def test_zero_is_reached_exactly():
    for total in range(1, 60):
        for percent in range(1, 101):
            task = WLDTask(torch.nn.Identity(), None, 1, total, fade_end=percent / 100, verbose=False)
            task.batches = -(-total * percent // 100)  # the first update at or past r T
            assert task.distill_weight == 0 and (task.batches == total or percent < 100)
            task.batches -= 1
            assert task.distill_weight > 0


def test_without_weight_the_loss_is_the_criterion_and_the_teacher_is_gone():
    task = make_task(epochs=1, batches=4, fade='step')
    calls = []
    task.teacher.model.register_forward_hook(lambda *_: calls.append(1))
    alive = weakref.ref(task.teacher.model)
    images, target = batch()
    for _ in range(2):
        task(images, target)
    assert len(calls) == 2 and alive() is not None
    parts = task(images, target)
    assert len(calls) == 2 and task.teacher is None
    gc.collect()
    assert alive() is None
    assert 'kd_loss' not in parts and parts['kd_weight'].item() == 0.
    assert torch.equal(parts['loss'], F.cross_entropy(parts['output'], target))


def test_weight_of_zero_needs_no_teacher():
    task = WLDTask(make(), 'local-dir:/nowhere', 1, 4, distill_loss_weight=0., verbose=False)
    assert task.teacher is None
    images, target = batch()
    assert 'kd_loss' not in task(images, target)


def test_given_logits_stand_for_the_teacher():
    images, target = batch()
    task = make_task().eval()
    _, teacher = logits(task, images)
    expected = task(images, target)['loss']
    other = WLDTask(make(), None, 2, 4, criterion_kwargs=dict(loss_type='ce'), verbose=False).eval()
    assert torch.allclose(other(images, target, teacher)['loss'], expected)
    with pytest.raises(RuntimeError, match='there is no teacher'):
        other(images, target)


def test_evaluation_does_not_count():
    task = make_task()
    images, target = batch()
    task.eval()(images, target)
    assert task.batches == 0
    task.train()(images, target)
    assert task.batches == 1 and not task.teacher.model.training and task.trainable_module.training


def train_like_timm(task, optimizer, first, last, accum, ema=True, batches=5):
    """The loop of timm's train.py: accumulation with a short last window, EMA, a checkpoint after each epoch."""
    for epoch in range(first, last):
        task.train()
        optimizer.zero_grad()
        num_updates = epoch * -(-batches // accum)
        for i in range(batches):
            window = min(accum, batches - i // accum * accum)
            need_update = i % accum == accum - 1 or i == batches - 1
            images, target = batch(100 * epoch + i)
            if need_update:
                result = task(images, target)
                (result['loss'] / window).backward()
            else:
                with task.no_sync():
                    result = task(images, target)
                    (result['loss'] / window).backward()
                continue
            torch.nn.utils.clip_grad_value_(task.get_clip_parameters(), 1.)
            optimizer.step()
            optimizer.zero_grad()
            num_updates += 1
            task.update_ema(step=num_updates)
    saved = dict(optimizer=optimizer.state_dict(), **task.get_checkpoint_state())
    return {**saved, **task.get_checkpoint_state(ema=True)}


def new_run(accum):
    task = make_task(epochs=4, batches=5, fade_end=0.8, grad_accum_steps=accum)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.05, momentum=0.9)
    task.setup_ema(decay=0.8)
    return task, optimizer


@pytest.mark.parametrize('accum', [1, 2])
def test_timms_loop_and_resume(accum, tmp_path):
    whole = train_like_timm(*new_run(accum), 0, 4, accum)
    saved = train_like_timm(*new_run(accum), 0, 2, accum)
    assert saved['task_state'] == dict(batches=10) and 'task_state_ema' not in saved
    task, optimizer = new_run(accum)
    torch.save(dict(saved, epoch=1, version=2), tmp_path / 'last.pth.tar')  # as timm's CheckpointSaver has it
    assert resume_task_checkpoint(task, str(tmp_path / 'last.pth.tar'), optimizer, log_info=False) == 2
    task.load_checkpoint_state(saved['state_dict_ema'], ema=True)
    expected = {1: 1 - 10 / 16, 2: 1 - 6 / 9.6}[accum]
    assert task.distill_weight == pytest.approx(expected)
    resumed = train_like_timm(task, optimizer, 2, 4, accum)
    for key in ('state_dict', 'state_dict_ema'):
        assert [k for k in whole[key] if not torch.equal(whole[key][k], resumed[key][k])] == []
    assert task.teacher is None and task.distill_weight == 0


def test_teacher_is_as_it_was():
    task, optimizer = new_run(1)
    model = task.teacher.model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    student = [p.detach().clone() for p in task.trainable_module.parameters()]
    train_like_timm(task, optimizer, 0, 2, 1)
    assert task.teacher.model is model
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert not any(torch.equal(p, q) for p, q in zip(task.trainable_module.parameters(), student))


def test_ddp_and_compile_leave_the_teacher_alone(monkeypatch):
    """In a process group of one; timm's scripts call these before the loop."""
    monkeypatch.setenv('MASTER_ADDR', '127.0.0.1')
    torch.distributed.init_process_group('gloo', rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        task = make_task()
        plain = make_task()
        task.prepare_distributed()
        assert type(task.trainable_module).__name__ == 'DistributedDataParallel'
        task(*batch())['loss'].backward()
        plain(*batch())['loss'].backward()
        for one, two in zip(task.trainable_module.parameters(), plain.trainable_module.parameters()):
            torch.testing.assert_close(one.grad, two.grad)
    finally:
        torch.distributed.destroy_process_group()
    task = make_task().eval()
    expected = task(*batch())['loss']
    assert task.compile(backend='eager') is task.trainable_module is task.get_eval_model()
    torch.testing.assert_close(task(*batch())['loss'], expected)


def test_autocast():
    task = make_task().eval()
    images, target = batch()
    exact = task(images, target)
    with torch.autocast('cpu', torch.bfloat16):
        half = task(images, target)
    assert half['kd_loss'].dtype == torch.float32
    assert half['kd_loss'].item() == pytest.approx(exact['kd_loss'].item(), rel=0.05)


@pytest.mark.parametrize('kwargs, text', [
    (dict(fade_end=0.), r'--kd-fade-end 0: is not in \(0, 1\]'),
    (dict(fade_end=1.2), r'--kd-fade-end 1.2: is not in \(0, 1\]'),
    (dict(fade_end=-0.5), r'--kd-fade-end -0.5: is not in \(0, 1\]'),
    (dict(fade_end=float('nan')), '--kd-fade-end nan'),
    (dict(fade='cosine'), '--kd-fade cosine: unknown; use linear or step or constant'),
    (dict(loss_type='l1'), '--kd-loss-type l1: unknown; use mse or kl'),
    (dict(two_stage=True, fade='constant'), '--kd-two-stage: with --kd-fade constant the first stage never ends'),
])
def test_bad_options(kwargs, text):
    with pytest.raises(UserError, match=text) as error:
        make_task(**kwargs)
    assert '\n' not in str(error.value)
