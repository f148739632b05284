"""The data set ``digits``: 1,797 handwritten digits, 8 x 8 pixels, grey, 10 classes.

They are the test part of the UCI set "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998), which
scikit-learn carries inside its wheel: real data with no download.
"""
import numpy as np
from PIL import Image

from timm_spinal.errors import UserError

from .dataset import Source
from .sampling import stratified_split

_VALIDATION = 0.2
_SPLITS = ('train', 'validation')


class Digits:
    """All digits as PIL images of mode L; sklearn's grey levels 0 .. 16 become 0 .. 255."""

    def __init__(self):
        try:
            from sklearn.datasets import load_digits
        except ImportError as e:
            raise UserError("dataset digits: scikit-learn, which carries the images, is not installed; "
                            "pip install 'timm-spinal[digits]'") from e
        data = load_digits()
        self.images = np.round(data.images * (255 / 16)).astype(np.uint8)
        self.labels = data.target.astype(np.int64)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])


def open_digits(split: str) -> Source:
    """The 'train' (1,437 or so) or 'validation' (a fifth of each class) split, the same in every run."""
    if split not in _SPLITS:
        raise UserError(f'dataset digits: no split {split!r}; it has {" and ".join(_SPLITS)}')
    digits = Digits()
    whole = Source('digits', digits, digits.labels, [str(i) for i in range(10)])
    return whole.subset(stratified_split(digits.labels, _VALIDATION, seed=0)[_SPLITS.index(split)])
