import torch
from torch import nn

from timm_spinal.compare.cost import file_mb, head_cost, latency_ms, macs
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
