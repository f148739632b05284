import pytest
import timm
import torch
from torch import nn

import timm_spinal
from timm_spinal.compare.cost import file_mb, head_cost, latency_ms, network_cost
from timm_spinal.cost import count_macs as macs
from timm_spinal.layers import create_head


class Slow(nn.Module):
    def forward(self, x):
        for _ in range(50):
            x = x + 1
        return x


def test_macs_of_linears():
    assert macs(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), torch.zeros(1, 6)) == 6 * 5 + 5 * 3


def test_latency_tells_slow_from_fast():
    x = torch.zeros(1, 4)
    fast, slow = latency_ms(nn.Identity(), x, 0.05), latency_ms(Slow(), x, 0.05)
    assert 0 < 3 * fast < slow


def test_cost_of_a_head():
    head = create_head('linear', 100, 10)
    cost = head_cost(head, 7., torch.zeros(1, 100))
    assert (cost.params, cost.macs) == (1010, 1000)
    assert cost.network_ms == 7. + cost.head_ms
    assert 4040e-6 < cost.file_mb == file_mb(head) < 4400e-6


@pytest.mark.slow
def test_cost_of_a_network_whose_head_reads_the_map():
    torch.manual_seed(0)
    x = torch.zeros(1, 3, 64, 64)
    for head in ('xnodr', 'linear'):
        model = timm_spinal.attach_head(timm.create_model('test_resnet', num_classes=0), head, num_classes=10)
        cost = network_cost(model, x)
        assert cost.params == sum(p.numel() for p in model.parameters()) and cost.macs == macs(model, x)
        assert 0 < cost.head_ms < cost.network_ms
    assert network_cost(timm.create_model('test_resnet'), x).head_ms is None
