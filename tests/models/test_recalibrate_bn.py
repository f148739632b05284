import pytest
import timm
import torch
from torch import nn

from timm_spinal import recalibrate_bn

BATCHES = [(torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(i)) * (1 + i), None) for i in range(3)]


def make(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('test_resnet', num_classes=5, **kwargs)


def bns(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


@pytest.mark.parametrize('count, used', [(None, 3), (2, 2)])
def test_mean_of_the_batches_statistics(count, used):
    model = make().eval()
    first = next(iter(bns(model).values()))
    inputs = []
    hook = first.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    assert recalibrate_bn(model, BATCHES, count) is model
    hook.remove()
    assert len(inputs) == used
    mean = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
    var = torch.stack([x.var((0, 2, 3)) for x in inputs]).mean(0)
    torch.testing.assert_close(first.running_mean, mean)
    torch.testing.assert_close(first.running_var, var)
    assert all(m.num_batches_tracked == used for m in bns(model).values())


@pytest.mark.parametrize('training', [True, False])
def test_everything_else_is_as_it_was(training):
    model = make(drop_path_rate=0.5).train(training)
    bn = model.layer1[0].bn1
    bn.eval()
    bn.momentum = 0.3
    weights = {name: p.clone() for name, p in model.named_parameters()}
    recalibrate_bn(model, BATCHES)
    assert model.training == training and not bn.training and bn.momentum == 0.3
    assert all(m.momentum == 0.1 for m in bns(model).values() if m is not bn)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    again = recalibrate_bn(make(drop_path_rate=0.5).train(training), BATCHES)  # dropping is off meanwhile
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_batch_of_images_makes_train_and_eval_mode_agree():
    x = BATCHES[0][0]
    model = recalibrate_bn(make(), x)
    with torch.no_grad():
        model.eval()
        inside = model.layer1[0].bn2
        found = []
        hook = inside.register_forward_hook(lambda module, args, y: found.append(y))
        model(x)
        model.train()
        model(x)
        hook.remove()
    torch.testing.assert_close(*found, rtol=0.01, atol=0.01)  # variances over n and over n - 1


def test_without_norms_or_batches():
    vit = timm.create_model('test_vit')
    assert recalibrate_bn(vit, []) is vit
    model = recalibrate_bn(make(), BATCHES)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match='The loader gives no batch'):
        recalibrate_bn(model, [])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()) and model.training
