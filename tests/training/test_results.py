"""The config.json of a model: its own, and nothing of the weights that it started from."""
import json

import pytest
import timm
import torch

from timm_spinal.training.results import export_model, own_config
from timm_spinal.training.train import train

from .runs import small_config


def exported(model, folder, names=None):
    folder.mkdir(exist_ok=True)
    export_model(folder, model, model.state_dict(), names, {})
    return json.loads((folder / 'config.json').read_text())


@pytest.mark.parametrize('name, pretrained', [
    ('resnet18', False), ('resnet18_pspinal', False), ('icresnet18', False), ('spinalcnn_a1.fashion_mnist', True),
    ('spinalcnn_plain_xnodr', True), ('mobilenetv2_100', False),
])
def test_nothing_of_other_weights(tmp_path, name, pretrained):
    model = timm.create_model(name, pretrained=pretrained, num_classes=4)
    assert model.pretrained_cfg.get('tag') or model.pretrained_cfg.get('origin_url')
    config = exported(model, tmp_path / 'x')
    assert not {'tag', 'origin_url', 'url', 'file', 'hf_hub_id', 'source'} & config['pretrained_cfg'].keys()
    assert config['num_classes'] == 4 and 'num_classes' not in config['model_args']
    again = timm.create_model(f'local-dir:{tmp_path / "x"}', pretrained=True)
    assert again.num_classes == 4
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert tuple(again.pretrained_cfg['mean']) == tuple(model.pretrained_cfg['mean'])


@pytest.mark.parametrize('pretrained', [False, True])
def test_config_of_a_run(tmp_path, pretrained):
    train(small_config(tmp_path, model='spinalcnn_plain.fashion_mnist', img_size=None, pretrained=pretrained, epochs=1,
                       input_img_mode='L'))
    config = json.loads((tmp_path / 'run' / 'config.json').read_text())
    assert 'tag' not in config['pretrained_cfg'] and 'origin_url' not in config['pretrained_cfg']
    assert config['architecture'] == 'spinalcnn_plain' and 'num_classes' not in config['model_args']


def test_pooling_of_a_head_that_reads_the_map(tmp_path):
    """Its backbone's is off; the model's own is not, unless it was turned off."""
    model = timm.create_model('resnet18_xnodr', num_classes=3).eval()
    x = torch.randn(2, 3, 64, 64)
    assert 'global_pool' not in exported(model, tmp_path / 'x')['model_args']
    with torch.no_grad():
        for options, shape in ((dict(num_classes=0), (2, 512)), (dict(num_classes=0, global_pool=''), (2, 512, 2, 2)),
                               (dict(num_classes=5), (2, 5)), ({}, (2, 3))):
            again = timm.create_model(f'local-dir:{tmp_path / "x"}', pretrained=True, **options).eval()
            assert again(x).shape == shape, options
        model.reset_classifier(0)
        exported(model, tmp_path / 'y')
        assert timm.create_model(f'local-dir:{tmp_path / "y"}', pretrained=True).eval()(x).shape == (2, 512)
        model.reset_classifier(0, '')
        assert exported(model, tmp_path / 'z')['model_args']['global_pool'] == ''
        assert timm.create_model(f'local-dir:{tmp_path / "z"}', pretrained=True).eval()(x).shape == (2, 512, 2, 2)


def test_a_config_is_not_changed_in_place():
    model = timm.create_model('resnet18', num_classes=3, device='meta')
    config = dict(architecture='resnet18', num_classes=3, model_args=dict(num_classes=3, in_chans=3),
                  pretrained_cfg=dict(tag='a1_in1k', mean=[0.5]))
    own = own_config(config, model)
    assert own == dict(config, model_args=dict(in_chans=3), pretrained_cfg=dict(mean=[0.5]))
    assert config['model_args']['num_classes'] == 3 and config['pretrained_cfg']['tag'] == 'a1_in1k'
