import json
import pickle
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import load_file

from timm_spinal.errors import UserError
from timm_spinal.training import distill
from timm_spinal.training.distill import TeacherLogits
from timm_spinal.training.splits import create_datasets
from timm_spinal.training.teacher import Teacher
from timm_spinal.training.train import open_run, train

from .runs import assert_same_state, command, last_state, resumed, small_config, train_until


def save_teacher(folder, seed=1, name='test_resnet'):
    torch.manual_seed(seed)
    timm.models.save_for_hf(timm.create_model(name, num_classes=2), folder, safe_serialization=True)
    return str(folder)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """WLD with a cache; shards of 8, so 22 images make three."""
    monkeypatch.setattr(distill, 'SHARD_SIZE', 8)
    monkeypatch.setattr('timm_spinal.shards.SHARD_SIZE', 8)
    return small_config(
        tmp_path, kd_model_name=save_teacher(tmp_path / 'teacher'), kd_distill_type='wld', no_aug=True,
        kd_cache=str(tmp_path / 'cache'), kd_renormalize=True)


def shards(tmp_path):
    return sorted((tmp_path / 'cache').glob('*.safetensors'))


def test_logits_are_those_of_the_teacher(config, tmp_path, capsys):
    model = timm.create_model(f'local-dir:{tmp_path / "teacher"}', pretrained=True).eval()
    with open_run(config) as run:
        assert 'teacher logits: 22 images' in capsys.readouterr().out and len(shards(tmp_path)) == 3
        assert run.task.teacher is None
        run.data.set_epoch(0)
        seen = 0
        for images, _, logits in run.train_loader:
            teacher = Teacher(model, [0.5] * 3, [0.5] * 3, run.data.data_config['mean'], run.data.data_config['std'])
            torch.testing.assert_close(logits, teacher(images), atol=1e-5, rtol=1e-5)
            seen += len(images)
    assert seen == 20


@pytest.mark.slow
def test_a_run_with_a_cache_is_the_run_without(config, tmp_path, monkeypatch):
    """Up to rounding: the teacher answers other batches. The second run with it never asks the teacher."""
    plain = replace(config, experiment='plain', kd_cache=None)
    train(plain)
    train(config)
    for (name, one), two in zip(last_state(plain).items(), last_state(config).values()):
        torch.testing.assert_close(one, two, atol=2e-4, rtol=1e-3, msg=name)
    monkeypatch.setattr(Teacher, 'forward', lambda self, images: images[:, :2, 0, 0])
    again = replace(config, experiment='again', workers=1)
    train(again)
    assert_same_state(config, again)


class Killed(Exception):
    pass


@pytest.mark.slow
def test_killed_and_resumed_is_bit_identical(config, monkeypatch):
    whole = replace(config, experiment='whole', checkpoint_steps=1, drop_path=0.2, kd_fade='constant')
    broken = replace(whole, experiment='broken')
    train(whole)
    train_until(monkeypatch, broken, 3, Killed())
    train_until(monkeypatch, resumed(broken), 6, Killed())
    train(resumed(broken))
    assert_same_state(whole, broken)


@pytest.mark.slow
def test_seeds_that_cut_other_images_share_the_cache(config, tmp_path):
    """The cache is of the whole split; the images of another cut get their own rows."""
    cut = replace(config, val_split_fraction=0.25, epochs=1)
    train(cut)
    before = [p.stat().st_mtime_ns for p in shards(tmp_path)]
    other = replace(cut, seed=8, experiment='other')
    with open_run(replace(other, experiment='look')) as run:
        rows = run.train_loader.dataset.rows
    train(other)
    assert [p.stat().st_mtime_ns for p in shards(tmp_path)] == before
    both = [create_datasets(c).train.indices.tolist() for c in (cut, other)]
    assert both[0] != both[1]
    stored = torch.cat([load_file(p)['logits'] for p in shards(tmp_path)])
    assert stored.shape == (22, 2) and all(torch.equal(rows[i], stored[i]) for i in range(22))


@pytest.mark.slow
def test_an_interrupted_cache_goes_on_and_a_damaged_shard_is_made_anew(config, tmp_path):
    train(replace(config, epochs=1))
    first, second, third = (p.read_bytes() for p in shards(tmp_path))
    files = shards(tmp_path)
    files[0].unlink()
    files[1].write_bytes(second[:-8])
    train(replace(config, epochs=1, experiment='again'))
    assert [p.read_bytes() for p in shards(tmp_path)] == [first, second, third]


@pytest.mark.parametrize('change, text', [
    (dict(mean=[0.1, 0.2, 0.3]), 'another mean'),
    (dict(interpolation='nearest'), 'another transform'),
    (dict(model='test_vit', img_size=64), 'another transform'),
    ('teacher', 'other weights'),
    ('data', 'other data'),
])
def test_a_cache_that_does_not_fit_is_refused_and_kept(config, tmp_path, change, text):
    train(replace(config, epochs=1))
    before = {p: p.read_bytes() for p in (tmp_path / 'cache').iterdir()}
    if change == 'teacher':
        save_teacher(tmp_path / 'teacher', seed=2)
    elif change == 'data':
        image = tmp_path / 'images' / 'train' / 'ant' / '3.png'
        image.write_bytes((tmp_path / 'images' / 'train' / 'ant' / '4.png').read_bytes())
    changed = replace(config, experiment='other', **(change if isinstance(change, dict) else {}))
    with pytest.raises(UserError, match=f'teacher logits .*cache: were made from .*{text}.*; remove the folder, or '
                                        'choose another --kd-cache') as error:
        train(changed)
    assert '\n' not in str(error.value) and not (tmp_path / 'other').exists()
    assert {p: p.read_bytes() for p in (tmp_path / 'cache').iterdir()} == before


def test_a_folder_of_something_else_is_refused(config, tmp_path):
    (tmp_path / 'cache').write_text('a file')
    with pytest.raises(UserError, match='teacher logits .*cache: File exists; choose another folder'):
        train(config)


def test_bare_flag_puts_it_beside_the_run(config, tmp_path):
    train(replace(config, kd_cache='beside', epochs=1))
    assert len(list((tmp_path / 'teacher-logits').glob('*.safetensors'))) == 3
    manifest = json.loads((tmp_path / 'teacher-logits' / 'manifest.json').read_text())
    assert manifest['num_classes'] == 2 and manifest['timm'] == timm.__version__


def test_past_the_fade_the_cache_is_not_needed(config, tmp_path):
    whole = replace(config, kd_fade_end=0.3)
    train(replace(whole, stop_epoch=1))
    for path in [*shards(tmp_path), tmp_path / 'cache' / 'manifest.json']:
        path.unlink()
    train(resumed(whole))
    assert shards(tmp_path) == []


def test_unreadable_images(config, tmp_path):
    (tmp_path / 'images' / 'train' / 'bee' / '2.png').write_bytes(b'nothing')
    with pytest.raises(UserError, match='2.png cannot be read'):
        train(config)
    with open_run(replace(config, skip_unreadable=True, data_on_device='never')) as run:
        run.data.set_epoch(0)
        rows, dataset = run.train_loader.dataset.rows, run.train_loader.dataset
        (_, _, logits), = dataset.__getitems__([(13, None)])
    assert dataset.split.describe(13).endswith('bee/2.png')
    assert torch.equal(logits, rows[14]) and not torch.equal(rows[13], rows[14])  # of the image that took its place


@pytest.mark.slow
def test_two_processes_make_and_share_it(config, tmp_path, launch):
    """Without the smaller shards, which are of this process only."""
    one = replace(config, epochs=1, kd_cache=str(tmp_path / 'cache'), batch_size=2, experiment='two')
    assert 'teacher logits: 22 images' in launch(2, *command(one)[1:]).stdout
    stored = load_file(shards(tmp_path)[0])['logits']
    model = timm.create_model(f'local-dir:{tmp_path / "teacher"}', pretrained=True).eval()
    assert stored.shape == (22, 2) and len(shards(tmp_path)) == 1
    datasets = create_datasets(one)
    with open_run(replace(one, kd_cache=None, experiment='look', data_on_device='never')) as run:
        dataset, data_config = run.train_loader.dataset, run.data.data_config
    dataset.rows = None
    images = torch.stack([dataset[i, None][0] for i in range(len(datasets.train))])
    teacher = Teacher(model, [0.5] * 3, [0.5] * 3, data_config['mean'], data_config['std'])
    torch.testing.assert_close(stored, teacher(images), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_any_name_of_the_data_takes_the_cache(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(replace(config, epochs=1, data_dir='images'))
    kept = load_file(shards(tmp_path)[0])['logits']
    monkeypatch.setattr(Teacher, 'forward', lambda self, images: images[:, :2, 0, 0])
    again = replace(config, epochs=1, experiment='again')
    train(again)
    assert_same_state(replace(config), again)
    assert torch.equal(load_file(shards(tmp_path)[0])['logits'], kept)


def test_rows_survive_another_process(config, tmp_path):
    train(replace(config, epochs=1))
    rows = TeacherLogits(tmp_path / 'cache')
    first = rows[3]
    copied = pickle.loads(pickle.dumps(rows))
    assert torch.equal(copied[3], first) and first.shape == (2,)
