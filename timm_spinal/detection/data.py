"""From a folder to loaders of images and boxes.

Order and flips depend on (seed, epoch, position) only, as those of every training here; see `training.dataset`.
"""
import random
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable

import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms.functional import to_tensor

from timm_spinal.errors import UserError
from timm_spinal.training.data import TrainData, create_loader, create_sampler
from timm_spinal.training.dataset import EvalSampler, UnreadableImage
from timm_spinal.training.image_files import shown
from timm_spinal.training.named_datasets import EVAL_NAMES, TRAIN_NAMES
from timm_spinal.training.pixels import UNREADABLE, Decoder, open_image

from .annotations import Annotated, DetectionSet
from .coco_folder import find_annotations, read_coco
from .options import DetectionConfig
from .voc_folder import find_list, is_voc, read_voc

FORMATS: dict[str, tuple[Callable[[Path, str], Path | None], Callable[..., DetectionSet]]] = {
    'coco': (find_annotations, read_coco),
    'voc': (find_list, read_voc),
}


class DetectionData(Dataset):
    """``data[index, seed]`` is an RGB image (3, H, W) in [0, 1] and its target, as torchvision's detectors take them.

    A target has ``boxes`` (N, 4), ``labels`` (N,) and ``image_id``, the place of the image; crowds are left out.

    Args:
        images: The images of a split.
        hflip: Probability of a horizontal flip, drawn from the seed; none where that is None.
        decode: Gives RGB images; `Decoder()` when None.

    Raises:
        UnreadableImage: An image cannot be decoded, or has not the size that its annotations say.
    """

    def __init__(self, images: list[Annotated], hflip: float = 0., decode: Decoder | None = None):
        self.images = images
        self.hflip = hflip
        self.decode = decode or Decoder()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, int | None]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        index, seed = item
        record = self.images[index]
        image = to_tensor(read_image(record, self.decode))
        single = ~record.crowd
        boxes = torch.from_numpy(record.boxes[single])
        if seed is not None and random.Random(seed).random() < self.hflip:
            image = image.flip(-1)
            boxes[:, [0, 2]] = record.width - boxes[:, [2, 0]]
        labels = torch.from_numpy(record.labels[single])
        return image, dict(boxes=boxes, labels=labels, image_id=torch.tensor(index))

    @staticmethod
    def collate(samples: list[tuple]) -> tuple[list, list]:
        """Lists of images and targets: images have different sizes."""
        images, targets = zip(*samples)
        return list(images), list(targets)


def read_image(record: Annotated, decode: Decoder) -> Image.Image:
    """An annotated image, turned as its boxes are.

    Raises:
        UnreadableImage: It cannot be decoded, or has not the size that its annotations say.
    """
    name = shown(str(record.file))
    try:
        image = decode(open_image(record.file), lambda: name, (record.width, record.height))
    except UNREADABLE as e:
        reason = ' '.join(str(e).split()) or type(e).__name__
        raise UnreadableImage(f'image {name} cannot be read ({reason}); repair or remove it') from e
    if image.size != (record.width, record.height):
        raise UnreadableImage(f'image {name} is {image.width}x{image.height}, but its annotations are for '
                              f'{record.width}x{record.height}; correct one of them')
    return image


def open_splits(config: DetectionConfig) -> dict[str, DetectionSet]:
    """The splits ``train``, ``eval`` and, when asked for, ``test`` of a folder.

    Raises:
        UserError: No such folder or split, or annotations that cannot be used; see `annotations`.
    """
    root = Path(config.data_dir)
    if not config.data_dir:
        raise UserError('no data: give a folder in the format of COCO or Pascal VOC with --data-dir')
    if not root.is_dir():
        raise UserError(f'data folder {root}: does not exist; check --data-dir')
    kind = config.data_format or ('voc' if is_voc(root) else 'coco')
    upright = config.exif_transpose
    train = _open(kind, root, config.train_split, None, upright)
    if not config.keep_empty:
        train = replace(train, images=[image for image in train.images if not image.crowd.all()])
    if not train.images:
        raise UserError(f'{train.name}: no image has a box; check the annotations')
    splits = dict(train=train, eval=_open(kind, root, config.val_split, train.class_names, upright))
    if config.test_split:
        splits['test'] = _open(kind, root, config.test_split, train.class_names, upright)
    for split in (config.val_split, config.test_split):
        name = 'eval' if split == config.val_split else 'test'
        if split and not any(len(image.boxes) > image.crowd.sum() for image in splits[name].images):
            raise UserError(f'{splits[name].name}: has no box to be found; check the annotations')
    return splits


def _open(kind: str, root: Path, split: str, class_names: list[str] | None, upright: bool) -> DetectionSet:
    find, read = FORMATS[kind]
    group = next((g for g in (TRAIN_NAMES, EVAL_NAMES) if split in g), ())
    for name in dict.fromkeys((split, *group)):
        if find(root, name) is not None:
            return read(root, name, class_names, upright)
    layout = dict(coco='annotations/instances_{0}.json, annotations/{0}.json or {0}/_annotations.coco.json',
                  voc='ImageSets/Main/{0}.txt')[kind].format(split)
    raise UserError(f'data folder {root}: no split {split!r} ({layout}); check --data-dir and the name of the split')


def create_data(
        config: DetectionConfig,
        splits: dict[str, DetectionSet],
        num_processes: int,
        accum: int = 1,
) -> TrainData:
    """Loaders of the splits.

    Raises:
        UserError: A batch size that leaves no full batch.
    """
    train, eval_set, test = splits['train'], splits['eval'], splits.get('test')
    decode = Decoder(exif_transpose=config.exif_transpose)
    train_data = DetectionData(train.images, config.hflip, decode)
    sampler = create_sampler(config, len(train_data), config.seed, num_processes, accum)
    return TrainData(
        train_loader=create_loader(config, train_data, sampler, config.batch_size, drop_last=True),
        eval_loader=_eval_loader(config, eval_set, decode),
        test_loader=_eval_loader(config, test, decode) if test else None,
        mixup=None,
        num_classes=len(train.class_names) + 1,
        class_names=train.class_names,
        data_config={},
        train_size=len(train.images),
        eval_size=len(eval_set.images),
        test_size=len(test.images) if test else 0,
    )


def _eval_loader(config: DetectionConfig, split: DetectionSet, decode: Decoder) -> Any:
    dataset = DetectionData(split.images, decode=decode)
    return create_loader(
        config, dataset, EvalSampler(len(dataset)), config.validation_batch_size or config.batch_size)
