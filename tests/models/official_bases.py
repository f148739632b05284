"""State dicts as the paper's code writes them, and what its network computes from one (spec shared_basis 1.2, 6, 9)."""
from typing import Dict

import torch
import torch.nn.functional as F

CHANNELS = (64, 128, 256, 512)
State = Dict[str, torch.Tensor]


def official_resnet34(s: int, u: int, double: bool, layers=(3, 4, 6, 3), classes=10, prefix='module.') -> State:
    """A state dict of ResNet34-S{s}U{u}: bases under the model and again under every block, DataParallel's prefix."""
    generator = torch.Generator().manual_seed(0)
    state: State = {}

    def draw(name, *shape):
        fan = shape[1] * shape[2] * shape[3] if len(shape) == 4 else shape[-1]
        state[f'{name}.weight'] = torch.randn(shape, generator=generator) * (2 / fan) ** 0.5

    def norm(name, chs):
        state[f'{name}.weight'] = 1 + 0.2 * torch.randn(chs, generator=generator)
        state[f'{name}.bias'] = 0.2 * torch.randn(chs, generator=generator)
        state[f'{name}.running_mean'] = 0.2 * torch.randn(chs, generator=generator)
        state[f'{name}.running_var'] = 0.5 + torch.rand(chs, generator=generator)
        state[f'{name}.num_batches_tracked'] = torch.tensor(7)

    draw('conv1', 64, 3, 7, 7)
    norm('bn1', 64)
    before = 64
    for g, (chs, depth) in enumerate(zip(CHANNELS, layers), start=1):
        m = chs // 64
        bases = [f'shared_basis_{g}_1', f'shared_basis_{g}_2'] if double else [f'shared_basis_{g}']
        for basis in bases:
            draw(basis, s * m, chs, 3, 3)
        for k in range(depth):
            block = f'layer{g}.{k}'
            for i, in_chs in ((1, before if k == 0 else chs), (2, chs)):
                if k == 0:
                    draw(f'{block}.conv{i}', chs, in_chs, 3, 3)
                else:
                    draw(f'{block}.basis_conv{i}', u * m, chs, 3, 3)
                    norm(f'{block}.basis_bn{i}', (s + u) * m)
                    draw(f'{block}.coeff_conv{i}', chs, (s + u) * m, 1, 1)
                norm(f'{block}.bn{i}', chs)
            if k == 0 and before != chs:
                draw(f'{block}.shortcut.0', chs, before, 1, 1)
                norm(f'{block}.shortcut.1', chs)
            if k > 0:
                for basis in bases:
                    alias = basis.replace(f'basis_{g}', 'basis')
                    state[f'{block}.{alias}.weight'] = state[f'{basis}.weight']
        before = chs
    state['fc.weight'] = torch.randn(classes, before, generator=generator) * before ** -0.5
    state['fc.bias'] = torch.randn(classes, generator=generator)
    return {prefix + name: value for name, value in state.items()}


def official_logits(state: State, x: torch.Tensor, layers=(3, 4, 6, 3), prefix='module.') -> torch.Tensor:
    """What the paper's network answers in eval mode, step by step from the state dict."""
    state = {name[len(prefix):]: value for name, value in state.items()}

    def norm(name, x):
        weight, bias, mean, var = (state[f'{name}.{k}'] for k in ('weight', 'bias', 'running_mean', 'running_var'))
        return F.batch_norm(x, mean, var, weight, bias)

    def site(block, i, x):
        bases = [name for name in state if name.startswith(f'{block}.shared_basis')]
        basis = state[bases[i - 1 if len(bases) > 1 else 0]]
        unique = state[f'{block}.basis_conv{i}.weight']
        z = torch.cat([F.conv2d(x, unique, padding=1), F.conv2d(x, basis, padding=1)], 1)
        return F.conv2d(norm(f'{block}.basis_bn{i}', z), state[f'{block}.coeff_conv{i}.weight'])

    x = F.max_pool2d(F.relu(norm('bn1', F.conv2d(x, state['conv1.weight'], stride=2, padding=3))), 3, 2, 1)
    for g, depth in enumerate(layers, start=1):
        for k in range(depth):
            block, shortcut, stride = f'layer{g}.{k}', x, 2 if g > 1 and k == 0 else 1
            for i in (1, 2):
                if k == 0:
                    x = F.conv2d(x, state[f'{block}.conv{i}.weight'], stride=stride if i == 1 else 1, padding=1)
                else:
                    x = site(block, i, x)
                x = norm(f'{block}.bn{i}', x)
                x = F.relu(x) if i == 1 else x
            if f'{block}.shortcut.0.weight' in state:
                shortcut = F.conv2d(shortcut, state[f'{block}.shortcut.0.weight'], stride=stride)
                shortcut = norm(f'{block}.shortcut.1', shortcut)
            x = F.relu(x + shortcut)
    return F.linear(x.mean((2, 3)), state['fc.weight'], state['fc.bias'])
