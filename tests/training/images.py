"""Small image data sets for the tests, and where the real ones lie when they are there."""
import gzip
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from timm_spinal.training.config import TrainConfig
from timm_spinal.training.data import create_data
from timm_spinal.training.splits import create_datasets

REAL = Path(os.environ.get('TIMM_SPINAL_TEST_DATA') or Path(__file__).parents[3] / 'shared' / 'data')


def make_split(root: Path, classes=('ant', 'bee'), per_class=6, size=12) -> Path:
    """A folder per class with noise images that are all different; returns the split's folder."""
    rng = np.random.default_rng([len(root.name), per_class])
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f'{i}.png')
    return root


def make_folder(root: Path, splits=('train', 'validation'), **kwargs) -> Path:
    for split in splits:
        make_split(root / split, **kwargs)
    return root


def write_idx(path: Path, array: np.ndarray) -> None:
    """A file of the idx format, packed when its name ends in .gz."""
    header = bytes([0, 0, 8, array.ndim]) + b''.join(n.to_bytes(4, 'big') for n in array.shape)
    data = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)


def make_mnist(root: Path, train: int = 40, test: int = 20, packed: bool = False) -> Path:
    """The four files of MNIST with noise in place of digits, all different; label i % 10."""
    root.mkdir(parents=True, exist_ok=True)
    for part, count in (('train', train), ('t10k', test)):
        images = np.random.default_rng(count).integers(0, 256, (count, 28, 28))
        for kind, array in (('images-idx3', images), ('labels-idx1', np.arange(count) % 10)):
            write_idx(root / f'{part}-{kind}-ubyte{".gz" if packed else ""}', array)
    return root


class TinyModel:
    """What the data need of a model: channels, classes, a pretrained_cfg and modules."""
    in_chans = 3
    num_classes = 2
    pretrained_cfg = dict(input_size=(3, 8, 8), mean=(0.5,) * 3, std=(0.25,) * 3, interpolation='bilinear', crop_pct=1.)

    @staticmethod
    def modules():
        return []


def quick_config(**options) -> TrainConfig:
    return TrainConfig(**{**dict(workers=0, batch_size=4, seed=1), **options})


def make_data(config: TrainConfig, model=TinyModel, **kwargs):
    return create_data(config, model, create_datasets(config), **kwargs)


def need_mnist(tmp_path: Path) -> Path:
    """torchvision's ROOT/MNIST/raw, unpacked from the real idx files; skips the test without them."""
    return need_idx('mnist', tmp_path)


def need_idx(name: str, tmp_path: Path) -> Path:
    """The same for 'mnist' or 'fashion_mnist'."""
    source = REAL / name
    if not source.is_dir():
        pytest.skip(f'no real data under {source}')
    raw = tmp_path / dict(mnist='MNIST', fashion_mnist='FashionMNIST')[name] / 'raw'
    raw.mkdir(parents=True)
    for packed in source.glob('*.gz'):
        (raw / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    return tmp_path


def data_of(config: TrainConfig, tmp_path: Path) -> Path:
    """The folder for --data-dir of a recipe on real data; skips the test where they are not there."""
    if config.dataset == 'digits':
        return tmp_path
    if config.dataset in ('torch/mnist', 'torch/fashion_mnist'):
        return need_idx(config.dataset.partition('/')[2], tmp_path)
    if not config.dataset and (REAL / Path(config.data_dir).name).is_dir():
        return REAL / Path(config.data_dir).name
    pytest.skip(f'no real data for {config.dataset or config.data_dir} under {REAL}')


def need_cifar10() -> Path:
    folder = REAL / 'cifar10'
    if not folder.is_dir():
        pytest.skip(f'no real data under {REAL}')
    return folder
