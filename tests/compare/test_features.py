import copy
import json
import os
from pathlib import Path

import pytest
import timm
import torch
from accelerate import Accelerator
from PIL import Image

from tests.training.images import make_folder
from timm_spinal import shards
from timm_spinal.compare.features import extract, run_backbone, unpooled
from timm_spinal.compare.options import FrozenConfig, as_train_config
from timm_spinal.compare.splits import open_splits
from timm_spinal.errors import UserError
from timm_spinal.models import attach_head
from timm_spinal.training.dataset import ImageData
from timm_spinal.training.model import create_model
from timm_spinal.training.transforms import eval_transform, resolve_data, split_transform


@pytest.fixture
def root(tmp_path):
    return make_folder(tmp_path / 'data', ('train', 'val', 'test'), per_class=5)


def make_config(root, **kwargs):
    return FrozenConfig(**{**dict(
        backbone='test_resnet', data_dir=str(root), img_size=16, workers=0, batch_size=3), **kwargs})


def make_model(config, seed=0):
    torch.manual_seed(seed)
    return create_model(as_train_config(config), 0)


def run(config, folder, model=None, maps=False):
    splits = open_splits(as_train_config(config), config.test_split_fraction)
    return extract(config, model or make_model(config), splits, Path(folder), Accelerator(cpu=True), maps)


def test_features_are_what_the_backbone_answers(root, tmp_path):
    config = make_config(root)
    model = make_model(config)
    found = run(config, tmp_path / 'f', model)
    train = as_train_config(config)
    splits, transform = open_splits(train), eval_transform(resolve_data(train, model))
    for name, source in (('train', splits.train), ('validation', splits.validation), ('test', splits.test)):
        data = ImageData(source, transform)
        images = torch.stack([data[i, None][0] for i in range(len(source))])
        with torch.no_grad():
            expected = model.eval()(images)
        torch.testing.assert_close(found.features[name].x, expected[None], rtol=1e-4, atol=1e-5)
        assert found.features[name].y.tolist() == source.labels.tolist()
    assert found.made == 30 and found.input_size == (3, 16, 16)


def test_a_second_run_takes_the_cache(root, tmp_path):
    config = make_config(root)
    first = run(config, tmp_path / 'f')
    again = run(config, tmp_path / 'f')
    assert again.made == 0 and again.seconds == 0
    assert torch.equal(again.features['train'].x, first.features['train'].x)


def test_any_name_of_the_data_takes_the_cache(root, tmp_path, monkeypatch):
    first = run(make_config(root), tmp_path / 'f')
    (tmp_path / 'link').symlink_to('data')
    monkeypatch.chdir(tmp_path)
    for name in ('data', './f/../data', 'link'):
        again = run(make_config(name), 'f')
        assert again.made == 0 and torch.equal(again.features['test'].x, first.features['test'].x)
    (root / 'train' / 'ant' / '0.png').touch()
    with pytest.raises(UserError, match='other data'):
        run(make_config('data'), 'f')


def test_an_interrupted_run_goes_on_where_it_was(root, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, 'SHARD_SIZE', 4)
    monkeypatch.setattr('timm_spinal.compare.features.SHARD_SIZE', 4)
    config = make_config(root)
    first = run(config, tmp_path / 'f')
    lost = tmp_path / 'f' / 'train-0-00001.safetensors'
    lost.unlink()
    damaged = tmp_path / 'f' / 'test-0-00002.safetensors'
    damaged.write_bytes(damaged.read_bytes()[:-10])
    again = run(config, tmp_path / 'f')
    assert again.made == 4 + 2
    for split in ('train', 'test'):
        torch.testing.assert_close(again.features[split].x, first.features[split].x)


def change_image(root, config):
    path = root / 'train' / 'ant' / '0.png'
    Image.new('RGB', (12, 12), 'red').save(path)
    return config, 0


def touch_image_of_same_size(root, config):
    path = root / 'test' / 'bee' / '1.png'
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
    return config, 0


CHANGES = {
    'other data \\(train\\)': change_image,
    'other data \\(test\\)': touch_image_of_same_size,
    'other weights': lambda root, config: (config, 1),
    'another transform': lambda root, config: (make_config(root, crop_pct=0.5), 0),
    'another model': lambda root, config: (make_config(root, backbone='test_efficientnet'), 0),
}


@pytest.mark.parametrize('message', CHANGES)
def test_a_cache_that_does_not_fit_is_refused_and_kept(root, tmp_path, message):
    config = make_config(root)
    run(config, tmp_path / 'f', make_model(config, 0))
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / 'f').iterdir())
    config, seed = CHANGES[message](root, config)
    with pytest.raises(UserError, match=f'were made from .*{message}.*--rebuild'):
        run(config, tmp_path / 'f', make_model(config, seed))
    assert sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / 'f').iterdir()) == before
    config.rebuild = True
    assert run(config, tmp_path / 'f', make_model(config, seed)).made == 30


def test_another_timm_version_is_refused(root, tmp_path, monkeypatch):
    config = make_config(root)
    run(config, tmp_path / 'f')
    monkeypatch.setattr(timm, '__version__', '9.9')
    with pytest.raises(UserError, match='another timm version .*now 9.9'):
        run(config, tmp_path / 'f')


def test_shards_without_manifest_are_refused(root, tmp_path):
    config = make_config(root)
    run(config, tmp_path / 'f')
    (tmp_path / 'f' / 'manifest.json').unlink()
    with pytest.raises(UserError, match='no manifest.json'):
        run(config, tmp_path / 'f')


def test_a_shard_of_another_cache_is_not_taken(root, tmp_path):
    config = make_config(root)
    run(config, tmp_path / 'f', make_model(config, 0))
    run(config, tmp_path / 'g', make_model(config, 1))
    name = 'train-0-00000.safetensors'
    (tmp_path / 'f' / name).write_bytes((tmp_path / 'g' / name).read_bytes())
    again = run(config, tmp_path / 'f', make_model(config, 0))
    assert again.made == 10


def test_augmented_passes_differ_and_come_again(root, tmp_path):
    config = make_config(root, augment_passes=2)
    x = run(config, tmp_path / 'f').features['train'].x
    assert x.shape[:2] == (3, 10)
    assert not torch.allclose(x[0], x[1]) and not torch.allclose(x[1], x[2])
    assert torch.equal(x, run(make_config(root, augment_passes=2, workers=1), tmp_path / 'g').features['train'].x)
    assert torch.equal(x[:1], run(make_config(root), tmp_path / 'h').features['train'].x)


def test_maps_are_what_pooled_vectors_are_made_of(root, tmp_path):
    found = run(make_config(root), tmp_path / 'f', maps=True).features
    assert found['train.map'].x.ndim == 5
    torch.testing.assert_close(found['train.map'].x.mean(dim=(3, 4)), found['train'].x, rtol=1e-4, atol=1e-5)


def test_maps_come_channels_first(root, tmp_path):
    config = make_config(root, backbone='swin_tiny_patch4_window7_224', img_size=64, model_kwargs=dict(
        embed_dim=8, depths=(1, 1), num_heads=(1, 1), window_size=4))
    found = run(config, tmp_path / 'f', maps=True).features
    assert found['test.map'].x.shape == (1, 10, 16, 8, 8) and found['test'].x.shape == (1, 10, 16)


@pytest.mark.parametrize('backbone, size', [
    ('test_resnet', 64), ('test_convnext', 64), ('test_vit', 32), ('mobilenetv3_small_050', 64), ('test_mambaout', 64)])
def test_heads_read_what_an_attached_head_reads(root, backbone, size):
    model = make_model(make_config(root, backbone=backbone, img_size=size)).eval()
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cached = run_backbone(model, images, unpooled(model))
        torch.testing.assert_close(cached['pooled'], model(images))
        whole = attach_head(copy.deepcopy(model), 'attn', num_classes=3).eval()
        head = whole.attached_head
        expected = whole(images)
        head.input_fmt = head.input_fmt.replace('NHWC', 'NCHW')  # as maps are cached
        torch.testing.assert_close(head(cached['map']), expected, rtol=1e-4, atol=1e-5)


def test_tokens_are_cached_where_a_head_reads_them(root, tmp_path):
    config = make_config(root, backbone='test_vit', img_size=32)
    splits = open_splits(as_train_config(config), config.test_split_fraction)
    model = make_model(config)
    found = extract(config, model, splits, tmp_path / 'f', Accelerator(cpu=True), tokens=True).features
    x = found['train.map'].x
    assert x.shape == (1, 10, 1 + 4, model.num_features)
    torch.testing.assert_close(x[:, :, 0], found['train'].x, rtol=1e-4, atol=1e-5)  # the class token


def test_tokens_are_no_map(root, tmp_path):
    with pytest.raises(UserError, match='the backbone gives tokens'):
        run(make_config(root, backbone='test_vit', img_size=32), tmp_path / 'f', maps=True)


def test_unreadable_images_are_named_or_left_out(root, tmp_path):
    (root / 'train' / 'bee' / '2.png').write_bytes(b'nothing')
    with pytest.raises(UserError, match='2.png cannot be read'):
        run(make_config(root), tmp_path / 'f')
    found = run(make_config(root, skip_unreadable=True), tmp_path / 'g').features['train']
    assert found.x.shape[1] == len(found.y) == 9 and found.y.tolist() == [0] * 5 + [1] * 4


def test_no_space_is_told_before_anything_is_made(root, tmp_path, monkeypatch):
    from collections import namedtuple
    usage = namedtuple('usage', 'total used free')
    monkeypatch.setattr(shards.shutil, 'disk_usage', lambda _: usage(1, 1, 1000))
    with pytest.raises(UserError, match='need 0.00 GB, 0.00 GB are free'):
        run(make_config(root), tmp_path / 'f')
    assert not list((tmp_path / 'f').glob('*.safetensors'))


def test_split_transform_is_exact(root):
    config = as_train_config(make_config(root))
    transform = eval_transform(resolve_data(config, make_model(make_config(root))))
    begin, finish = split_transform(transform)
    image = Image.open(root / 'train' / 'ant' / '0.png').convert('RGB')
    assert begin(image).dtype == torch.uint8
    assert torch.equal(finish(begin(image)[None])[0], transform(image))


def test_manifest_names_what_features_are_of(root, tmp_path):
    found = run(make_config(root), tmp_path / 'f')
    manifest = json.loads((tmp_path / 'f' / 'manifest.json').read_text())
    assert manifest == found.identity and manifest['timm'] == timm.__version__ and set(manifest['data']) == {
        'train', 'validation', 'test'}


def test_run_backbone_without_pooling_is_refused(root, tmp_path):
    with pytest.raises(UserError, match='returns a map'):
        run(make_config(root, model_kwargs=dict(global_pool='')), tmp_path / 'f')
    model = make_model(make_config(root)).eval()
    assert run_backbone(model, torch.zeros(2, 3, 16, 16))['pooled'].shape == (2, model.num_features)


def test_upright_images_have_features_of_their_own(root, tmp_path):
    run(make_config(root), tmp_path / 'f')
    with pytest.raises(UserError, match='--rebuild'):
        run(make_config(root, exif_transpose=True), tmp_path / 'f')
