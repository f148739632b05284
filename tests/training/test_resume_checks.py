"""What a resumed run may not change, and names that mean the same."""
import os
import shutil
from dataclasses import replace

import pytest

from timm_spinal.errors import UserError
from timm_spinal.training.config import TrainConfig
from timm_spinal.training.options import option_names
from timm_spinal.training.resume_checks import changed_settings
from timm_spinal.training.train import train

from .runs import assert_same_state, resumed, small_config


@pytest.mark.parametrize('key', option_names(TrainConfig, path=True))
def test_names_of_one_place_are_the_same(tmp_path, monkeypatch, key):
    (tmp_path / 'a' / 'data').mkdir(parents=True)
    (tmp_path / 'b' / 'data').mkdir(parents=True)
    (tmp_path / 'link').symlink_to('a/data')
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path / 'b')
    before, elsewhere = {key: 'data'}, str(tmp_path / 'a')
    for now in (f'{tmp_path}/a/data', '../a/data/', './../a/../a/data', '../link', '~/a/data'):
        assert changed_settings(before, {key: now}, elsewhere) == {}
    # the same word in another folder is another place, also where it is a link to a third one
    assert changed_settings(before, {key: 'data'}, elsewhere) == {key: "'data' -> 'data'"}
    assert changed_settings(before, {key: '../b/data'}, elsewhere) == {key: "'data' -> '../b/data'"}
    assert changed_settings(before, {key: ''}, elsewhere) == {key: "'data' -> ''"}
    # the checkpoint does not say where it was made, or everything was moved
    assert changed_settings(before, {key: f'{tmp_path}/b/data'}) == {}
    assert changed_settings(before, {key: 'data'}, str(tmp_path / 'gone')) == {}


@pytest.mark.parametrize('key, prefix', [('model', 'local-dir:'), ('dataset', 'hfds/'), ('dataset', 'hfids/')])
def test_places_behind_a_prefix(tmp_path, monkeypatch, key, prefix):
    (tmp_path / 'x').mkdir()
    monkeypatch.chdir(tmp_path)
    assert changed_settings({key: f'{prefix}x'}, {key: f'{prefix}{tmp_path}/x'}) == {}
    assert changed_settings({key: f'{prefix}x'}, {key: f'{prefix}y'}) != {}
    assert changed_settings({key: f'{prefix}org/name'}, {key: f'{prefix}org/name'}, '/elsewhere') == {}
    assert changed_settings({key: 'x'}, {key: str(tmp_path / 'x')}) != {}


def test_names_that_are_no_places_are_compared_as_they_are():
    assert changed_settings(dict(kd_model_name='resnet18'), dict(kd_model_name='resnet18'), '/elsewhere') == {}
    assert changed_settings(dict(model='a', lr=1, betas=(1, 2)), dict(model='b', lr=2, betas=[1, 2])) == {
        'model': "'a' -> 'b'", 'lr': '1 -> 2'}


@pytest.mark.slow
def test_a_run_goes_on_from_another_folder_by_another_name(tmp_path, monkeypatch):
    """Bit for bit; a folder of the same name that holds other data is refused."""
    whole = small_config(tmp_path, experiment='whole', epochs=2)
    train(whole)
    monkeypatch.chdir(tmp_path)
    part = replace(whole, experiment='part', data_dir='images')
    train(replace(part, stop_epoch=1))
    (tmp_path / 'elsewhere').mkdir()
    shutil.copytree('images', 'elsewhere/images')
    monkeypatch.chdir(tmp_path / 'elsewhere')
    with pytest.raises(UserError, match="made with other settings: data_dir .'images' -> 'images'"):
        train(resumed(part))
    train(resumed(part, data_dir=os.path.join('..', 'elsewhere', '..', 'images')))
    assert_same_state(whole, part)
