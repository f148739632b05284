"""Between two log lines the loop never waits for its device: real epochs, with every operator and copy looked at."""
from dataclasses import replace

import pytest
import timm
import torch

from timm_spinal.training import classification
from timm_spinal.training import task as task_module
from timm_spinal.training import train as train_module
from timm_spinal.training.data import create_data
from timm_spinal.training.distributed import Meter, SignalFlag
from timm_spinal.training.results import export_model

from .runs import small_config
from .waits import Waits


def train_an_epoch(config, monkeypatch):
    """The waits of an epoch in which the losses are read every two updates."""
    reads = []
    # as on a GPU: images come as bytes, and the loop normalises and erases them
    monkeypatch.setattr(classification, 'create_data', lambda *a, **kw: create_data(*a, **kw | dict(on_device=True)))
    with train_module.open_run(replace(config, log_interval=2, epochs=2)) as run:
        def counts_a_step(tensor):
            return any(tensor is state.get('step') for state in run.optimizer.state.values())

        waits, flush, on_device = Waits(on_host=counts_a_step), Meter.flush, train_module.on_device

        def load(loader, device):
            batches = on_device(loader, device)
            while True:
                with waits.allowed():  # without workers images are read here, which draws numbers on the host
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch

        def read(self):
            with waits.allowed():
                reads.append(len(self._updates))
                flush(self)

        with monkeypatch.context() as patch, waits:
            patch.setattr(Meter, 'flush', read)
            patch.setattr(train_module, 'on_device', load)
            row = train_module.train_epoch(run, SignalFlag())
        updates = run.updates_per_epoch
    assert reads == [2] * (updates // 2) + [updates % 2] and waits.operators > 1000
    assert row['train_loss'] == row['train_loss']
    return waits.found


def teacher(tmp_path, model='test_resnet', **kwargs):
    torch.manual_seed(5)
    net = timm.create_model(model, num_classes=2, **kwargs)
    folder = tmp_path / 'teacher'
    folder.mkdir()
    data = dict(input_size=(3, 32, 32), mean=[0.5] * 3, std=[0.5] * 3, interpolation='bicubic', crop_pct=1.)
    export_model(folder, net, net.state_dict(), None, data)
    return dict(kd_model_name=str(folder), mean=[0.5] * 3, std=[0.5] * 3)


CAPSULES = dict(model='spinalcnn_plain_xnodr', in_chans=3, smoothing=0.)
SHARED = dict(model='resnet18_sb_s32u1', model_kwargs=dict(sb_rank=4))
RUNS = {
    'plain': {},
    'bce': dict(bce_loss=True, mixup=0.2, bce_target_thresh=0.1),
    'asl': dict(loss='asl'),
    'margin': dict(CAPSULES, loss='margin'),
    'hinge-mixup': dict(CAPSULES, loss='squared_hinge', mixup=0.3),
    'ic': dict(model='icresnet20_cifar'),
    'norm': dict(clip_grad=0.1, clip_mode='norm', opt='adamw'),
    'value': dict(clip_grad=0.1, clip_mode='value'),
    'agc': dict(clip_grad=0.1, clip_mode='agc'),
    'ema': dict(model_ema=True, model_ema_decay=0.9),
    'ema-warmup': dict(model_ema=True, model_ema_warmup=True, drop_path=0.2),
    'ortho-stage': dict(SHARED, sb_ortho=10., sb_ortho_mode='stage'),
    'accumulation-ortho': dict(SHARED, sb_ortho=10., grad_accum_steps=2, clip_grad=1., model_ema=True),
    'cutmix': dict(cutmix=1., mixup=0.2, mixup_mode='elem'),
    'pair': dict(cutmix=1., mixup=0.2, mixup_mode='pair', channels_last=True),
    'erasing': dict(reprob=0.9, aug_repeats=2., sched_on_updates=True),
    'freeze': dict(freeze_epochs=1, freeze_modules=['conv_stem']),
    'checkpointing': dict(grad_checkpointing=True),
}


@pytest.mark.parametrize('options', RUNS.values(), ids=RUNS)
def test_classification(tmp_path, monkeypatch, options):
    assert train_an_epoch(small_config(tmp_path, **options), monkeypatch) == []


DISTILLATIONS = {
    'logit': dict(kd_distill_type='logit'),
    'feature': dict(kd_distill_type='feature'),
    'wld': dict(kd_distill_type='wld'),
    'wld-kl': dict(kd_distill_type='wld', kd_loss_type='kl', kd_right_only=True, mixup=0.2),
    'wld-two-stage': dict(kd_distill_type='wld', kd_two_stage=True, kd_fade='step',
                          kd_fade_end=0.2, grad_accum_steps=2),
    'wld-cache': dict(kd_distill_type='wld', kd_cache='beside', no_aug=True),
}


@pytest.mark.parametrize('options', DISTILLATIONS.values(), ids=DISTILLATIONS)
def test_distillation(tmp_path, monkeypatch, options):
    config = small_config(tmp_path, **teacher(tmp_path), **options)
    assert train_an_epoch(config, monkeypatch) == []


@pytest.mark.parametrize('spoil', [
    lambda weight: weight.sum().item(), lambda weight: weight[weight > 0].sum(), lambda weight: weight.nonzero(),
    lambda weight: bool((weight > 9).any()), lambda weight: torch.equal(weight, weight), lambda weight: weight.cpu(),
    lambda weight: weight.new_tensor(3.), lambda weight: torch.ones(3).to(weight.device),
    lambda weight: torch.tensor([1.], device=weight.device), lambda weight: weight.detach().tolist(),
], ids=['item', 'mask', 'nonzero', 'bool', 'equal', 'cpu', 'new_tensor', 'to', 'tensor', 'tolist'])
def test_waits_are_found(tmp_path, monkeypatch, spoil):
    """Five updates wait five times."""
    def factory(config, model):
        def penalty():
            spoil(model.classifier.weight)
            return model.classifier.weight.sum() * 0.
        return penalty

    monkeypatch.setitem(task_module.PENALTIES, 'spoil', factory)
    found = train_an_epoch(small_config(tmp_path), monkeypatch)
    assert len(found) == 5 and all('test_waits.py' in place for place in found)
