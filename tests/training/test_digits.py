import sys

import numpy as np
import pytest

from timm_spinal.errors import UserError
from timm_spinal.training.digits import open_digits


def test_digits_are_split_once_and_for_all():
    pytest.importorskip('sklearn')
    train, validation = open_digits('train'), open_digits('validation')
    assert (len(train), len(validation)) == (1438, 359)
    assert sorted([*train.indices, *validation.indices]) == list(range(1797))
    assert np.bincount(validation.labels).tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]
    assert validation.class_names == list('0123456789')


def test_a_digit_is_a_grey_image_of_sklearns_values():
    datasets = pytest.importorskip('sklearn.datasets')
    train = open_digits('train')
    image, label = train.read(7)
    raw = datasets.load_digits()
    index = train.indices[7]
    assert image.mode == 'L' and image.size == (8, 8) and label == raw.target[index] == train.labels[7]
    assert np.abs(np.asarray(image) / 255 * 16 - raw.images[index]).max() < 0.04


def test_unknown_split_and_missing_package_say_what_to_do(monkeypatch):
    with pytest.raises(UserError, match='train and validation'):
        open_digits('test')
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    with pytest.raises(UserError, match=r'pip install .timm-spinal\[digits\]'):
        open_digits('train')
