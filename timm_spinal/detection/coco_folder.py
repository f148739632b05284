"""Folders in the format of COCO (https://cocodataset.org/#format-data).

The annotations of a split S are ``annotations/instances_S.json``, ``annotations/S.json`` or, as Roboflow exports them,
``S/_annotations.coco.json``; its images lie in ``S/``, ``images/S/``, ``images/`` or the folder itself. Labels are the
category ids in order, from 1 on without gaps; categories of the same name are one class.
"""
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from timm_spinal.errors import UserError
from timm_spinal.training.image_files import image_suffixes

from .annotations import Box, Counts, DetectionSet, Entry, gather, label_of
from .image_files import FileFinder, image_size
from .values import Corners, around, class_name, flag, four_numbers, identity, number, read_json, short, side

PLACES = ('annotations/instances_{}.json', 'annotations/{}.json', '{}/_annotations.coco.json')
IMAGES = ('{}', 'images/{}', 'images', '.')

Id = int | float | str
Row = dict[str, Any]


def find_annotations(root: Path, split: str) -> Path | None:
    """The annotation file of a split, or None."""
    return next((path for place in PLACES if (path := root / place.format(split)).is_file()), None)


def read_coco(
        root: Path,
        split: str,
        class_names: list[str] | None = None,
        exif_transpose: bool = False,
) -> DetectionSet:
    """Read a split.

    Args:
        root: The folder.
        split: Name of a split that `find_annotations` finds.
        class_names: Of the training split, whose labels these get; None: this is the training split.
        exif_transpose: Images whose annotations say no size are turned upright, as `Decoder` does.

    Raises:
        UserError: A damaged file, an unknown category or image, images that are missing.
    """
    path = find_annotations(root, split)
    assert path is not None
    counts = Counts()
    content = _read(path)
    names = _categories(content['categories'])
    classes = list(dict.fromkeys(names.values())) if class_names is None else class_names
    images = _images(content['images'], counts)
    boxes: dict[Id, list[Box]] = {id: [] for id in images}
    for id, box in _boxes(path, content['annotations'], names, classes, images, counts):
        boxes[id].append(box)
    finder = FileFinder([root / place.format(split) for place in IMAGES], image_suffixes())
    entries = []
    for id, (where, row) in images.items():
        file = _file(where, row, finder, counts) or root / split / str(row['file_name'])
        width, height = side(row.get('width')), side(row.get('height'))
        size = (width, height) if width and height else image_size(file, exif_transpose)
        entries.append(Entry(file, where, size, boxes[id]))
    return gather(f'{root} ({split})', entries, classes, counts)


def _read(path: Path) -> dict[str, list[tuple[str, Row]]]:
    """The rows of the file's three lists, each with a text that names it."""
    content = read_json(path)
    wrong = 'is not in the format of COCO ({}); see https://cocodataset.org/#format-data'
    lists = dict(images=('id', 'file_name'), annotations=('image_id', 'category_id'), categories=('id', 'name'))
    if not isinstance(content, dict):
        raise UserError(f'{path}: {wrong.format("it is not an object with the keys " + ", ".join(lists))}')
    found = {}
    for key, needed in lists.items():
        if key not in content:
            raise UserError(f'{path}: {wrong.format(f"it has no {key!r}")}')
        rows = content[key] or []
        if not isinstance(rows, list):
            raise UserError(f'{path}: {wrong.format(f"{key!r} is {short(rows)}, not a list")}')
        found[key] = [(_where(path, key, place, row), row) for place, row in enumerate(rows)]
        for where, row in found[key]:
            if not isinstance(row, dict):
                raise UserError(f'{where} {wrong.format(f"it is {short(row)}, not an object")}')
            if missing := next((name for name in needed if name not in row), None):
                raise UserError(f'{where} {wrong.format(f"an entry has no {missing!r}")}')
    return found


def _where(path: Path, key: str, place: int, row: Any) -> str:
    item = dict(images='image', annotations='annotation', categories='category')[key]
    name = short(row['id']) if isinstance(row, dict) and 'id' in row else f'{place} of the list'
    return f'{path}: {item} {name}'


def _categories(rows: list[tuple[str, Row]]) -> dict[Id, str]:
    """Names by id, in the order of the ids: numbers, then texts."""
    names: dict[Id, str] = {}
    for where, row in rows:
        id, name = identity(row['id'], where), class_name(row['name'], where)
        if names.setdefault(id, name) != name:
            raise UserError(f'{where}: its id stands for both {names[id]!r} and {name!r}; give each category its own '
                            'id')
    return dict(sorted(names.items(), key=lambda item: (isinstance(item[0], str), item[0])))


def _images(rows: list[tuple[str, Row]], counts: Counts) -> dict[Id, tuple[str, Row]]:
    """The images by id."""
    images: dict[Id, tuple[str, Row]] = {}
    for where, row in rows:
        first = images.setdefault(identity(row['id'], where), (where, row))[1]
        if first is row:
            continue
        if first['file_name'] != row['file_name']:
            raise UserError(f'{where}: two images have the same id, {short(first["file_name"])} and '
                            f'{short(row["file_name"])}; give each its own id')
        counts.repeated += 1
    return images


def _boxes(
        path: Path,
        rows: list[tuple[str, Row]],
        names: dict[Id, str],
        classes: list[str],
        images: Collection[Id],
        counts: Counts,
) -> Iterator[tuple[Id, Box]]:
    """Each annotation's image and box."""
    labels: dict[Id, int] = {}
    seen: dict[Id, Row] = {}
    for where, row in rows:
        if row.get('id') is not None and row == seen.setdefault(identity(row['id'], where), row) is not row:
            counts.repeated += 1
            continue
        category = identity(row['category_id'], where, 'category id')
        image = identity(row['image_id'], where, 'image id')
        if category not in names:
            known = ', '.join(map(str, list(names)[:8])) + (', ...' if len(names) > 8 else '')
            raise UserError(f'{where}: unknown category id {short(row["category_id"])}; the file has '
                            f'{known or "none"}; add it to the categories or remove the annotation')
        if category not in labels:
            labels[category] = label_of(names[category], classes, f'{path}: category {category}')
        if image not in images:
            raise UserError(f'{where}: it is for image id {short(row["image_id"])}, which the file does not list; add '
                            'it to the images or remove the annotation')
        crowd = flag(row.get('iscrowd'), where, 'iscrowd')
        yield image, Box(_corners(row, where, counts), labels[category], where, crowd, _area(row.get('area'), where))


def _corners(row: Row, where: str, counts: Counts) -> Corners:
    """The corners of an annotation's box or, where it has none, of the box around its outline."""
    if row.get('bbox'):
        x, y, width, height = four_numbers(row['bbox'], where)
        return x, y, x + width, y + height
    outline = row.get('segmentation')
    if not outline:
        raise UserError(f'{where}: its box is {short(row.get("bbox"))}, not four numbers, and it has no outline '
                        'either; correct it')
    counts.outlined += 1
    if isinstance(outline, list):
        return around(outline, where)
    return _around_mask(outline, where)


def _around_mask(outline: Any, where: str) -> Corners:
    from pycocotools import mask
    try:
        height, width = (int(size) for size in outline['size'])
        runs = outline['counts']
        if isinstance(runs, list):
            outline = mask.frPyObjects(outline, height, width)
        elif not re.fullmatch('[0-o]*[0-O]', runs):  # pycocotools reads any other text as some mask
            raise ValueError(runs)
        x, y, width, height = mask.toBbox(outline).tolist()
    except Exception as e:  # pycocotools raises many kinds
        raise UserError(f'{where}: it has no box, and its outline is not a run-length mask; correct it') from e
    return x, y, x + width, y + height


def _area(value: Any, where: str) -> float | None:
    """Pixels of the object; None where that is not known, which some programs write as 0."""
    try:
        area = 0. if value is None else number(value)
        if area < 0:
            raise ValueError('negative')
    except ValueError as e:
        raise UserError(f'{where}: its area is {short(value)}, not a number of pixels; correct it') from e
    return area or None


def _file(where: str, row: Row, finder: FileFinder, counts: Counts) -> Path | None:
    """The file of an image, or None."""
    name = row['file_name']
    if isinstance(name, bool) or not isinstance(name, (str, int)) or not str(name).strip():
        raise UserError(f'{where}: its file_name is {short(name)}, not a file name; correct it')
    file = finder.exact(str(name))
    if file is None and (file := finder.find(str(name), where)):
        counts.renamed += 1
    return file
