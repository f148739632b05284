"""The standalone capsule network, and capsule heads on the other small nets."""

import pytest
import timm
import torch

import timm_spinal
from timm_spinal.models.spinal_vgg5 import Vgg5


def test_papers_count():
    model = timm.create_model('capsnet_mnist', device='meta')
    assert sum(p.numel() for p in model.parameters()) == 1_690_544
    assert model.head.fc.weight.shape == (512, 10, 8, 16)
    assert model.head.fc.iterations == 3


def test_capsules_are_positions_then_channels():
    torch.manual_seed(0)
    model = timm.create_model('capsnet_mnist').eval()
    x = torch.randn(2, 1, 28, 28)
    features = model.forward_features(x)
    assert features.shape == (2, 256, 4, 4)
    capsules = model.forward_head(features, pre_logits=True).reshape(2, 4, 4, 32, 8)
    own = features[:, 40:48, 2, 3]  # position (2, 3), capsule 5
    n2 = own.square().sum(1, keepdim=True)
    expected = (n2.sqrt() / (1 + n2) * own / (1 + 1e-6) ** 0.5).relu()
    torch.testing.assert_close(capsules[:, 2, 3, 5], expected)


def test_image_sizes():
    model = timm.create_model('capsnet_mnist').eval()
    assert model(torch.randn(2, 1, 36, 36)).shape == (2, 10)
    with pytest.raises(AssertionError, match='smaller than the 4 x 4 grid of capsules; use images of 28 pixels'):
        model(torch.randn(2, 1, 27, 28))


def test_reset():
    model = timm.create_model('capsnet_mnist').eval()
    x = torch.randn(2, 1, 28, 28)
    pre_logits = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(0)
    assert torch.equal(model(x), pre_logits) and model.head_hidden_size == 4096
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    with pytest.raises(ValueError, match='needs at least 2'):
        model.reset_classifier(1)
    model.reset_classifier(3, reset_other=True)
    assert [n for n, _ in model.head.named_parameters()] == ['fc.weight', 'fc.bias'] and model(x).shape == (2, 3)


@pytest.mark.parametrize('head', ['caps', 'xnodr', 'xnidr'])
@pytest.mark.parametrize('training', [True, False])
def test_capsule_heads_on_another_small_net(head, training):
    torch.manual_seed(0)
    model = Vgg5(head=head, num_classes=4, head_capsules=16).train(training)
    x = torch.randn(4, 1, 28, 28)
    out = model(x)
    assert out.shape == (4, 4)
    if training:
        out.square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())
    else:
        assert torch.equal(out, model.head(model.forward_features(x)))
        torch.testing.assert_close(torch.jit.script(model)(x), out)


def test_attached_to_a_small_net_nothing_is_left_without_a_gradient():
    assert timm_spinal.ensure_registered('vgg5_xnodr')
    model = timm.create_model('vgg5_xnodr', num_classes=4).train()
    model(torch.randn(4, 1, 28, 28)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not [n for n, _ in model.named_parameters() if n.startswith('head.')]
    model.reset_classifier(0)
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 1024)


def test_small_net_refuses_a_pooling_that_the_head_cannot_do():
    with pytest.raises(ValueError, match="global_pool cannot be 'max'"):
        Vgg5(head='caps', global_pool='max')
