"""Folders in the format of COCO (https://cocodataset.org/#format-data).

The annotations of a split S are ``annotations/instances_S.json``, ``annotations/S.json`` or, as Roboflow exports them,
``S/_annotations.coco.json``; its images lie in ``S/``, ``images/S/``, ``images/`` or the folder itself. Labels are the
category ids in order, from 1 on without gaps.
"""
import json
from pathlib import Path
from typing import Any

from timm_spinal.errors import UserError

from .annotations import Box, Counts, DetectionSet, annotate, check_images, four_numbers, label_of

PLACES = ('annotations/instances_{}.json', 'annotations/{}.json', '{}/_annotations.coco.json')
IMAGES = ('{}', 'images/{}', 'images', '.')


def find_annotations(root: Path, split: str) -> Path | None:
    """The annotation file of a split, or None."""
    return next((path for place in PLACES if (path := root / place.format(split)).is_file()), None)


def read_coco(root: Path, split: str, class_names: list[str] | None = None) -> DetectionSet:
    """Read a split.

    Args:
        root: The folder.
        split: Name of a split that `find_annotations` finds.
        class_names: Of the training split, whose labels these get; None: this is the training split.

    Raises:
        UserError: A damaged file, an unknown category or image, images that are missing.
    """
    path = find_annotations(root, split)
    assert path is not None
    content = _read(path)
    names = {c['id']: str(c['name']) for c in sorted(content['categories'], key=lambda c: c['id'])}
    classes = list(names.values()) if class_names is None else class_names
    labels = {id: label_of(name, classes, f'{path}: category {id}') for id, name in names.items()}
    by_image: dict[Any, list[Box]] = {image['id']: [] for image in content['images']}
    if len(by_image) < len(content['images']):
        raise UserError(f'{path}: two images have the same id; mend it')
    for annotation in content['annotations']:
        where = f'{path}: annotation {annotation.get("id")}'
        if annotation['category_id'] not in labels:
            raise UserError(f'{where}: unknown category id {annotation["category_id"]!r}; the file knows '
                            f'{", ".join(map(str, list(names)[:8]))}{", ..." if len(names) > 8 else ""}')
        if annotation['image_id'] not in by_image:
            raise UserError(f'{where}: is of image id {annotation["image_id"]!r}, which the file does not have')
        x, y, width, height = four_numbers(annotation['bbox'], where)
        by_image[annotation['image_id']].append(Box(
            (x, y, x + width, y + height), labels[annotation['category_id']], bool(annotation.get('iscrowd', 0)),
            annotation.get('area')))
    counts, images = Counts(), []
    folder = _image_folder(root, split, content['images'])
    for image in content['images']:
        size = int(image['width']), int(image['height'])
        images.append(annotate(folder / image['file_name'], size, by_image[image['id']], counts))
    result = DetectionSet(f'{root} ({split})', images, classes, counts)
    check_images(result.name, images)
    return result


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        for key, needed in (('images', ('id', 'file_name', 'width', 'height')),
                            ('annotations', ('image_id', 'category_id', 'bbox')), ('categories', ('id', 'name'))):
            for row in content[key]:
                for name in needed:
                    row[name]
    except (OSError, ValueError) as e:
        raise UserError(f'{path}: cannot be read as JSON ({" ".join(str(e).split())}); mend it') from e
    except (KeyError, TypeError, IndexError) as e:
        raise UserError(f'{path}: is not in the format of COCO (an entry has no {e}); see '
                        'https://cocodataset.org/#format-data') from e
    return content


def _image_folder(root: Path, split: str, images: list[dict[str, Any]]) -> Path:
    """The first place that has the first image."""
    for place in IMAGES:
        folder = root / place.format(split)
        if images and (folder / images[0]['file_name']).is_file():
            return folder
    return root / split
