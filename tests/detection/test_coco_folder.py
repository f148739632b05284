"""Files of COCO's format as programs and people write them: read for what they mean, or named in one line."""
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask

from timm_spinal.cli import main
from timm_spinal.detection.annotations import Counts
from timm_spinal.detection.coco_folder import read_coco
from timm_spinal.detection.data import open_splits
from timm_spinal.detection.options import DetectionConfig
from timm_spinal.errors import UserError

from .shapes import draw, json_path, read_json, write_coco, write_json

SHAPES = [draw(i)[1] for i in range(3)]
TRUTH = [[[float(v) for v in box] for _, box in shapes] for shapes in SHAPES]
LABELS = [[1 if name == 'disc' else 2 for name, _ in shapes] for shapes in SHAPES]
BOXES = sum(len(boxes) for boxes in TRUTH)


def rows(root, key, change):
    """Change every row of a list, or put others in the place of a row."""
    content = read_json(root, 'train')
    changed = [change(row) for row in content[key]]
    content[key] = [row for new in changed for row in (new if isinstance(new, list) else [new])]
    write_json(root, 'train', content)


def each(key, **changes):
    """Change keys of each row; a function gets the old value."""
    return lambda root: rows(root, key, lambda row: {
        **row, **{name: new(row.get(name)) if callable(new) else new for name, new in changes.items()}})


def without(key, *names):
    return lambda root: rows(root, key, lambda row: {name: value for name, value in row.items() if name not in names})


def twice(key, **changes):
    """Each row a second time, with changes."""
    return lambda root: rows(root, key, lambda row: [row, {**row, **changes}])


def text(value):
    return str(value)


def rewrite(encoding):
    return lambda root: json_path(root, 'train').write_text(
        json.dumps(read_json(root, 'train'), ensure_ascii=False), encoding=encoding)


def move(name):
    """The images lie elsewhere, or are named otherwise, than the annotations say."""
    def change(root):
        for i in range(3):
            new = root / name.format(i)
            new.parent.mkdir(parents=True, exist_ok=True)
            (root / 'train' / f'{i}.png').rename(new)
    return change


def as_polygon(row):
    x, y, w, h = row['bbox']
    return {**row, 'bbox': None, 'segmentation': [[x, y, x + w, y, x + w, y + h], [x, y + h, x + 1, y + h]]}


def as_mask(compressed):
    def change(row):
        x, y, w, h = row['bbox']
        pixels = np.zeros((80, 96), dtype=np.uint8, order='F')
        pixels[y:y + h, x:x + w] = 1
        runs = mask.encode(pixels)
        if compressed:
            counts = runs['counts'].decode()
        else:
            flat = pixels.ravel(order='F')
            edges = np.flatnonzero(np.diff(flat, prepend=0, append=flat[-1] ^ 1))
            counts = np.diff(edges, prepend=0).tolist()
        return {key: value for key, value in {**row, 'segmentation': dict(size=[80, 96], counts=counts)}.items()
                if key != 'bbox'}
    return lambda root: rows(root, 'annotations', change)


def fractions(row):
    x, y, w, h = row['bbox']
    return {**row, 'bbox': [x / 96, y / 80, w / 96, h / 80], 'area': w * h / 96 / 80}


RIGHT = {
    'numbers as text': each('annotations', bbox=lambda box: [f' {v}.0' for v in box], area=text, iscrowd=text),
    'sizes as text': each('images', width=text, height=lambda v: f'{v}.0'),
    'box as text': each('annotations', bbox=text),
    'box as text with blanks': each('annotations', bbox=lambda box: ' '.join(map(str, box))),
    'box in a list': each('annotations', bbox=lambda box: [box]),
    'nulls': each('annotations', iscrowd=None, area=None, segmentation=None),
    'no area, no iscrowd, no id': without('annotations', 'area', 'iscrowd', 'id'),
    'area of 0': each('annotations', area=0),
    'no size': without('images', 'width', 'height'),
    'size of null': each('images', width=None, height=None),
    'size of 0': each('images', width=0, height=0),
    'size of NaN': each('images', width=float('nan')),
    'ids as text in annotations': each('annotations', image_id=text, category_id=text),
    'ids as text in lists': lambda root: (each('images', id=text)(root), each('categories', id=text)(root)),
    'float ids': each('annotations', image_id=float, category_id=lambda i: f'{i}.0', id=float),
    'huge ids': lambda root: (each('images', id=lambda i: 10 ** 40 + i)(root),
                              each('annotations', image_id=lambda i: str(10 ** 40 + i))(root)),
    'ids that are names': lambda root: (each('images', id=lambda i: f'im {i}')(root),
                                        each('annotations', image_id=lambda i: f'im {i}')(root)),
    'annotations of one id': each('annotations', id=1, iscrowd=0),
    'names with blanks': each('categories', name=lambda name: f'  {name}\n'),
    'categories listed twice': twice('categories'),
    'a category of two ids': lambda root: (
        rows(root, 'categories', lambda row: [row, {**row, 'id': row['id'] + 1}]),
        rows(root, 'annotations', lambda row: {**row, 'category_id': row['category_id'] + row['id'] % 2})),
    'byte order mark': rewrite('utf-8-sig'),
    'utf-16': rewrite('utf-16'),
    'utf-32': rewrite('utf-32'),
    'folders in names': lambda root: (move('images/train/a/b c/{}.png')(root),
                                      each('images', file_name=lambda name: f'a/b c/{name}')(root)),
}


@pytest.fixture
def root(tmp_path):
    return write_coco(tmp_path, train=3, val=2)


def assert_truth(split, **counts):
    assert split.class_names == ['disc', 'square']
    assert split.counts == Counts(images=3, boxes=BOXES, **counts)
    for image, boxes, labels in zip(split.images, TRUTH, LABELS):
        assert image.boxes == pytest.approx(np.array(boxes), abs=1e-4) and image.labels.tolist() == labels
        assert image.area.tolist() == pytest.approx([(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in boxes])
        assert (image.width, image.height) == (96, 80) and not image.crowd.any()
        assert Image.open(image.file).size == (96, 80)


@pytest.mark.parametrize('kind', RIGHT)
def test_read_rightly(root, kind):
    RIGHT[kind](root)
    assert_truth(read_coco(root, 'train'))


RENAMED = {
    'backslash': (move('images/train/a/{}.png'), lambda name: f'a\\{name}'),
    'path of another machine': (move('images/{}.png'), lambda name: f'C:\\data\\set 1\\{name}'),
    'absolute path': (move('images/{}.png'), lambda name: f'/no/such/place/{name}'),
    'path from the parent': (move('train/{}.png'), lambda name: f'../upload/{name}'),
    'case': (move('train/{}.PNG'), None),
    'case of both': (move('train/Image {}.PnG'), lambda name: f'image {name}'),
    'other suffix': (move('train/{}.png'), lambda name: name.replace('.png', '.jpg')),
    'no suffix': (move('train/im.{}.png'), lambda name: f'im.{name[0]}'),
    'blanks around it': (move('train/{}.png'), lambda name: f' {name} '),
    'form of Unicode': (move('train/e\u0301{}.png'), lambda name: f'\u00e9{name}'),
    'a number': (move('train/{}.png'), lambda name: int(name[0])),
}


@pytest.mark.parametrize('kind', RENAMED)
def test_images_with_another_name_are_found_and_counted(root, kind):
    moved, named = RENAMED[kind]
    moved(root)
    if named:
        each('images', file_name=named)(root)
    split = read_coco(root, 'train')
    assert_truth(split, renamed=3)
    assert [Image.open(image.file).tobytes() for image in split.images] == [draw(i)[0].tobytes() for i in range(3)]
    assert split.describe().endswith('3 images in another folder or with another suffix')


@pytest.mark.parametrize('suffix', ['.bmp', '.JPEG', '.Tiff', '.webp', '.ppm'])
def test_any_suffix(root, suffix):
    for i in range(3):
        draw(i)[0].save(root / 'train' / f'{i}{suffix}')
        (root / 'train' / f'{i}.png').unlink()
    each('images', file_name=lambda name: name.replace('.png', suffix))(root)
    assert_truth(read_coco(root, 'train'))


def test_boxes_in_fractions_of_the_image(root):
    rows(root, 'annotations', fractions)
    split = read_coco(root, 'train')
    assert_truth(split, scaled=BOXES)
    assert split.describe().endswith(f'{BOXES} boxes given in fractions of the image')


def test_a_pixel_among_many_boxes_is_no_fraction(root):
    """A box of less than a pixel in a large data set is left out like any other that is empty."""
    box = read_json(root, 'train')['annotations'][0]
    many = [{**box, 'id': 10 + i} for i in range(2000)] + [{**box, 'id': 1, 'bbox': [0.1, 0.2, 0.5, 0.5]}]
    write_json(root, 'train', dict(read_json(root, 'train'), annotations=many))
    assert read_coco(root, 'train').counts == Counts(images=3, boxes=2000, empty=1, without=2)


@pytest.mark.parametrize('change', [
    lambda root: rows(root, 'annotations', as_polygon), as_mask(True), as_mask(False),
    lambda root: rows(root, 'annotations', lambda row: {**row, 'bbox': [], 'segmentation': [
        [row['bbox'][0], row['bbox'][1]], [row['bbox'][0] + row['bbox'][2], row['bbox'][1] + row['bbox'][3]]]}),
], ids=['polygons', 'compressed mask', 'mask', 'points'])
def test_outlines_without_boxes(root, change):
    change(root)
    assert_truth(read_coco(root, 'train'), outlined=BOXES)


@pytest.mark.parametrize('key, count', [('images', 3), ('annotations', BOXES)])
def test_rows_listed_twice_are_read_once(root, key, count):
    twice(key)(root)
    split = read_coco(root, 'train')
    assert_truth(split, repeated=count)
    assert split.describe().endswith(f'{count} entries listed twice')


def test_crowds_as_text(root):
    each('annotations', iscrowd='0')(root)
    assert read_coco(root, 'train').counts.crowd == 0
    each('annotations', iscrowd=' 1 ')(root)
    split = read_coco(root, 'train')
    assert split.counts.crowd == BOXES and split.counts.without == 3
    each('annotations', iscrowd=True)(root)
    assert read_coco(root, 'train').counts.crowd == BOXES


def test_labels_and_crowds_stay_with_their_boxes(root):
    """Whatever is left out or cut in front of them."""
    boxes = [([10, 10, -3, 5], 3, 0, 1), ([-4, 5, 10, 10], 7, 1, 2), ([200, 5, 10, 10], 3, 1, 3),
             ([5, 6, 0.5, 9], 3, 0, 4), ([20, 30, 10, 8.5], 3, 0, 5)]
    content = read_json(root, 'train')
    content['annotations'] = [dict(id=i, image_id=10, bbox=box, category_id=category, iscrowd=crowd, area=area)
                              for i, (box, category, crowd, area) in enumerate(boxes)]
    write_json(root, 'train', content)
    split = read_coco(root, 'train')
    image = split.images[0]
    assert image.boxes.tolist() == [[0, 5, 6, 15], [20, 30, 30, 38.5]] and image.boxes.dtype == np.float32
    assert image.labels.tolist() == [2, 1] and image.crowd.tolist() == [True, False] and image.area.tolist() == [2, 5]
    assert split.counts == Counts(images=3, boxes=2, crowd=1, clipped=1, empty=3, without=2)


def lists(**changes):
    return lambda root: write_json(root, 'train', dict(read_json(root, 'train'), **changes))


NAMED = {
    'box is null': (
        each('annotations', bbox=None), 'annotation 1: its box is null, not four numbers, and it has no outline'),
    'box of words': (each('annotations', bbox='all of it'), 'annotation 1: its box is "all of it", not four numbers'),
    'two points': (each('annotations', bbox=[[1, 2], [3, 4]]), 'its box is [[1, 2], [3, 4]], not four numbers'),
    'an object': (each('annotations', bbox=dict(x=1)), 'its box is {"x": 1}, not four numbers'),
    'comma for point': (each('annotations', bbox=['1,5', 2, 3, 4]), 'not four numbers'),
    'true': (each('annotations', bbox=[True, 1, 2, 3]), 'not four numbers'),
    'NaN as text': (each('annotations', bbox=['nan', 1, 2, 3]), 'annotation 1: its box ["nan", 1, 2, 3] is not finite'),
    'infinity': (each('annotations', bbox=[1, 1, float('inf'), 3]), 'is not finite; correct it'),
    'too large': (each('annotations', bbox=[1, 1, 10 ** 400, 3]), 'is not finite; correct it'),
    'area of NaN': (
        each('annotations', area=float('nan')), 'annotation 1: its area is NaN, not a number of pixels; correct it'),
    'area below 0': (each('annotations', area=-2), 'annotation 1: its area is -2'),
    'iscrowd of words': (each('annotations', iscrowd='maybe'), 'its iscrowd is "maybe", neither 0 nor 1'),
    'damaged mask': (
        each('annotations', bbox=None, segmentation=dict(size=[80, 96], counts='é')), 'not a run-length mask'),
    'damaged polygon': (each('annotations', bbox=None, segmentation=[[1, 2, 'x', 4]]), 'not a finite number'),
    'odd polygon': (each('annotations', bbox=None, segmentation=[[1, 2, 3, 4, 5]]), 'its outline has 5 numbers'),
    'some in fractions': (
        lambda root: rows(root, 'annotations', lambda row: fractions(row) if row['id'] == 2 else row),
        f'annotation 2: its box seems to be in fractions of the image, from 0 to 1 (1 of {BOXES} boxes), but'),
    'image id of null': (
        each('annotations', image_id=None), 'annotation 1: its image id is null, neither a number nor'),
    'image id in a list': (each('annotations', image_id=[10]), 'its image id is [10], neither'),
    'image id of NaN': (each('annotations', image_id=float('nan')), 'its image id is NaN, neither'),
    'image not listed': (
        each('annotations', image_id='11.5'), 'annotation 1: it is for image id "11.5", which the file does not'),
    'category not listed': (
        each('annotations', category_id='x'), 'annotation 1: unknown category id "x"; the file has 3, 7'),
    'no category': (each('categories', name=' '), 'category 3: its name is " ", but a class needs a name; correct it'),
    'category null': (each('categories', name=None), 'category 3: its name is null'),
    'category id null': (each('categories', id=None), 'category null: its id is null'),
    'one id, two names': (
        each('categories', id='3'), "category \"3\": its id stands for both 'disc' and 'square'; give each"),
    'ids of two kinds for two names': (
        lambda root: rows(root, 'categories', lambda row: [row, dict(id=str(row['id']), name='x' + row['name'])]),
        "category \"3\": its id stands for both 'disc' and 'xdisc'"),
    'one id, two images': (
        each('images', id=4), 'image 4: two images have the same id, "0.png" and "1.png"; give each'),
    'ids of two kinds for two images': (
        lambda root: rows(root, 'images', lambda row: [row, {**row, 'id': str(row['id']), 'file_name': 'x.png'}]),
        'image "10": two images have the same id, "0.png" and "x.png"'),
    'two ids, one image': (twice('images', id=77, file_name='2.png'), 'is also that of'),
    'no file name': (each('images', file_name=None), 'image 10: its file_name is null, not a file name; correct it'),
    'empty file name': (each('images', file_name=' '), 'image 10: its file_name is " ", not a file name; correct it'),
    'endless file name': (each('images', file_name='x' * 5000), '3 of 3 images are missing'),
    'two files': (
        lambda root: (draw(0)[0].save(root / 'train' / '0.bmp'), each('images', file_name=lambda name: name[0])(root)),
        'image 10: 0.bmp and 0.png in'),
    'image is no object': (
        lambda root: rows(root, 'images', lambda row: ['a.png']), 'image 0 of the list is not in the format'),
    'images are null': (lists(images=None), 'it is for image id 10'),
    'images are text': (lists(images='x'), "'images' is \"x\", no"),
    'no annotations': (
        lambda root: write_json(root, 'train', dict(images=[], categories=[])), "it has no 'annotations'"),
    'annotations are null': (
        lists(annotations=None), 'no image has a box'),
    'other encoding': (
        lambda root: json_path(root, 'train').write_bytes('{"images": "ä"}'.encode('latin-1')), 'save it as UTF-8'),
    'nested': (lambda root: json_path(root, 'train').write_text('[' * 100000), 'cannot be read as JSON'),
    'unknown size of no image': (
        lambda root: (without('images', 'width')(root), (root / 'train' / '1.png').write_bytes(b'x')),
        '1.png cannot be read (cannot identify image file'),
}


@pytest.mark.parametrize('kind', NAMED)
def test_named_in_one_line(root, kind):
    damage, message = NAMED[kind]
    damage(root)
    with pytest.raises(UserError) as error:
        open_splits(DetectionConfig(data_dir=str(root)))
    assert message in str(error.value) and '\n' not in str(error.value) and str(root) in str(error.value)


def test_the_command_writes_nothing(root, tmp_path, capsys):
    each('annotations', bbox=None)(root)
    assert main(['train-detection', '--data-dir', str(root), '--output', str(tmp_path / 'out')]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith('error: ') and 'annotation 1: its box is null' in error and '\n' not in error
    assert not (tmp_path / 'out').exists()


def test_evaluation_may_list_other_categories_that_it_does_not_use(root):
    each('categories', name=lambda name: name.upper())(root)
    rows(root, 'categories', lambda row: [row, dict(id=row['id'] + 100, name=row['name'].lower())])
    each('annotations', category_id=lambda id: id + 100)(root)
    assert [image.labels.tolist() for image in read_coco(root, 'train', ['disc', 'square']).images] == LABELS
    each('annotations', category_id=lambda id: id - 100)(root)
    with pytest.raises(UserError, match="category [37]: unknown class '(DISC|SQUARE)'; the training split"):
        read_coco(root, 'train', ['disc', 'square'])
