"""Both trainers train, and both ways to features read all images."""
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.optim.optimizer import register_optimizer_step_post_hook

from timm_spinal.bench import loops
from timm_spinal.bench.runner import Setting
from timm_spinal.cli import main

SMALL = Setting(batch_size=4, img_size=32, workers=0, batches=5)


@pytest.mark.parametrize('side', (loops.our_epochs, loops.timm_epochs, loops.bare_steps))
def test_a_side_trains_its_model_an_epoch_a_call(side):
    """As many optimizer steps as batches, each of which has all its images."""
    epochs = side(SMALL, 'test_efficientnet')
    steps, states, images = [], [], []
    hook = register_optimizer_step_post_hook(lambda *args: steps.append(args[0]))
    epochs.model.register_forward_pre_hook(lambda module, args: images.append(len(args[0])))
    try:
        for _ in range(2):
            epochs()
            states.append(torch.cat([p.detach().flatten() for p in epochs.model.parameters()]).clone())
    finally:
        hook.remove()
    assert len(steps) == 2 * SMALL.batches and images == [SMALL.batch_size] * len(steps)
    assert {id(p) for g in steps[0].param_groups for p in g['params']} == {id(p) for p in epochs.model.parameters()}
    assert not torch.equal(*states) and all(state.isfinite().all() for state in states)


def test_features_of_all_images_are_written():
    call = loops.features(SMALL, 'test_efficientnet')
    call()
    count = 0
    for shard in Path(loops._folders[-1].name, 'features').rglob('*.safetensors'):
        with safe_open(shard, 'pt') as f:
            count += max(f.get_slice(key).get_shape()[0] for key in f.keys())  # noqa: SIM118
    assert count == loops.FEATURES * SMALL.batch_size + loops.CLASSES


@pytest.mark.parametrize('name, sides, lines', [
    ('train', "our epoch / timm's epoch", ['cpu']),
    ('step', 'our epoch / bare steps', ['cpu', 'cpu']),
    ('data', 'our epoch / our epoch by the loader', ['cpu']),
])
def test_the_lines_of_the_trainers(capsys, name, sides, lines):
    """Decoding is said apart from the ratio."""
    assert main(['bench', name, 'test_efficientnet', '--img-size', '32', '-b', '4', '-j', '0', '--rounds', '1',
                 '--batches', '2', '--no-aug']) == 0
    _, *data, ratio = capsys.readouterr().out.splitlines()
    assert ratio.startswith(f'{sides}, test_efficientnet: ')
    training = [line for line in data if '8 images of 3 x 32 x 32' in line]
    assert [line.split()[2].rstrip(':') for line in training] == lines
    assert all('decoded in' in line for line in training)
