import errno
import resource

import pytest
import torch

from timm_spinal.errors import UserError
from timm_spinal.files import sha256, write_atomically, write_error


def test_replaces_in_one_step(tmp_path):
    path = tmp_path / 'a.txt'
    path.write_text('old')

    def write(temp):
        assert temp.parent == tmp_path and path.read_text() == 'old'
        temp.write_text('new')

    write_atomically(path, write)
    assert path.read_text() == 'new' and list(tmp_path.iterdir()) == [path]


def test_another_error_leaves_the_old_file_and_comes_out(tmp_path):
    path = tmp_path / 'a.txt'
    path.write_text('old')

    def write(temp):
        temp.write_text('half')
        raise KeyError('bug')

    with pytest.raises(KeyError):
        write_atomically(path, write)
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('write', [
    lambda p: p.write_bytes(bytes(5000)),
    lambda p: torch.save(torch.zeros(5000), p),
], ids=['python', 'torch'])
def test_full_disk(tmp_path, write):
    path = tmp_path / 'a.txt'
    path.write_text('old')
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match=f'cannot write {path}: .*; the file that was there before is kept'):
            write_atomically(path, write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]


def test_write_error():
    assert write_error(OSError(errno.ENOSPC, 'No space left on device')) == 'No space left on device'
    assert write_error(ValueError('something else')) is None


def test_sha256(tmp_path):
    (tmp_path / 'a').write_bytes(b'abc')
    assert sha256(tmp_path / 'a') == 'ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad'
