"""Files of Pascal VOC's format as programs and people write them: read for what they mean, or named in one line."""
import zipfile

import numpy as np
import pytest
from PIL import Image

from tests.training.images import REAL
from timm_spinal.detection.annotations import Counts
from timm_spinal.detection.data import DetectionData, open_splits
from timm_spinal.detection.options import DetectionConfig
from timm_spinal.detection.voc_folder import read_voc
from timm_spinal.errors import UserError

from .shapes import draw, voc_xml, write_voc

SHAPES = [draw(i)[1] for i in range(3)]
TRUTH = [[[float(v) for v in box] for _, box in shapes] for shapes in SHAPES]
LABELS = [[1 if name == 'disc' else 2 for name, _ in shapes] for shapes in SHAPES]
BOXES = sum(len(boxes) for boxes in TRUTH)


@pytest.fixture
def root(tmp_path):
    return write_voc(tmp_path, train=3, val=2)


def change(old, new, count=-1):
    """Replace text in the annotations of the training images."""
    def damage(root):
        for i in range(3):
            path = root / 'Annotations' / f'train_{i}.xml'
            text = path.read_text()
            assert old in text
            path.write_text(text.replace(old, new, count))
    return damage


def encode(encoding, declared=None):
    """Annotations that hold a word of another script, in an encoding."""
    def damage(root):
        for i in range(3):
            path = root / 'Annotations' / f'train_{i}.xml'
            word = SCRIPTS.get(encoding, 'été')
            text = path.read_text().replace('<size>', f'<folder>{word}</folder><size>')
            first = f'<?xml version="1.0" encoding="{declared}"?>\n' if declared else ''
            path.write_bytes((first + text).encode(encoding))
    return damage


SCRIPTS = {'gbk': '图片', 'gb18030': '图片', 'shift_jis': '写真', 'cp932': '①写真', 'euc-kr': '사진', 'big5': '圖片',
           'koi8-r': 'фото', 'cp1251': 'фото',
           'utf-8': '图片', 'utf-16': '图片', 'utf-16-le': '图片', 'utf-16-be': '图片'}


def lines(*lines, encoding='utf-8'):
    return lambda root: (root / 'ImageSets' / 'Main' / 'train.txt').write_text('\n'.join(lines), encoding=encoding)


def rename(annotations, images, listed, filename=''):
    """Other names for the files of image 0, 1, 2."""
    def damage(root):
        for i in range(3):
            for folder, old, new in (('Annotations', f'train_{i}.xml', annotations),
                                     ('JPEGImages', f'train_{i}.png', images)):
                path = root / folder / new.format(i)
                path.parent.mkdir(parents=True, exist_ok=True)
                (root / folder / old).rename(path)
            path = root / 'Annotations' / annotations.format(i)
            path.write_text(path.read_text().replace('<size>', f'<filename>{filename.format(i)}</filename><size>'))
        lines(*(listed.format(i) for i in range(3)))(root)
    return damage


def each_box(make):
    """Other text for each object's box, of xmin, ymin, xmax, ymax as the format counts them."""
    def damage(root):
        for i, shapes in enumerate(SHAPES):
            text = voc_xml(96, 80, [])
            objects = ''.join(f'<object><name>{name}</name>{make(x1 + 1, y1 + 1, x2, y2)}</object>'
                              for name, (x1, y1, x2, y2) in shapes)
            text = text.replace('</annotation>', f'{objects}</annotation>')
            (root / 'Annotations' / f'train_{i}.xml').write_text(text)
    return damage


def bndbox(*values):
    tags = ('xmin', 'ymin', 'xmax', 'ymax')
    return '<bndbox>' + ''.join(f'<{tag}>{value}</{tag}>' for tag, value in zip(tags, values)) + '</bndbox>'


RIGHT = {
    **{f'encoding {name}': encode(name, name)
       for name in (*SCRIPTS, 'latin-1', 'windows-1252', 'utf-32', 'iso-8859-15')},
    'gbk called gb2312': encode('gbk', 'gb2312'),
    'cp932 called Shift_JIS': encode('cp932', 'Shift_JIS'),
    'UTF-8 called utf-16': encode('utf-8', 'utf-16'),
    'UTF-8 with a byte order mark': encode('utf-8-sig', 'UTF-8'),
    'a byte order mark against the first line': encode('utf-8-sig', 'gbk'),
    'byte order mark and no first line': encode('utf-16'),
    'UTF-16 without either': encode('utf-16-be'),
    'blank lines at the start': change('<annotation>', '\n\n<?xml version="1.0"?><annotation>'),
    'namespace': change('<annotation>', '<annotation xmlns="http://a.b/voc">'),
    'no size': change('size>', 'dimensions>'),
    'size as floats': change('<width>96<', '<width> 96.0 <'),
    'size of text': change('<width>96<', '<width>unknown<'),
    'empty size': change('<width>96</width>', '<width/>'),
    'size of NaN': change('<height>80<', '<height>nan<'),
    'names with blanks': change('<name>', '<name>\n  '),
    'boxes as floats': each_box(lambda *box: bndbox(*(f' {v}.0\n' for v in box))),
    'no difficult': each_box(lambda *box: bndbox(*box)),
    'difficult of words': each_box(lambda *box: '<difficult>Unspecified</difficult>' + bndbox(*box)),
    'empty difficult': each_box(lambda *box: '<difficult/>' + bndbox(*box)),
    'parts of objects': each_box(
        lambda *box: '<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>' + bndbox(*box)),
    'other order': each_box(
        lambda a, b, c, d: f'<bndbox><ymax>{d}</ymax><xmax>{c}</xmax><ymin>{b}</ymin><xmin>{a}</xmin></bndbox>'),
    'names of files with blanks': rename('a photo {}.xml', 'a photo {}.png', 'a photo {}'),
    'blanks and a number': rename('photo {} 1.xml', 'photo {} 1.png', 'photo {} 1'),
    'list of one class': rename('photo {}.xml', 'photo {}.png', 'photo {}  -1'),
    'list with suffixes of images': rename('{}.xml', '{}.png', '{}.JPG'),
    'list with suffixes of annotations': rename('{}.xml', '{}.png', '{}.xml'),
    'list of paths': rename('{}.xml', '{}.png', 'JPEGImages\\{}.png'),
    'folders': rename('a/{}.xml', 'a/{}.png', 'a/{}'),
    'dots': rename('a.b.{}.xml', 'a.b.{}.png', 'a.b.{}'),
    'another suffix in filename': rename('{}.xml', '{}.png', '{}', '{}.jpg'),
    'no suffix in filename': rename('{}.xml', '{}.png', '{}', '{}'),
    'wrong filename': rename('{}.xml', '{}.png', '{}', 'other.png'),
    'image named by filename only': rename('{}.xml', 'photo_{}.png', '{}', 'photo_{}.png'),
    'filename without suffix only': rename('{}.xml', 'photo_{}.png', '{}', 'photo_{}'),
    'filename with a path': rename('{}.xml', 'photo_{}.png', '{}', 'C:\\data\\photo_{}.png'),
    'other case': rename('IMG_{}.XML', 'Img_{}.PnG', 'img_{}'),
    'list in UTF-16': lines('train_0', 'train_1', 'train_2', encoding='utf-16'),
    'list with a byte order mark': lines('train_0', ' train_1 ', '', 'train_2', encoding='utf-8-sig'),
}


def assert_truth(split, **counts):
    assert split.class_names == ['disc', 'square']
    assert split.counts == Counts(images=3, boxes=BOXES, **counts)
    for i, image in enumerate(split.images):
        assert image.boxes == pytest.approx(np.array(TRUTH[i]), abs=1e-4) and image.labels.tolist() == LABELS[i]
        assert (image.width, image.height) == (96, 80) and not image.crowd.any()
        assert Image.open(image.file).convert('RGB').tobytes() == draw(i)[0].tobytes()


@pytest.mark.parametrize('kind', RIGHT)
def test_read_rightly(root, kind):
    RIGHT[kind](root)
    assert_truth(read_voc(root, 'train'))


@pytest.mark.parametrize('suffix', ['.bmp', '.PNG', '.Tiff', '.ppm', '.tga'])
def test_any_suffix(root, suffix):
    for i in range(3):
        draw(i)[0].save(root / 'JPEGImages' / f'train_{i}{suffix}')
        (root / 'JPEGImages' / f'train_{i}.png').unlink()
        (root / 'JPEGImages' / f'train_{i}.txt').write_text('no image')
    assert_truth(read_voc(root, 'train'))


def test_of_two_images_the_filename_says_which(root):
    change('<size>', '<filename>train_0.png</filename><size>')(root)
    Image.new('RGB', (96, 80)).save(root / 'JPEGImages' / 'train_0.bmp')
    assert_truth(read_voc(root, 'train'))


def test_boxes_in_fractions_of_the_image(root):
    """Fractions count from the border, not from pixel 1."""
    each_box(lambda a, b, c, d: bndbox((a - 1) / 96, (b - 1) / 80, c / 96, d / 80))(root)
    assert_truth(read_voc(root, 'train'), scaled=BOXES)


@pytest.mark.parametrize('polygon', [
    '<x1>{a}</x1><y1>{b}</y1><x2>{c}</x2><y2>{b}</y2><x3>{a}</x3><y3>{d}</y3>',
    '<pt><x>{a}</x><y>{b}</y></pt><pt><x>{c}</x><y>{d}</y></pt>',
])
def test_polygons_without_boxes(root, polygon):
    each_box(lambda a, b, c, d: f'<polygon>{polygon.format(a=a, b=b, c=c, d=d)}</polygon>')(root)
    assert_truth(read_voc(root, 'train'), outlined=BOXES)


def test_lines_listed_twice_are_read_once(root):
    lines('train_0', 'train_1', 'train_2', 'train_1')(root)
    assert_truth(read_voc(root, 'train'), repeated=1)


def test_corners_at_one_place_are_empty(root):
    """A click is no object of one pixel, though the last pixel is inside."""
    boxes = [('disc', 0, 40, 40, 40, 40), ('disc', 0, 40, 40, 40, 60), ('square', 0, 40, 40, 41, 41)]
    (root / 'Annotations' / 'train_0.xml').write_text(voc_xml(96, 80, boxes))
    lines('train_0')(root)
    split = read_voc(root, 'train')
    assert split.counts == Counts(images=1, boxes=1, empty=2) and split.images[0].boxes.tolist() == [[39, 39, 41, 41]]


NAMED = {
    'NaN': (each_box(lambda a, b, c, d: bndbox(a, b, 'NaN', d)), 'object 1: its box ["'),
    'comma': (each_box(lambda a, b, c, d: bndbox(a, b, f'{c},5', d)), 'not four numbers; correct it'),
    'empty box': (each_box(lambda a, b, c, d: '<bndbox/>'), 'object 1: its box is [null, null, null, null], not four'),
    'no box': (each_box(lambda a, b, c, d: ''), 'object 1: its box is [null, null, null, null], not four'),
    'empty polygon': (each_box(lambda a, b, c, d: '<polygon/>'), 'object 1: its outline has 0 numbers'),
    'damaged polygon': (
        each_box(lambda a, b, c, d: '<polygon><x1>1</x1><y1>z</y1></polygon>'), 'object 1: its outline contains'),
    'difficult': (
        change('<difficult>0<', '<difficult>perhaps<'),
        'object 1: its difficult is "perhaps", neither 0 nor 1'),
    'empty name': (change('<name>', '<name> </name><name>'), 'its name is " ", but a class needs a name; correct it'),
    'some in fractions': (
        lambda root: (root / 'Annotations' / 'train_1.xml').write_text(voc_xml(96, 80, [('disc', 0, .1, .2, .5, .6)])),
        'train_1.xml: object 1: its box seems to be in fractions of the image, from 0 to 1 (1 of'),
    'wrong encoding': (encode('big5', 'utf-8'), 'is not in the encoding that its first line names'),
    'no encoding': (encode('latin-1'), 'is not in the encoding that its first line names, UTF-8 if none'),
    'unknown encoding': (encode('utf-8', 'martian'), 'names an encoding that is not known (unknown encoding: martian)'),
    'encoding of no text': (encode('utf-8', 'hex'), 'names an encoding that is not known'),
    'another format': (change('annotation>', 'annotations>'), 'it is <annotations>, not <annotation>'),
    'empty file': (
        lambda root: (root / 'Annotations' / 'train_1.xml').write_bytes(b''), 'cannot be read as XML (no element'),
    'two images': (
        lambda root: Image.new('RGB', (96, 80)).save(root / 'JPEGImages' / 'train_1.bmp'),
        'train_1.xml: train_1.bmp and train_1.png in'),
    'one image of two': (
        rename('{}.xml', 'photo_{}.png', '{}', 'photo_1.png'), 'photo_1.png is also that of'),
    'no image': (
        lambda root: (root / 'JPEGImages' / 'train_1.png').unlink(), '1 of 3 images are missing, for instance'),
    'list of no text': (
        lambda root: (root / 'ImageSets' / 'Main' / 'train.txt').write_bytes(b'caf\xe9'),
        'train.txt: cannot be read as text'),
}


@pytest.mark.parametrize('kind', NAMED)
def test_named_in_one_line(root, kind):
    damage, message = NAMED[kind]
    damage(root)
    with pytest.raises(UserError) as error:
        open_splits(DetectionConfig(data_dir=str(root)))
    assert message in str(error.value) and '\n' not in str(error.value) and str(root) in str(error.value)


@pytest.fixture(scope='module')
def blood(tmp_path_factory):
    """BCCD: 364 photographs of blood cells, annotated by hand, and 4888 boxes."""
    archive = REAL / 'bccd' / 'bccd.zip'
    if not archive.is_file():
        pytest.skip(f'{archive} is not there')
    folder = tmp_path_factory.mktemp('blood')
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)
    return folder / 'BCCD'


def test_photographs_of_blood(blood):
    """All of it: two boxes of 4888 are empty, and every image has the size that its annotations say."""
    config = DetectionConfig(data_dir=str(blood), val_split='val', test_split='test', hflip=0.)
    splits = open_splits(config)
    assert splits['train'].class_names == ['Platelets', 'RBC', 'WBC']
    assert {name: split.counts for name, split in splits.items()} == dict(
        train=Counts(images=205, boxes=2804, empty=1), eval=Counts(images=87, boxes=1137, empty=1),
        test=Counts(images=72, boxes=945))
    images = [image for split in splits.values() for image in split.images]
    labels = np.concatenate([image.labels for image in images])
    assert np.bincount(labels).tolist() == [0, 361, 4153, 372] and len({image.file for image in images}) == 364
    for image in images:
        with Image.open(image.file) as file:
            assert file.size == (image.width, image.height) == (640, 480)
        assert (image.boxes >= 0).all() and (image.boxes <= [640, 480, 640, 480]).all()
        assert (image.boxes[:, 2:] - image.boxes[:, :2] >= 1).all() and len(image.boxes)
    pixels, target = DetectionData(splits['test'].images)[0, None]
    assert pixels.shape == (3, 480, 640) and len(target['boxes']) == len(splits['test'].images[0].boxes)
