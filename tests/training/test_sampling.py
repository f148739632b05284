from collections import Counter

import numpy as np
import pytest

from timm_spinal.training.sampling import (
    EvalSampler,
    TrainSampler,
    epoch_length,
    images_of_passes,
    stratified_split,
)


def pairs(sampler, epoch=0):
    sampler.begin_epoch(epoch)
    return list(sampler)


def test_an_epoch_is_a_permutation_with_different_seeds():
    order, seeds = zip(*pairs(TrainSampler(50, seed=3)))
    assert sorted(order) == list(range(50)) and list(order) != list(range(50))
    assert len(set(seeds)) == 50 and all(0 <= s < 2 ** 32 for s in seeds)


def test_order_and_seeds_depend_on_seed_and_epoch_only():
    first = pairs(TrainSampler(50, seed=3), epoch=2)
    again = TrainSampler(50, seed=3)
    pairs(again, epoch=0)
    assert pairs(again, epoch=2) == first
    assert pairs(again, epoch=3) != first
    assert pairs(TrainSampler(50, seed=4), epoch=2) != first


def test_repeats_put_each_image_in_a_row_with_its_own_seeds():
    sampler = TrainSampler(12, seed=0, aug_repeats=3)
    items = pairs(sampler)
    order = [i for i, _ in items]
    assert len(items) == len(sampler) == 12
    assert all(len(set(order[k:k + 3])) == 1 for k in range(0, 12, 3)) and len(set(order)) == 4
    assert len({s for _, s in items}) == 12


def test_repeats_need_not_be_whole():
    order = [i for i, _ in pairs(TrainSampler(9, seed=0, aug_repeats=1.5))]
    assert len(order) == 9 and sorted(Counter(order).values()) == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize('repeats, length, most', [(2., 20, 2), (0.5, 5, 1), (1.25, 12, 2)])
def test_epoch_repeats_set_the_length_in_passes(repeats, length, most):
    sampler = TrainSampler(10, seed=0, length=images_of_passes(10, repeats))
    order = [i for i, _ in pairs(sampler)]
    assert len(order) == len(sampler) == length
    assert max(Counter(order).values()) == most


@pytest.mark.parametrize('images, batch, update, least, length', [
    (200, 128, 128, 0, 256),
    (22, 4, 8, 0, 24),  # whole batches; the last update may have fewer of them
    (12_799, 128, 128, 0, 12_800),
    (12_801, 128, 128, 0, 12_801),  # the loader drops the last image, as in timm
    (200, 32, 32, 40, 1280),
    (2000, 32, 64, 40, 2560),
    (2000, 32, 32, 40, 2016),
])
def test_length_of_an_epoch(images, batch, update, least, length):
    assert epoch_length(images, batch, update, least) == length


def test_evaluation_takes_each_image_once_in_order():
    assert list(EvalSampler(3)) == [(0, None), (1, None), (2, None)]


def test_stratified_split_takes_the_same_part_of_each_class():
    labels = np.array([0] * 40 + [1] * 20 + [2] * 10)
    first, second = stratified_split(labels, 0.1, seed=5)
    assert sorted([*first, *second]) == list(range(70))
    assert np.bincount(labels[second]).tolist() == [4, 2, 1]
    assert all(np.array_equal(a, b) for a, b in zip(stratified_split(labels, 0.1, seed=5), (first, second)))
    assert not np.array_equal(stratified_split(labels, 0.1, seed=6)[1], second)


def test_stratified_split_leaves_no_class_without_training_images():
    labels = np.array([0, 0, 1, 1, 2])
    first, second = stratified_split(labels, 0.01, seed=0)
    assert np.bincount(labels[first], minlength=3).tolist() == [1, 1, 1]
    assert np.bincount(labels[second], minlength=3).tolist() == [1, 1, 0]
