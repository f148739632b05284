"""Which pictures are meant, and their loader."""
import glob
import os
import stat
import sys
from typing import Any, BinaryIO, Sequence

import numpy as np
from timm.data import ImageDataset
from timm.data.readers.reader import Reader
from torch.utils.data import DataLoader

from timm_spinal.errors import UserError
from timm_spinal.training.config import LoaderOptions
from timm_spinal.training.data import create_loader
from timm_spinal.training.dataset import EvalSampler, ImageData, Split
from timm_spinal.training.image_files import PassedOver, image_suffixes, natural_key, register_heif, shown
from timm_spinal.training.image_folder import scan_folder

from .opened import Opened

STDIN = '-'


def find_pictures(arguments: Sequence[str]) -> tuple[list[str], str]:
    """Paths of the pictures that arguments mean, in their order, and what was passed over in folders, as text.

    Args:
        arguments: Files; folders, which are searched with all folders below them, in timm's order of names; wildcards,
            as the shell has them and with ``**`` for folders within folders; and ``-``, which stands for the paths on
            standard input, one a line or separated by null bytes.

    Raises:
        UserError: One that means no picture.
    """
    paths: list[str] = []
    passed_over = PassedOver()
    for argument in arguments:
        if argument == STDIN:
            found = _from_stdin()
        elif os.path.isdir(argument):
            found = _in_folder(argument, passed_over)
        elif os.path.exists(argument):
            if not os.path.isfile(argument):
                raise UserError(f'image {shown(argument)}: is neither a file nor a folder')
            found = [argument]
        else:
            matches = glob.glob(argument, recursive=True) if glob.has_magic(argument) else []
            matches = sorted(matches, key=lambda path: (natural_key(path), path))
            found = [path for match in matches for path in (
                _in_folder(match, passed_over) if os.path.isdir(match) else [match])]
            if not matches:
                raise UserError(f'image {shown(argument)}: there is no such file or folder')
        if not found:
            account = f'; skipped: {passed_over}' if passed_over.kinds else ''
            where = 'standard input' if argument == STDIN else shown(argument)
            raise UserError(f'{where}: holds no image{account}')
        paths += found
    return paths, str(passed_over)


def _from_stdin() -> list[str]:
    text = sys.stdin.buffer.read() if hasattr(sys.stdin, 'buffer') else sys.stdin.read().encode()
    separator = b'\0' if b'\0' in text else b'\n'
    return [os.fsdecode(line) for line in (part.rstrip(b'\r') for part in text.split(separator)) if line]


def _in_folder(folder: str, passed_over: PassedOver) -> list[str]:
    paths, _ = scan_folder(folder, image_suffixes(), passed_over)
    return [os.path.join(folder, path) for path in sorted(paths, key=lambda path: (natural_key(path), path))]


class _Paths(Reader):
    """timm's reader of a list of files; the class of an image is its place in the list."""

    def __init__(self, paths: Sequence[str]):
        super().__init__()
        # one array, not a list: what workers count references of, they copy
        self.text = np.frombuffer('\0'.join(paths).encode(errors='surrogateescape'), dtype=np.uint8)
        self.ends = np.append(np.flatnonzero(self.text == 0), len(self.text))

    def __len__(self) -> int:
        return len(self.ends)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        register_heif()  # in a loader worker that does not inherit what this process has imported

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        path = self._filename(index)
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for whoever writes into it
            raise OSError('is no file')
        return open(path, 'rb'), index

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        start = self.ends[index - 1] + 1 if index else 0
        return os.fsdecode(self.text[start:self.ends[index]].tobytes())


class _OfAnySize(ImageData):
    """Images for a detector, which takes a list of them."""

    def collate(self, samples: list[tuple]) -> tuple[Any, ...]:
        images, targets = zip(*samples)
        return list(images), list(targets)


def picture_loader(opened: Opened, paths: Sequence[str], options: LoaderOptions) -> DataLoader:
    """Batches of images, and the place of each in ``paths``; -1 marks one that cannot be read."""
    split = Split('the images', ImageDataset('', _Paths(paths), input_img_mode=''))  # type: ignore[arg-type]
    data = (_OfAnySize if opened.detector else ImageData)(split, opened.transform, opened.decode, 'mark')
    return create_loader(options, data, EvalSampler(len(paths)), options.validation_batch_size or options.batch_size)
