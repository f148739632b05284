"""Open one split of any data set by its name.

'' is a folder or tar file, ``digits`` the digits of scikit-learn, ``multimnist`` pairs of MNIST digits, ``torch/`` a
torchvision set, ``hfds/``, ``hfids/``, ``wds/`` and ``tfds/`` timm's readers of these names. Failures come out as
one-line errors that say what to do.
"""
import difflib
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
from timm.data import create_dataset

from timm_spinal.errors import UserError

from .config import TrainConfig, ValidateConfig
from .dataset import Source
from .digits import open_digits
from .folders import find_split, open_images
from .multimnist import find_mnist, open_multimnist
from .torch_sources import NAMES, open_torch, torch_class_names, torch_labels, torch_split

STREAMED = ('hfids', 'wds', 'tfds')
_PACKAGES = {'hfds': 'datasets', 'hfids': 'datasets', 'wds': 'webdataset', 'tfds': 'tensorflow-datasets tensorflow'}


def open_source(
        config: TrainConfig | ValidateConfig,
        split: str,
        training: bool = False,
        whole: bool = False,
        class_map: Any = None,
) -> Source:
    """Open one split.

    Args:
        config: Where the data are: `DataOptions`, and batch_size, workers and seed for streamed sources.
        split: Name of the split.
        training: Streamed sources shuffle when training; it decides the number and the seed of the pairs of multimnist.
        whole: A folder without splits, or a single tar file, is the split itself.
        class_map: Class name to index, in place of ``config.class_map``.

    Raises:
        UserError: The data set is unknown or missing, has no such split or cannot be downloaded.
    """
    prefix, sep, name = config.dataset.partition('/')
    prefix = prefix.lower()
    if not config.dataset or (prefix in ('folder', 'image_folder') and not sep):
        path = find_split(config.data_dir, split, whole)
        return folder_source(path, config.class_map if class_map is None else class_map, config.input_key)
    if config.dataset == 'digits':
        return open_digits(split)
    if config.dataset == 'multimnist':
        if config.dataset_download and config.data_dir and not find_mnist(config.data_dir, 'train', 'images-idx3'):
            _open_torch(config, 'mnist', 'train')
        return open_multimnist(config, split, training)
    if sep and prefix == 'torch':
        return _open_torch(config, name.lower(), split)
    if sep and prefix in _PACKAGES:
        return _open_reader(config, prefix, split, training)
    raise UserError(f'unknown dataset {config.dataset!r}; {_nearest(config.dataset)}')


def folder_source(path: Path, class_map: Any = '', input_key: str | None = None) -> Source:
    """A folder or tar file of images; arguments and errors are those of `open_images`."""
    dataset = open_images(path, class_map, input_key)
    reader: Any = dataset.reader
    labels = np.asarray([target for _, target in reader.samples], dtype=np.int64)
    return Source(str(path), dataset, labels, _names(reader.class_to_idx), passed_over=str(reader.passed_over))


def _open_torch(config: TrainConfig | ValidateConfig, name: str, split: str) -> Source:
    label = f'torch/{name}'
    if name not in NAMES:
        raise UserError(f'unknown dataset {config.dataset!r}; {_nearest(label)}')
    if not config.data_dir:
        raise UserError(f'dataset {label}: no folder for its files; give one with --data-dir')
    split = torch_split(name, split)
    try:
        dataset, offset = open_torch(name, split, config.data_dir, config.dataset_download)
    except URLError as e:
        raise UserError(f'dataset {label}: cannot be downloaded ({_line(e)}); check the network, or put its files '
                        f'under {config.data_dir}') from e
    except (RuntimeError, ValueError, OSError, AssertionError) as e:
        if config.dataset_download:
            raise UserError(f'dataset {label}: neither found nor downloaded ({_line(e)}); check the network, or put '
                            f'its files under {config.data_dir}') from e
        raise UserError(f'dataset {label}: split {split} not found under {config.data_dir} ({_line(e)}); check '
                        f'--data-dir or add --dataset-download') from e
    except ImportError as e:
        raise UserError(f'dataset {label}: needs a package that is not installed ({_line(e)}); install it') from e
    labels, names = torch_labels(dataset), torch_class_names(dataset)
    labels = None if labels is None else labels - offset
    return Source(f'{label}, split {split}', dataset, labels, names[offset:] if names else None, offset)


def _open_reader(config: TrainConfig | ValidateConfig, prefix: str, split: str, training: bool) -> Source:
    label = f'{config.dataset}, split {split}'
    options: dict[str, Any] = dict(
        root=config.data_dir or None,
        split=split,
        class_map=config.class_map or None,
        is_training=training,
        download=config.dataset_download,
        batch_size=config.batch_size,
        num_samples=config.train_num_samples if training else config.val_num_samples,
        seed=config.seed,
        repeats=int(getattr(config, 'epoch_repeats', 0)) if training else 0,
        # '': as stored, for our own decoder; tfds makes arrays of one or three channels
        input_img_mode='' if prefix != 'tfds' else 'L' if config.input_img_mode == 'L' else 'RGB',
        input_key=config.input_key or None,
        target_key=config.target_key or None,
        trust_remote_code=config.dataset_trust_remote_code,
    )
    try:
        dataset = create_dataset(config.dataset, **options)
    except ImportError as e:
        raise UserError(f'dataset {config.dataset}: a package is not installed ({_line(e)}); '
                        f'pip install {_PACKAGES[prefix]}') from e
    except Exception as e:  # each library has its own; all mean that the split cannot be had
        raise UserError(f'dataset {label}: cannot be opened ({_line(e)}); check the name, the split, --data-dir and '
                        f'the network') from e
    names = _names(getattr(dataset.reader, 'class_to_idx', None) or {})
    if prefix in STREAMED:
        dataset.set_loader_cfg(num_workers=config.workers)
        if len(dataset) == 0:
            flag = '--train-num-samples' if training else '--val-num-samples'
            raise UserError(f'dataset {label}: its number of images is not known; give it with {flag}')
        return Source(label, dataset, None, names, streamed=True)
    return Source(label, dataset, np.asarray(list(dataset.reader.iter_targets()), dtype=np.int64), names)


def _names(index: dict[str, int]) -> list[str] | None:
    """Class names by index; a class map may leave indices out or give one to several names."""
    if not index:
        return None
    names = {int(i): str(name) for name, i in reversed(index.items())}
    return [names.get(i, str(i)) for i in range(max(names) + 1)]


def _nearest(name: str) -> str:
    known = ['digits', 'multimnist', *(f'torch/{n}' for n in NAMES)]
    full = name if '/' in name or name.startswith(('digit', 'multi')) else f'torch/{name}'
    close = [n for n in known if n.startswith(full)] or difflib.get_close_matches(full, known, n=1)
    if close:
        return f'did you mean {" or ".join(close[:6])}?'
    return ('use digits, multimnist, torch/NAME, hfds/NAME, hfids/NAME, wds/NAME or tfds/NAME, or --data-dir for a '
            'folder')


def _line(error: BaseException) -> str:
    return ' '.join(str(error).split())[:300] or type(error).__name__
