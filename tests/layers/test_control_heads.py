import pytest
import torch

from timm_spinal.layers import LinearHead, MlpHead, create_head, equal_size_mlp_width

KEYS = {  # of a state dict, see tests/models/test_contract.py
    'linear': ['fc.weight', 'fc.bias'],
    'mlp': [
        'hidden.0.fc.weight', 'hidden.0.fc.bias', 'hidden.0.norm.weight', 'hidden.0.norm.bias',
        'hidden.0.norm.running_mean', 'hidden.0.norm.running_var', 'hidden.0.norm.num_batches_tracked',
        'fc.weight', 'fc.bias',
    ],
}


def num_params(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_linear_head_is_one_linear():
    head = LinearHead(6, 3)
    x = torch.randn(4, 6)
    torch.testing.assert_close(head(x), x @ head.fc.weight.T + head.fc.bias)
    assert torch.equal(head(x, pre_logits=True), x)
    assert head.hidden_size == 6


def test_mlp_head_is_the_papers_plain_vgg_head():
    """Dropout, Linear 256 -> 512, BatchNorm, ReLU, Dropout, Linear: docs/papers/spinalnet.md, sections 3.3 and 4."""
    head = MlpHead(256, 10)
    assert num_params(head) == 137_738
    assert num_params(MlpHead(256, 62)) == 164_414
    head.eval()
    x = torch.randn(4, 256)
    norm = torch.nn.functional.batch_norm(
        x @ head.hidden[0].fc.weight.T + head.hidden[0].fc.bias,
        head.hidden[0].norm.running_mean,
        head.hidden[0].norm.running_var,
        head.hidden[0].norm.weight,
        head.hidden[0].norm.bias,
    )
    torch.testing.assert_close(head(x), head.fc(norm.relu()))


def test_mlp_layers_stack():
    head = MlpHead(8, 2, layers=3, width=5, norm_layer='', dropout=0.)
    assert num_params(head) == 9 * 5 + 2 * 6 * 5 + 6 * 2


@pytest.mark.parametrize('head', ['spinal', 'pspinal'])
@pytest.mark.parametrize('in_features, num_classes', [(1280, 10), (2048, 1000), (320, 101)])
def test_equal_size(head, in_features, num_classes):
    target = num_params(create_head(head, in_features, num_classes, device='meta'))
    width = equal_size_mlp_width(target, in_features, num_classes)
    mlp = num_params(MlpHead(in_features, num_classes, width=width, device='meta'))
    assert abs(mlp - target) <= (in_features + num_classes + 3) / 2 + 1


def test_equal_size_is_at_least_one():
    assert equal_size_mlp_width(5, 2048, 10) == 1
