"""Folders in the format of Pascal VOC: ``Annotations/*.xml``, ``JPEGImages/``, ``ImageSets/Main/SPLIT.txt``.

Coordinates count pixels from 1 and the last pixel is inside, so a box is [xmin - 1, xmax] x [ymin - 1, ymax] here.
Difficult objects are treated as COCO's crowds. Classes are the names that the training split uses, in alphabetical
order. An image is found by the name of its annotations, whatever its suffix, and else by their ``<filename>``.
"""
import re
from pathlib import Path
from xml.etree.ElementTree import Element

from timm_spinal.errors import UserError
from timm_spinal.training.image_files import image_suffixes

from .annotations import Box, Counts, DetectionSet, Entry, gather, label_of
from .image_files import FileFinder, image_size
from .values import Corners, around, class_name, flag, four_numbers, read_lines, read_xml, side


def is_voc(root: Path) -> bool:
    """Whether a folder looks like Pascal VOC."""
    return (root / 'Annotations').is_dir() and (root / 'ImageSets' / 'Main').is_dir()


def find_list(root: Path, split: str) -> Path | None:
    """The list of a split's images, or None."""
    path = root / 'ImageSets' / 'Main' / f'{split}.txt'
    return path if path.is_file() else None


def read_voc(
        root: Path,
        split: str,
        class_names: list[str] | None = None,
        exif_transpose: bool = False,
) -> DetectionSet:
    """Read a split.

    Args:
        root: The folder, ``VOCdevkit/VOC2012`` of the original.
        split: Name of a split that `find_list` finds.
        class_names: Of the training split, whose labels these get; None: this is the training split.
        exif_transpose: Images whose annotations say no size are turned upright, as `Decoder` does.

    Raises:
        UserError: A damaged file, an unknown class, images that are missing.
    """
    path = find_list(root, split)
    assert path is not None
    folder, pictures = root / 'Annotations', root / 'JPEGImages'
    xmls, images = FileFinder([folder], {'.xml'}), FileFinder([pictures], image_suffixes())
    files = [_annotations(xmls, line, str(path)) or folder / f'{line}.xml' for line in read_lines(path)]
    trees = {file: _read(file) for file in files}
    counts = Counts(repeated=len(files) - len(trees))
    classes = class_names
    if classes is None:
        classes = sorted({_name(o, str(file)) for file, tree in trees.items() for o in tree.iter('object')})
    entries = []
    for file, tree in trees.items():
        name = str(file.relative_to(folder).with_suffix(''))
        image = _image(images, name, tree, str(file)) or pictures / f'{name}.jpg'
        boxes = [_box(o, classes, f'{file}: object {place}', str(file), counts)
                 for place, o in enumerate(tree.iter('object'), 1)]
        width, height = (side(tree.findtext(f'size/{tag}')) for tag in ('width', 'height'))
        size = (width, height) if width and height else image_size(image, exif_transpose)
        entries.append(Entry(image, str(file), size, boxes))
    return gather(f'{root} ({split})', entries, classes, counts, first_pixel=1)


def _annotations(xmls: FileFinder, line: str, where: str) -> Path | None:
    """The file of a line in a list: a name with or without suffix; lists of one class have 1, 0 or -1 after it."""
    names = line, re.sub(r'\s+-?[01]$', '', line)
    return next((file for name in names if (file := xmls.by_stem(name, where))), None)


def _read(file: Path) -> Element:
    root = read_xml(file)
    if root.tag != 'annotation':
        raise UserError(f'{file}: is not in the format of Pascal VOC (it is <{root.tag}>, not <annotation>); see '
                        'http://host.robots.ox.ac.uk/pascal/VOC')
    return root


def _image(images: FileFinder, name: str, tree: Element, where: str) -> Path | None:
    named = tree.findtext('filename', '').strip()
    return images.by_stem(name, where, prefer=named) or images.find(named, where)


def _name(element: Element, where: str) -> str:
    text = element.findtext('name')
    if text is None:
        raise UserError(f'{where}: an object has no <name>; add it')
    return class_name(text, where)


def _box(element: Element, classes: list[str], where: str, file: str, counts: Counts) -> Box:
    corners = _corners(element, where, counts)
    label = label_of(_name(element, file), classes, file)
    return Box(corners, label, where, flag(element.findtext('difficult'), where, 'difficult'))


def _corners(element: Element, where: str, counts: Counts) -> Corners:
    """The corners of an object's box or, where it has none, of the box around its polygon."""
    polygon = element.find('polygon')
    if element.find('bndbox') is not None or polygon is None:
        return four_numbers([element.findtext(f'bndbox/{tag}') for tag in ('xmin', 'ymin', 'xmax', 'ymax')], where)
    counts.outlined += 1
    # <x1>, <y1>, <x2>, ... or, by LabelMe, <pt><x>, <y></pt>
    xs, ys = ([e.text or '' for e in polygon.iter() if re.fullmatch(rf'{axis}\d*', e.tag)] for axis in 'xy')
    return around([*zip(xs, ys)] if len(xs) == len(ys) else [], where)
