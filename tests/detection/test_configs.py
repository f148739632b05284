"""Every file in configs/detection: it parses, its detector can be made, and its schedule is 1x."""
from pathlib import Path

import pytest
import torch
import yaml

from timm_spinal.detection.backbone import create_body
from timm_spinal.detection.options import DetectionConfig
from timm_spinal.training.optim import create_optimizer, create_scheduler, resolve_lr
from timm_spinal.training.parser import parse_config

CONFIGS = sorted((Path(__file__).parents[2] / 'configs' / 'detection').glob('*.yaml'))
UPDATES = 7330  # of an epoch of COCO: 117,266 images with boxes, 16 at a time


def test_both_sides_are_there():
    assert [path.stem for path in CONFIGS] == ['coco_fasterrcnn_resnet50', 'coco_fasterrcnn_resnet50_sb']
    plain, shared = (yaml.safe_load(path.read_text()) for path in CONFIGS)
    differ = {key for key in plain.keys() | shared.keys() if plain.get(key) != shared.get(key)}
    assert differ == {'experiment', 'backbone', 'pretrained_backbone', 'backbone_path'}


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_config_is_sound(path):
    config = parse_config(['--config', str(path)], DetectionConfig)
    assert path.stem == f'coco_{config.model}_{config.backbone}' == config.experiment
    with torch.device('meta'):
        assert create_body(config.backbone, False, {}).feature_info.reduction() == [2, 4, 8, 16, 32]
    header = path.read_text().split('\n', 12)
    assert all(any(line.startswith(f'# {word}:') for line in header) for word in ('Source', 'Reported', 'Differs'))


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_schedule_is_1x(path):
    """Learning rate by update: 500 of warm-up to 0.02, a tenth after 8 epochs and again after 11, 12 in all."""
    config = parse_config(['--config', str(path)], DetectionConfig)
    assert resolve_lr(config, 16) == 0.02 and resolve_lr(config, 8) == 0.01
    optimizer = create_optimizer(config, torch.nn.Linear(2, 2), resolve_lr(config, 16))
    scheduler, epochs = create_scheduler(config, optimizer, UPDATES)
    assert epochs == 12
    expected = {0: 2e-5, 250: 0.01, 498: 0.0199, 500: 0.02, 8 * UPDATES - 2: 0.02, 8 * UPDATES: 0.002,
                11 * UPDATES - 2: 0.002, 11 * UPDATES: 0.0002, 12 * UPDATES - 1: 0.0002}
    for update, lr in expected.items():
        scheduler.step_update(update)
        assert optimizer.param_groups[0]['lr'] == pytest.approx(lr, rel=0.005)


def test_the_defaults_are_the_same_schedule():
    config, defaults = parse_config(['--config', str(CONFIGS[0])], DetectionConfig), DetectionConfig()
    names = ('batch_size', 'opt', 'momentum', 'weight_decay', 'lr', 'lr_base', 'lr_base_size', 'sched', 'epochs',
             'sched_on_updates', 'decay_milestones', 'decay_rate', 'warmup_epochs', 'warmup_lr', 'min_size', 'max_size')
    assert {n: getattr(config, n) for n in names} == {n: getattr(defaults, n) for n in names}
