"""Folding of BatchNorm is exact, in plain and in IC convolutions."""

import pytest
import timm
import torch
from torch import nn

import timm_spinal
from timm_spinal import convert_to_ic, fold_batchnorm

X = torch.randn(2, 3, 48, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def make(name, gain=0.5, **ic):
    """A model with a past, in float64; gains are gain + |N(0, 1)|."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).double()
    if ic:
        convert_to_ic(model, **{key: value for key, value in ic.items() if key != 'on'})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.)
            nn.init.normal_(module.weight).data.abs_().add_(gain)
            nn.init.normal_(module.bias)
    for key, p in model.named_parameters():
        if 'ic_weight' in key or 'ic_bias' in key:
            nn.init.normal_(p, std=0.1)
    return model.eval()


def norms(model):
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize('name, ic', [
    ('resnet18', {}),
    ('resnet18', dict(on=True)),
    ('resnet18', dict(norm='bias', mode='layer')),
    ('test_resnet', dict(norm='bn')),
    ('test_resnet', dict(mode='pair', scale='raw', scope='all')),
    ('tf_efficientnet_lite0', {}),  # convolutions that pad as TensorFlow's
    ('test_efficientnet', dict(on=True)),  # norms that have an activation in them
    ('resnet20_cifar', dict(on=True)),
])
def test_nothing_changes_but_the_norms(name, ic):
    model = make(name, **ic)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        expected, folded = model(X), fold_batchnorm(model)
        torch.testing.assert_close(folded(X), expected, rtol=1e-9, atol=1e-9)
    inner = sum(key.endswith('ic_bn.weight') for key in state)
    assert norms(folded) == inner < norms(model) and expected.std() > 0.01
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_collision_with_a_negative_gain_keeps_its_norm():
    model = make('resnet18', on=True)
    model.layer1[0].bn1.weight.data[3] = -0.5
    folded = fold_batchnorm(model)
    assert norms(folded) == 1 and isinstance(folded.layer1[0].bn1, nn.BatchNorm2d)
    with torch.no_grad():
        torch.testing.assert_close(folded(X), model(X), rtol=1e-9, atol=1e-9)
    plain = make('resnet18', gain=-1.)
    assert norms(fold_batchnorm(plain)) == 0 and any((m.weight < 0).any() for m in plain.modules()
                                                     if isinstance(m, nn.BatchNorm2d))


def test_zero_gain():
    model = make('resnet18', on=True)
    nn.init.zeros_(model.layer2[0].bn2.weight)
    with torch.no_grad():
        torch.testing.assert_close(fold_batchnorm(model)(X), model(X), rtol=1e-9, atol=1e-9)


class ByShape(nn.Module):
    """What it does depends on the image."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x)) if x.mean() > 0 else x


def test_what_cannot_be_folded():
    with pytest.raises(ValueError, match='in training mode'):
        fold_batchnorm(timm.create_model('resnet18', device='meta'))
    with pytest.raises(ValueError, match='torch.fx cannot trace ByShape') as error:
        fold_batchnorm(ByShape().eval())
    assert '\n' not in str(error.value)
    with pytest.raises(ValueError, match='VisionTransformer has no BatchNorm behind a convolution'):
        fold_batchnorm(timm.create_model('test_vit').eval())
    with pytest.raises(ValueError, match='Sequential has no BatchNorm behind a convolution'):
        fold_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)).eval())
    assert timm_spinal.fold_batchnorm is fold_batchnorm
