"""Files of weights as people save them, and files that are none."""
import argparse
import pathlib

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from timm_spinal.models.weight_files import WeightsError, read_weights, unwrap

STATE = {
    'conv.weight': torch.arange(24.).view(2, 3, 2, 2), 'bn.weight': torch.ones(2),
    'bn.num_batches_tracked': torch.tensor(7),
}
OTHER = {name: value + 1 for name, value in STATE.items()}


def prefixed(prefix, state=STATE):
    return {prefix + name: value for name, value in state.items()}


def same(found, wanted=STATE):
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize('checkpoint', [
    STATE,
    dict(state_dict=STATE, epoch=3, optimizer=dict(state={0: dict(momentum=torch.ones(3))})),
    dict(model=STATE, args=argparse.Namespace(lr=0.1, data=pathlib.PurePosixPath('/data'))),
    dict(net_state_dict=prefixed('module.'), best_acc=np.float64(92.5), epoch=np.int64(3)),
    dict(state_dict=OTHER, state_dict_ema=STATE),
    dict(model=OTHER, model_ema=prefixed('module.')),
    dict(model_state_dict=STATE),
    dict(net=prefixed('module.')),
    dict(model=dict(state_dict=prefixed('_orig_mod.'))),
    dict(state_dict=dict(model=dict(net_state_dict=prefixed('module._orig_mod.')))),
    dict(state_dict=prefixed('_orig_mod.module.')),
    prefixed('model.'),
    dict(state_dict=prefixed('model.')),
    prefixed('module.model._orig_mod.'),
    prefixed('student.') | {'projector.weight': torch.ones(3, 3)},
    {name: value.numpy() for name, value in STATE.items()},
    {'conv._orig_mod.weight': STATE['conv.weight'], 'bn.weight': STATE['bn.weight'],
     'bn.num_batches_tracked': STATE['bn.num_batches_tracked']},
    STATE | {'_extra_state': 3},
], ids=lambda checkpoint: '-'.join(list(checkpoint)[:2]))
@pytest.mark.parametrize('zipped', [True, False])
def test_containers_and_prefixes(checkpoint, zipped, tmp_path):
    torch.save(checkpoint, tmp_path / 'x.bin', _use_new_zipfile_serialization=zipped)
    assert same(read_weights(tmp_path / 'x.bin'))


def test_a_counter_beside_an_average_stays_with_its_name():
    found = unwrap({'n_averaged': torch.tensor(3), **prefixed('module.')})
    assert found is not None and same(found, STATE | {'n_averaged': torch.tensor(3)})


def test_average_or_not(tmp_path):
    torch.save(dict(state_dict=STATE, state_dict_ema=OTHER), tmp_path / 'both.pth')
    torch.save(dict(state_dict=STATE), tmp_path / 'plain.pth')
    torch.save(dict(state_dict_ema=OTHER), tmp_path / 'average.pth')
    assert same(read_weights(tmp_path / 'both.pth'), OTHER) and same(read_weights(tmp_path / 'both.pth', True), OTHER)
    assert same(read_weights(tmp_path / 'both.pth', False)) and same(read_weights(tmp_path / 'plain.pth'))
    assert same(read_weights(tmp_path / 'average.pth', False), OTHER)
    with pytest.raises(WeightsError, match='plain.pth: it has no moving average .its keys are state_dict'):
        read_weights(tmp_path / 'plain.pth', True)


def test_formats_are_told_by_their_content(tmp_path):
    save_file(STATE, tmp_path / 'tensors.pth')
    torch.save(STATE, tmp_path / 'pickle.safetensors')
    for name in ('tensors.pth', 'pickle.safetensors'):
        assert same(read_weights(tmp_path / name))


@pytest.mark.parametrize('save', [save_file, torch.save])
@pytest.mark.parametrize('part', [0.02, 0.3, 0.6, 0.97])
def test_a_file_that_was_cut_is_told_in_one_line(save, part, tmp_path):
    save({name: value.repeat(64) if value.ndim == 1 else value for name, value in STATE.items()}, tmp_path / 'x.pth')
    whole = (tmp_path / 'x.pth').read_bytes()
    (tmp_path / 'x.pth').write_bytes(whole[:int(part * len(whole))])
    with pytest.raises(WeightsError, match=r'x.pth: is damaged.* incomplete') as error:
        read_weights(tmp_path / 'x.pth')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('content, message', [
    (b'', 'is empty; copy or download it again'),
    (b'just some text\n' * 40, 'is damaged, incomplete or not a file of weights'),
    (b'\n<!DOCTYPE html><html>', 'is a web page, not weights'),
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:00\n', 'is a pointer of Git LFS'),
    (b'\x89HDF\r\n\x1a\n' + bytes(100), 'is an HDF5 file'),
])
def test_no_weights(content, message, tmp_path):
    (tmp_path / 'x.pth').write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        read_weights(tmp_path / 'x.pth')


@pytest.mark.parametrize('checkpoint, message', [
    (torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1).state_dict(), 'its keys are state, param_groups'),
    (dict(epoch=3, best=0.5, lr=0.1, seed=1, host='a'), 'its keys are epoch, best, lr and 2 more'),
    ({}, 'it is a dict'), ([STATE], 'it is a list'), (torch.ones(3), 'it is a Tensor'),
])
def test_no_weights_in_a_pickle(checkpoint, message, tmp_path):
    torch.save(checkpoint, tmp_path / 'x.pth')
    with pytest.raises(WeightsError, match=f'x.pth: it has no weights .{message}'):
        read_weights(tmp_path / 'x.pth')


def test_folders_arrays_and_missing_files(tmp_path):
    np.savez(tmp_path / 'x.npz', **{name: value.numpy() for name, value in STATE.items()})
    for path, message in ((tmp_path, 'is a folder; give the file'), (tmp_path / 'no.pth', 'no.pth: no such file'),
                          (tmp_path / 'x.npz', 'is a NumPy archive')):
        with pytest.raises(WeightsError, match=message):
            read_weights(path)


@pytest.mark.parametrize('zipped', [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_named(zipped, tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / 'ran'), 'w')

    for checkpoint, needed in ((dict(state_dict=STATE, extra=Evil()), 'io.open'),
                               (torch.nn.Sequential(torch.nn.Linear(2, 2)), 'torch.nn.modules')):
        torch.save(checkpoint, tmp_path / 'x.pth', _use_new_zipfile_serialization=zipped)
        with pytest.raises(WeightsError, match=f'its pickle needs {needed}.*which may run code') as error:
            read_weights(tmp_path / 'x.pth')
        assert '\n' not in str(error.value)
    assert not (tmp_path / 'ran').exists()
