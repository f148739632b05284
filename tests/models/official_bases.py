"""State dicts as the paper's code writes them, and what its network computes from one.

See docs/papers/shared_bases.md, sections 2, 9 and 11.

The plain baselines beside them have the same names, without bases.
"""
from typing import Dict

import torch
import torch.nn.functional as F

CHANNELS = (64, 128, 256, 512)
CIFAR_CHANNELS = (16, 32, 64)
State = Dict[str, torch.Tensor]


def official_resnet34(s: int, u: int, double: bool, layers=(3, 4, 6, 3), classes=10, prefix='module.') -> State:
    """A state dict of ResNet34-S{s}U{u}: bases under the model and again under every block, DataParallel's prefix."""
    return official_state(s, u, double, layers, classes, prefix)


def official_state(s, u, double=False, layers=(3, 4, 6, 3), classes=10, prefix='module.', channels=CHANNELS, stem=7,
                   convs_in_shortcuts=True, fc='fc') -> State:
    """A state dict of a ResNet of two convolutions a block; with s = u = 0 of the plain one."""
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

    draw('conv1', channels[0], 3, stem, stem)
    norm('bn1', channels[0])
    before = channels[0]
    for g, (chs, depth) in enumerate(zip(channels, layers), start=1):
        m = chs // channels[0]
        bases = [f'shared_basis_{g}_1', f'shared_basis_{g}_2'] if double else [f'shared_basis_{g}']
        bases = bases if s else []
        for basis in bases:
            draw(basis, s * m, chs, 3, 3)
        for k in range(depth):
            block = f'layer{g}.{k}'
            for i, in_chs in ((1, before if k == 0 else chs), (2, chs)):
                if k == 0 or not s + u:
                    draw(f'{block}.conv{i}', chs, in_chs, 3, 3)
                else:
                    draw(f'{block}.basis_conv{i}', u * m, chs, 3, 3)
                    norm(f'{block}.basis_bn{i}', (s + u) * m)
                    draw(f'{block}.coeff_conv{i}', chs, (s + u) * m, 1, 1)
                norm(f'{block}.bn{i}', chs)
            if k == 0 and before != chs and convs_in_shortcuts:
                draw(f'{block}.shortcut.0', chs, before, 1, 1)
                norm(f'{block}.shortcut.1', chs)
            if k > 0:
                for basis in bases:
                    alias = basis.replace(f'basis_{g}', 'basis')
                    state[f'{block}.{alias}.weight'] = state[f'{basis}.weight']
        before = chs
    state[f'{fc}.weight'] = torch.randn(classes, before, generator=generator) * before ** -0.5
    state[f'{fc}.bias'] = torch.randn(classes, generator=generator)
    return {prefix + name: value for name, value in state.items()}


def count(state: State) -> int:
    """Parameters, a basis once: its copies are one tensor."""
    buffers = ('running_mean', 'running_var', 'num_batches_tracked')
    return sum({id(value): value.numel() for name, value in state.items() if not name.endswith(buffers)}.values())


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

    stem = state['conv1.weight']
    large = stem.shape[2] == 7  # of ImageNet
    x = F.relu(norm('bn1', F.conv2d(x, stem, stride=2 if large else 1, padding=stem.shape[2] // 2)))
    x = F.max_pool2d(x, 3, 2, 1) if large else x
    for g, depth in enumerate(layers, start=1):
        for k in range(depth):
            block, shortcut, stride = f'layer{g}.{k}', x, 2 if g > 1 and k == 0 else 1
            for i in (1, 2):
                if f'{block}.conv{i}.weight' in state:
                    x = F.conv2d(x, state[f'{block}.conv{i}.weight'], stride=stride if i == 1 else 1, padding=1)
                else:
                    x = site(block, i, x)
                x = norm(f'{block}.bn{i}', x)
                x = F.relu(x) if i == 1 else x
            if f'{block}.shortcut.0.weight' in state:
                shortcut = F.conv2d(shortcut, state[f'{block}.shortcut.0.weight'], stride=stride)
                shortcut = norm(f'{block}.shortcut.1', shortcut)
            elif stride == 2:  # shortcut A
                more = (x.shape[1] - shortcut.shape[1]) // 2
                shortcut = F.pad(shortcut[:, :, ::2, ::2], (0, 0, 0, 0, more, more))
            x = F.relu(x + shortcut)
    fc = 'fc' if 'fc.weight' in state else 'linear'
    return F.linear(x.mean((2, 3)), state[f'{fc}.weight'], state[f'{fc}.bias'])
