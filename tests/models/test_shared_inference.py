"""Shared-basis networks without gradients, where norms are folded on the way, against with."""

import pytest
import timm
import torch
from torch import nn

from timm_spinal.models import fold_bases

NAMES = ['resnet18_sb_s32u1', 'resnet34_sb_s48u1d', 'resnet50_sb', 'resnet32_sb_s16u1_cifar']


def trained(name, **kwargs):
    """A network whose norms have seen something."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **kwargs).eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0., 0.1)
            norm.running_var.uniform_(0.5, 2.)
            norm.weight.data.uniform_(0.2, 1.)
            norm.bias.data.normal_(0., 0.1)
    return model.to(memory_format=torch.channels_last)


def images(size=64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, size, size, generator=generator).to(memory_format=torch.channels_last)


def agree(model, x):
    """Logits without gradients equal those with; gives the former."""
    expected = model(x).detach()
    with torch.inference_mode():
        found = model(x)
    assert expected.std() > 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    return found


@pytest.mark.parametrize('form', ['as created', 'folded'])
@pytest.mark.parametrize('name', NAMES)
def test_same_logits_as_with_gradients(name, form):
    model = trained(name)
    if form == 'folded' and name != 'resnet50_sb':  # whose blocks have no norm to fold
        model = fold_bases(model).to(memory_format=torch.channels_last)
    agree(model, images(32 if 'cifar' in name else 64))


@pytest.mark.parametrize('options', [dict(block_args=dict(attn_layer='se')), dict(act_layer='silu'),
                                     dict(drop_path_rate=0.5, drop_block_rate=0.2), dict(stem_type='deep')],
                         ids=lambda o: next(iter(o)))
def test_other_blocks_and_stems(options):
    agree(trained('resnet18_sb_s32u1', **options), images())


def test_weights_that_change_are_seen():
    """Nothing folded outlives a call."""
    model, x = trained('resnet18_sb_s32u1'), images()
    before = agree(model, x)
    with torch.no_grad():
        for p in model.parameters():
            p.data.mul_(0.9)
    assert not torch.allclose(agree(model, x), before, rtol=1e-3)


@pytest.mark.parametrize('name', ['conv1', 'bn1', 'layer1.1.act1', 'layer1.1.conv1', 'layer2.1.conv2', 'layer3.1.act2',
                                  'layer3.1.drop_block'])
def test_hooks_are_called(name):
    """On the way nothing is left out that somebody looks at."""
    model, x, seen = trained('resnet18_sb_s32u1'), images(), []
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    agree(model, x)
    assert len(seen) == 2
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-4)
    handle.remove()
    agree(model, x)
    assert len(seen) == 2


def test_ensembles_by_vmap():
    """Weights with a dimension in front, as in torch.func's guide to ensembles."""
    models, x = [trained('resnet18_sb_s32u1') for _ in range(2)], images()
    with torch.no_grad():
        for p in models[1].parameters():
            p.mul_(0.9)
        params, buffers = torch.func.stack_module_state(models)

        def call(params, buffers, x):
            return torch.func.functional_call(models[0], (params, buffers), (x,))

        found = torch.func.vmap(call, in_dims=(0, 0, None))(params, buffers, x)
        expected = torch.stack([model(x) for model in models])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        torch.testing.assert_close(torch.func.vmap(models[0])(x[None]), expected[:1], rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_still_works():
    model, x = trained('resnet18_sb_s32u1'), images()
    model.set_grad_checkpointing()
    model(x).sum().backward()
    assert model.layer1.basis.grad.abs().max() > 0 and model.conv1.weight.grad.abs().max() > 0
