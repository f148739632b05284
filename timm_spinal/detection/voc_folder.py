"""Folders in the format of Pascal VOC: ``Annotations/*.xml``, ``JPEGImages/``, ``ImageSets/Main/SPLIT.txt``.

Coordinates count pixels from 1 and the last pixel is inside, so a box is [xmin - 1, xmax] x [ymin - 1, ymax] here.
Difficult objects are treated as COCO's crowds. Classes are the names that the training split uses, in alphabetical
order.
"""
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image

from timm_spinal.errors import UserError

from .annotations import Box, Counts, DetectionSet, annotate, check_images, four_numbers, label_of

SUFFIXES = ('.jpg', '.jpeg', '.png', '.JPG')


def is_voc(root: Path) -> bool:
    """Whether a folder looks like Pascal VOC."""
    return (root / 'Annotations').is_dir() and (root / 'ImageSets' / 'Main').is_dir()


def find_list(root: Path, split: str) -> Path | None:
    """The list of a split's images, or None."""
    path = root / 'ImageSets' / 'Main' / f'{split}.txt'
    return path if path.is_file() else None


def read_voc(root: Path, split: str, class_names: list[str] | None = None) -> DetectionSet:
    """Read a split.

    Args:
        root: The folder, ``VOCdevkit/VOC2012`` of the original.
        split: Name of a split that `find_list` finds.
        class_names: Of the training split, whose labels these get; None: this is the training split.

    Raises:
        UserError: A damaged file, an unknown class, images that are missing.
    """
    path = find_list(root, split)
    assert path is not None
    names = [line.split()[0] for line in path.read_text(encoding='utf-8').splitlines() if line.strip()]
    trees = {name: _read(root / 'Annotations' / f'{name}.xml') for name in names}
    classes = class_names
    if classes is None:
        classes = sorted({_text(o, 'name', n) for n, tree in trees.items() for o in tree.iter('object')})
    counts, images = Counts(), []
    for name, tree in trees.items():
        file = _image_file(root, name)
        boxes = [_box(o, classes, f'{root / "Annotations" / name}.xml') for o in tree.iter('object')]
        images.append(annotate(file, _size(tree, file), boxes, counts))
    result = DetectionSet(f'{root} ({split})', images, classes, counts)
    check_images(result.name, images)
    return result


def _read(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except OSError as e:
        raise UserError(f'{path}: {e.strerror}; every image of the split needs its annotations') from e
    except ElementTree.ParseError as e:
        raise UserError(f'{path}: cannot be read as XML ({e}); mend it') from e


def _text(element: ElementTree.Element, tag: str, where: str) -> str:
    text = element.findtext(tag)
    if text is None:
        raise UserError(f'{where}: an object has no <{tag}>; mend it')
    return text.strip()


def _box(element: ElementTree.Element, classes: list[str], where: str) -> Box:
    corners = [element.findtext(f'bndbox/{tag}') for tag in ('xmin', 'ymin', 'xmax', 'ymax')]
    x1, y1, x2, y2 = four_numbers(corners, where)
    label = label_of(_text(element, 'name', where), classes, where)
    return Box((x1 - 1, y1 - 1, x2, y2), label, element.findtext('difficult', '0').strip() == '1')


def _size(tree: ElementTree.Element, file: Path) -> tuple[int, int]:
    """Width and height as annotated, or as the image has them where they are not."""
    try:
        width, height = (int(tree.findtext(f'size/{tag}', '0')) for tag in ('width', 'height'))
    except ValueError:
        width = height = 0
    if width > 0 and height > 0 or not file.is_file():
        return width, height
    try:
        with Image.open(file) as image:
            return image.size
    except OSError as e:
        raise UserError(f'image {file} cannot be read ({" ".join(str(e).split())}); mend or remove it') from e


def _image_file(root: Path, name: str) -> Path:
    files = [root / 'JPEGImages' / f'{name}{suffix}' for suffix in SUFFIXES]
    return next((file for file in files if file.is_file()), files[0])
