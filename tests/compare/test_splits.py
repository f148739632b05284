import numpy as np
import pytest

from tests.training.images import make_folder, make_split
from timm_spinal.compare.splits import open_splits, three_way
from timm_spinal.errors import UserError
from timm_spinal.training.config import TrainConfig


def files(source):
    return {source.describe(i) for i in range(len(source))}


def config(root, **kwargs):
    return TrainConfig(data_dir=str(root), **kwargs)


def test_three_splits_of_a_folder_are_kept(tmp_path):
    make_folder(tmp_path, ('train', 'val', 'test'))
    splits = open_splits(config(tmp_path))
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [12, 12, 12]
    assert all('/val/' in f for f in files(splits.validation)) and all('/test/' in f for f in files(splits.test))


@pytest.mark.parametrize('held_out', ['validation', 'test'])
def test_validation_is_cut_from_train_where_there_is_one_held_out_split(tmp_path, held_out):
    make_folder(tmp_path, ('train', held_out), per_class=10)
    splits = open_splits(config(tmp_path))
    assert all(f'/{held_out}/' in f for f in files(splits.test)) and len(splits.test) == 20
    assert len(splits.train) == 18 and np.bincount(splits.validation.labels).tolist() == [1, 1]
    assert not files(splits.train) & files(splits.validation)
    assert all('/train/' in f for f in files(splits.train) | files(splits.validation))
    assert '10 % of each class' in splits.note


def test_all_three_are_cut_from_a_folder_of_classes(tmp_path):
    make_split(tmp_path / 'all', per_class=20)
    splits = open_splits(config(tmp_path / 'all'), test_fraction=0.25)
    sets = [files(s) for s in (splits.train, splits.validation, splits.test)]
    assert len(set.union(*sets)) == 40 == sum(map(len, sets))
    assert np.bincount(splits.test.labels).tolist() == [5, 5]
    assert np.bincount(splits.validation.labels).tolist() == [2, 2]


def test_digits_keep_their_held_out_part_for_the_test():
    splits = open_splits(TrainConfig(dataset='digits'))
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 1797
    indices = [set(s.indices) for s in (splits.train, splits.validation, splits.test)]
    assert len(set.union(*indices)) == 1797


def test_the_user_decides(tmp_path):
    make_folder(tmp_path, ('train', 'validation', 'test'), per_class=10)
    changed, _ = three_way(config(tmp_path, val_split_fraction=0.3))
    assert changed.val_split_fraction == 0.3 and changed.test_split == 'test'
    changed, _ = three_way(config(tmp_path, test_split='validation'))
    assert changed.test_split == 'validation' and changed.val_split_fraction == 0.1


def test_train_size_takes_a_stratified_part(tmp_path):
    make_folder(tmp_path, ('train', 'test'), per_class=20)
    splits = open_splits(config(tmp_path), train_size=11)
    assert len(splits.train) == 11 and sorted(np.bincount(splits.train.labels)) == [5, 6]
    again = open_splits(config(tmp_path), train_size=11)
    assert files(again.train) == files(splits.train)
    other = open_splits(config(tmp_path, seed=1), train_size=11)
    assert files(other.train) != files(splits.train)


def test_a_class_too_small_to_split_is_named(tmp_path):
    make_folder(tmp_path, ('train', 'test'))
    make_split(tmp_path / 'train', classes=('cow',), per_class=1)
    with pytest.raises(UserError, match='class cow: has 1 image, but cutting the splits needs 2'):
        open_splits(config(tmp_path))


def test_a_class_too_small_for_three_is_named(tmp_path):
    make_split(tmp_path / 'all', per_class=20)
    make_split(tmp_path / 'all', classes=('cow',), per_class=2)
    with pytest.raises(UserError, match='class cow: has 2 images, but cutting the splits needs 3'):
        open_splits(config(tmp_path / 'all'))


def test_test_labels_outside_the_training_classes_are_refused(tmp_path):
    make_folder(tmp_path, ('train', 'test'))
    make_split(tmp_path / 'test', classes=('zebra',), per_class=1)
    with pytest.raises(UserError, match='zebra'):
        open_splits(config(tmp_path))


def test_a_class_map_does_not_hide_them(tmp_path):
    make_folder(tmp_path, ('train', 'test'))
    make_split(tmp_path / 'test', classes=('zebra',), per_class=1)
    (tmp_path / 'map.txt').write_text('ant\nbee\nzebra\n')
    with pytest.raises(UserError, match='class .* is not in the training split'):
        open_splits(config(tmp_path, class_map=str(tmp_path / 'map.txt')))


@pytest.mark.parametrize('size, message', [(1, 'there are 2 classes'), (500, 'has 10 images')])
def test_bad_train_size(tmp_path, size, message):
    make_folder(tmp_path, ('train', 'test'))
    with pytest.raises(UserError, match=message):
        open_splits(config(tmp_path), train_size=size)


def test_streams_are_refused():
    with pytest.raises(UserError, match='streamed source'):
        three_way(TrainConfig(dataset='wds/some'))
