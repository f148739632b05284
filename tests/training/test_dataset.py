import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset
from torchvision import transforms

from timm_spinal.errors import UserError
from timm_spinal.training.dataset import (
    EvalSampler,
    ImageData,
    Split,
    StreamData,
    TrainSampler,
    epoch_length,
    images_of_passes,
    stratified_split,
)
from timm_spinal.training.image_folder import open_images
from timm_spinal.training.pixels import Decoder
from timm_spinal.training.transforms import preserved_rng, seed_rng

from .images import make_split

NOISE = transforms.Compose([transforms.ToTensor(), lambda x: x + torch.rand(()) + random.random() + np.random.rand()])


@pytest.fixture
def source(tmp_path):
    path = make_split(tmp_path / 'train', per_class=4)
    return Split('train', open_images(path), labels=np.repeat([0, 1], 4))


def draws():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_the_seed_alone_decides_the_augmentation(source):
    data = ImageData(source, NOISE)
    first, label = data[3, 11]
    draws()
    assert torch.equal(data[3, 11][0], first) and label == 0
    assert not torch.equal(data[3, 12][0], first)
    # a batch goes by the seed of its first image, and its images differ
    batch, again = (data.__getitems__([(3, 11), (3, other)]) for other in (1, 2))
    assert torch.equal(batch[0][0], first) and torch.equal(batch[1][0], again[1][0])
    assert not torch.equal(batch[1][0], first)


def test_loading_leaves_the_global_streams_alone(source):
    seed_rng(5)
    expected = draws()
    seed_rng(5)
    loader = DataLoader(ImageData(source, NOISE), batch_size=4, sampler=TrainSampler(8, 0), generator=torch.Generator())
    list(loader)
    assert draws() == expected


def test_preserved_rng_restores_after_an_error():
    seed_rng(5)
    expected = draws()
    seed_rng(5)
    with pytest.raises(KeyError), preserved_rng():
        draws()
        raise KeyError
    assert draws() == expected


def test_images_come_in_the_mode_that_is_asked_for(source):
    grey = ImageData(source, transforms.ToTensor(), Decoder('L'))[0, None][0]
    colour = ImageData(source, transforms.ToTensor())[0, None][0]
    assert grey.shape == (1, 12, 12) and colour.shape == (3, 12, 12)
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    assert torch.allclose(grey, (colour * weights).sum(0, keepdim=True), atol=1 / 255)


def test_subset_of_a_subset_reads_the_same_images(source):
    part = source.subset(np.array([1, 4, 6, 7])).subset(np.array([3, 1]))
    assert len(part) == 2 and part.labels.tolist() == [1, 1]
    for i, whole in enumerate((7, 4)):
        image, label = part.read(i)
        expected, _ = source.read(whole)
        assert label == 1 and np.array_equal(image, expected)


def spoil(source, index):
    path = source.dataset.filename(index, absolute=True)
    with open(path, 'r+b') as f:
        f.truncate(60)
    return path


@pytest.mark.parametrize('workers', [0, 2])
def test_an_unreadable_image_is_named_on_one_line(source, workers):
    path = spoil(source, 5)
    loader = DataLoader(
        ImageData(source, transforms.ToTensor()), batch_size=2, sampler=EvalSampler(8), num_workers=workers)
    with pytest.raises(UserError) as error:
        list(loader)
    message = str(error.value)
    assert message.startswith(f'image {path} cannot be read (') and '--skip-unreadable' in message
    assert '\n' not in message and 'Traceback' not in message


@pytest.mark.parametrize('workers', [0, 2])
def test_skipped_images_are_replaced_or_marked_and_counted(source, workers):
    spoil(source, 5)
    spoil(source, 6)
    train = ImageData(source, transforms.ToTensor(), on_unreadable='replace')
    for _ in range(2):  # the same two images again are not counted again
        batches = list(DataLoader(train, batch_size=8, sampler=EvalSampler(8), num_workers=workers))
    images, targets = batches[0]
    assert torch.equal(images[5], images[7]) and torch.equal(images[6], images[7])
    assert targets.tolist() == [0, 0, 0, 0, 1, 1, 1, 1] and int(train.unreadable.sum()) == 2
    evaluation = ImageData(source, transforms.Compose([transforms.Resize(12), transforms.ToTensor()]),
                           on_unreadable='mark')
    _, targets = next(iter(DataLoader(evaluation, batch_size=8, sampler=EvalSampler(8), num_workers=workers)))
    assert targets.tolist() == [0, 0, 0, 0, 1, -1, -1, 1] and int(evaluation.unreadable.sum()) == 2


def test_nothing_readable_stops_even_when_skipping(source):
    for i in range(8):
        spoil(source, i)
    with pytest.raises(UserError, match='in a row'):
        ImageData(source, transforms.ToTensor(), on_unreadable='replace')[0, 1]


def test_label_offset_moves_labels_to_zero():
    pairs = [(Image.new('L', (4, 4)), 1), (Image.new('L', (4, 4)), 26)]
    source = Split('letters', pairs, np.array([0, 25]), label_offset=1)
    assert [source.read(i)[1] for i in range(2)] == [0, 25]


class Stream(IterableDataset):
    epoch = None

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 4

    def __iter__(self):
        return ((Image.new('RGB', (4, 4)), i) for i in range(4))


def test_stream_augments_by_epoch_and_keeps_the_global_streams():
    data = StreamData(Split('s', Stream(), streamed=True), NOISE, Decoder('L'), seed=1)

    def run(epoch):
        data.begin_epoch(epoch)
        return [(image.mean().item(), target) for image, target in data]

    seed_rng(5)
    first = run(0)
    after = draws()
    seed_rng(5)
    assert draws() == after and run(0) == first and run(1) != first
    assert data.split.dataset.epoch == 1 and [t for _, t in first] == [0, 1, 2, 3]
    assert len({v for v, _ in first}) == 4


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
