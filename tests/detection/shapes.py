"""A small detection data set that the tests draw: coloured rectangles and discs on a background, in both formats."""
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ('disc', 'square')


def draw(seed: int, width: int = 96, height: int = 80) -> tuple[Image.Image, list[tuple[str, list[int]]]]:
    """An image with one to three shapes and their classes and boxes, x1, y1, x2, y2."""
    rng = np.random.default_rng(seed)
    image = Image.new('RGB', (width, height), tuple(rng.integers(0, 60, 3).tolist()))
    shapes: list[tuple[str, list[int]]] = []
    for _ in range(rng.integers(1, 4)):
        side = int(rng.integers(18, 36))
        x, y = int(rng.integers(0, width - side)), int(rng.integers(0, height - side))
        if any(x < b[2] and b[0] < x + side and y < b[3] and b[1] < y + side for _, b in shapes):
            continue
        name = CLASSES[int(rng.integers(2))]
        pen = ImageDraw.Draw(image)
        corners = [x, y, x + side - 1, y + side - 1]  # the last pixel is inside
        if name == 'disc':
            pen.ellipse(corners, fill=(240, 90, 60))
        else:
            pen.rectangle(corners, fill=(60, 120, 240))
        shapes.append((name, [x, y, x + side, y + side]))
    return image, shapes


def write_coco(root: Path, **splits: int) -> Path:
    """A folder in the format of COCO with so many images in each split; category ids have gaps."""
    ids = {'disc': 3, 'square': 7}
    for number, (split, count) in enumerate(splits.items()):
        (root / split).mkdir(parents=True)
        content: dict = dict(images=[], annotations=[], categories=[dict(id=i, name=n) for n, i in ids.items()])
        for i in range(count):
            image, shapes = draw(1000 * number + i)
            image.save(root / split / f'{i}.png')
            content['images'].append(dict(id=10 + i, file_name=f'{i}.png', width=image.width, height=image.height))
            for name, (x1, y1, x2, y2) in shapes:
                content['annotations'].append(dict(
                    id=len(content['annotations']) + 1, image_id=10 + i, category_id=ids[name],
                    bbox=[x1, y1, x2 - x1, y2 - y1], area=(x2 - x1) * (y2 - y1), iscrowd=0))
        write_json(root, split, content)
    return root


def json_path(root: Path, split: str) -> Path:
    return root / 'annotations' / f'instances_{split}.json'


def write_json(root: Path, split: str, content: dict) -> None:
    json_path(root, split).parent.mkdir(exist_ok=True)
    json_path(root, split).write_text(json.dumps(content))


def read_json(root: Path, split: str) -> dict:
    return json.loads(json_path(root, split).read_text())


OBJECT = ('<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax>'
          '<ymax>{}</ymax></bndbox></object>')


def voc_xml(width: int, height: int, objects: list[tuple]) -> str:
    """Annotations of one image; objects are name, difficult, xmin, ymin, xmax, ymax as the format counts them."""
    size = f'<size><width>{width}</width><height>{height}</height><depth>3</depth></size>'
    return f'<annotation>{size}{"".join(OBJECT.format(*o) for o in objects)}</annotation>'


def write_voc(root: Path, **splits: int) -> Path:
    """The images of `write_coco` in the format of Pascal VOC."""
    for folder in ('Annotations', 'JPEGImages', 'ImageSets/Main'):
        (root / folder).mkdir(parents=True)
    for number, (split, count) in enumerate(splits.items()):
        names = [f'{split}_{i}' for i in range(count)]
        (root / 'ImageSets' / 'Main' / f'{split}.txt').write_text('\n'.join(names) + '\n')
        for i, name in enumerate(names):
            image, shapes = draw(1000 * number + i)
            image.save(root / 'JPEGImages' / f'{name}.png')
            objects = [(n, 0, x1 + 1, y1 + 1, x2, y2) for n, (x1, y1, x2, y2) in shapes]
            (root / 'Annotations' / f'{name}.xml').write_text(voc_xml(image.width, image.height, objects))
    return root
