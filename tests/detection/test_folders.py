"""Folders of both formats: what is read, what is skipped and counted, and what is refused."""
import numpy as np
import pytest

from timm_spinal.detection.annotations import Counts
from timm_spinal.detection.coco_folder import read_coco
from timm_spinal.detection.data import open_splits
from timm_spinal.detection.options import DetectionConfig
from timm_spinal.detection.voc_folder import read_voc
from timm_spinal.errors import UserError

from .shapes import draw, json_path, read_json, voc_xml, write_coco, write_json, write_voc


def annotation(id, image, box, category=3, **more):
    return dict(id=id, image_id=image, category_id=category, bbox=box, **more)


def with_annotations(root, annotations):
    """A folder of three images, 96 x 80, and these annotations."""
    write_coco(root, train=3, val=2)
    write_json(root, 'train', dict(read_json(root, 'train'), annotations=annotations))
    return root


def test_both_formats_are_read_alike(tmp_path):
    coco = read_coco(write_coco(tmp_path / 'coco', train=6), 'train')
    voc = read_voc(write_voc(tmp_path / 'voc', train=6), 'train')
    assert coco.class_names == voc.class_names == ['disc', 'square']
    assert coco.counts == voc.counts == Counts(images=6, boxes=sum(len(draw(i)[1]) for i in range(6)))
    for i, (one, two) in enumerate(zip(coco.images, voc.images)):
        shapes = draw(i)[1]
        assert one.boxes.tolist() == two.boxes.tolist() == [[float(v) for v in box] for _, box in shapes]
        assert one.labels.tolist() == two.labels.tolist() == [1 if name == 'disc' else 2 for name, _ in shapes]
        assert one.area.tolist() == two.area.tolist() == [float((b[2] - b[0]) * (b[3] - b[1])) for _, b in shapes]
        assert (one.width, one.height) == (two.width, two.height) == (96, 80)


def test_boxes_that_cannot_be_used_are_counted(tmp_path):
    root = with_annotations(tmp_path, [
        annotation(1, 10, [-5., 10, 20, 20]),  # over the left border
        annotation(2, 10, [90, 70, 20, 20], 7),  # over the corner
        annotation(3, 10, [10, 10, 0, 12]),  # no width
        annotation(4, 10, [30, 30, -4, 8]),  # negative
        annotation(5, 10, [200, 10, 20, 20]),  # outside
        annotation(6, 11, [1, 2, 3, 4], iscrowd=1, area=5.),
    ])
    split = read_coco(root, 'train')
    assert split.counts == Counts(images=3, boxes=3, crowd=1, clipped=2, empty=3, without=2)
    assert split.images[0].boxes.tolist() == [[0, 10, 15, 30], [90, 70, 96, 80]]
    assert split.images[0].labels.tolist() == [1, 2] and split.images[0].area.tolist() == [300, 60]
    assert split.images[1].crowd.tolist() == [True] and split.images[1].area.tolist() == [5]
    assert split.images[2].boxes.shape == (0, 4)
    assert split.describe().endswith(
        '3 images, 3 boxes of 2 classes, 1 crowd or difficult, 2 boxes cut at the border, 3 empty boxes left out, '
        '2 images without boxes')


@pytest.mark.parametrize('keep, images', [(False, 1), (True, 3)])
def test_images_without_boxes(tmp_path, keep, images):
    """Training leaves them out, or keeps them when asked to; evaluation keeps them."""
    root = with_annotations(tmp_path, [annotation(1, 11, [10, 10, 20, 20])])
    write_json(root, 'val', read_json(root, 'train'))
    (root / 'val' / '2.png').write_bytes((root / 'train' / '2.png').read_bytes())
    splits = open_splits(DetectionConfig(data_dir=str(root), keep_empty=keep))
    assert len(splits['train'].images) == images and len(splits['eval'].images) == 3
    assert splits['train'].counts.without == splits['eval'].counts.without == 2


def test_other_layouts(tmp_path):
    """As Roboflow exports: annotations and images of a split in one folder; 'validation' finds valid."""
    root = write_coco(tmp_path, train=2, valid=2)
    for split in ('train', 'valid'):
        json_path(root, split).rename(root / split / '_annotations.coco.json')
    splits = open_splits(DetectionConfig(data_dir=str(root)))
    assert [len(split.images) for split in splits.values()] == [2, 2]
    assert splits['eval'].images[0].file == root / 'valid' / '0.png'


def test_labels_follow_the_training_split(tmp_path):
    """The evaluation split numbers its categories otherwise and lacks one."""
    root = write_coco(tmp_path, train=2, val=2)
    content = read_json(root, 'val')
    for row in content['annotations']:
        row['category_id'] = 1
    write_json(root, 'val', dict(content, categories=[dict(id=1, name='square')]))
    splits = open_splits(DetectionConfig(data_dir=str(root)))
    assert splits['eval'].class_names == ['disc', 'square']
    assert {label for image in splits['eval'].images for label in image.labels.tolist()} == {2}


def test_voc_counts_difficult_objects_and_cuts(tmp_path):
    root = write_voc(tmp_path, train=1)
    objects = [('disc', 1, 1, 1, 10, 10), ('square', 0, 90, 70, 99, 80), ('disc', 0, 40, 40, 39, 50)]
    (root / 'Annotations' / 'train_0.xml').write_text(voc_xml(96, 80, objects))
    split = read_voc(root, 'train')
    assert split.counts == Counts(images=1, boxes=2, crowd=1, clipped=1, empty=1)
    assert split.images[0].boxes.tolist() == [[0, 0, 10, 10], [89, 69, 96, 80]]
    # a size of 0 means that it is not known
    (root / 'Annotations' / 'train_0.xml').write_text(voc_xml(0, 0, objects))
    assert (read_voc(root, 'train').images[0].width, read_voc(root, 'train').images[0].height) == (96, 80)


def remove(path):
    return lambda root: (root / path).unlink()


def write(path, text):
    return lambda root: (root / path).write_text(text)


def change(**changes):
    return lambda root: write_json(root, 'train', dict(read_json(root, 'train'), **changes))


@pytest.mark.parametrize('damage, message', [
    (change(annotations=[annotation(5, 10, [1, 2, 9, 9], 4)]), 'annotation 5: unknown category id 4; the file has 3'),
    (change(annotations=[annotation(5, 99, [1, 2, 9, 9])]), 'annotation 5: it is for image id 99, which the file'),
    (change(annotations=[annotation(5, 10, [1, 2, 9])]), 'annotation 5: its box is [1, 2, 9], not four numbers'),
    (change(annotations=[annotation(5, 10, [1, 2, 'a', 9])]), 'not four numbers'),
    (change(annotations=[annotation(5, 10, [1, 2, float('nan'), 9])]), 'is not finite; correct it'),
    (change(annotations=[]), 'no image has a box'),
    (change(annotations=[dict(id=1)]), "is not in the format of COCO (an entry has no 'image_id')"),
    (change(categories={}), 'unknown category id'),
    (write('annotations/instances_train.json', '{"images": ['), 'cannot be read as JSON'),
    (write('annotations/instances_train.json', '[]'), 'is not in the format of COCO'),
    (write('annotations/instances_val.json', '{"images": [], "annotations": [], "categories": []}'), 'has no images'),
    (remove('train/1.png'), '1 of 3 images are missing, for instance'),
    (remove('annotations/instances_val.json'), "no split 'validation' (annotations/instances_validation.json, "),
])
def test_coco_errors_are_one_line(tmp_path, damage, message):
    root = write_coco(tmp_path, train=3, val=2)
    damage(root)
    with pytest.raises(UserError) as error:
        open_splits(DetectionConfig(data_dir=str(root)))
    assert message in str(error.value) and '\n' not in str(error.value)


OTHER = voc_xml(96, 80, [('cat', 0, 1, 1, 9, 9)])


@pytest.mark.parametrize('damage, message', [
    (write('Annotations/val_1.xml', OTHER), "val_1.xml: unknown class 'cat'; the training split has disc, square"),
    (write('Annotations/val_1.xml', '<annotation>'), 'cannot be read as XML'),
    (write('Annotations/val_1.xml', OTHER.replace('<xmin>1</xmin>', '')), 'not four numbers'),
    (write('Annotations/train_0.xml', OTHER.replace('<name>cat</name>', '')), 'an object has no <name>'),
    (remove('Annotations/train_0.xml'), 'train_0.xml: No such file or directory'),
    (remove('JPEGImages/val_0.png'), '1 of 2 images are missing'),
    (remove('ImageSets/Main/val.txt'), "no split 'validation' (ImageSets/Main/validation.txt)"),
    (write('ImageSets/Main/train.txt', ''), 'it has no images'),
])
def test_voc_errors_are_one_line(tmp_path, damage, message):
    root = write_voc(tmp_path, train=3, val=2)
    damage(root)
    with pytest.raises(UserError) as error:
        open_splits(DetectionConfig(data_dir=str(root)))
    assert message in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('options, message', [
    (dict(), 'no data: give a folder'),
    (dict(data_dir='no/such'), 'data folder no/such: does not exist; check --data-dir'),
])
def test_folder_that_is_not_there(options, message):
    with pytest.raises(UserError, match=message):
        open_splits(DetectionConfig(**options))


def test_the_test_split_needs_boxes(tmp_path):
    root = write_coco(tmp_path, train=2, val=2, test=2)
    write_json(root, 'test', dict(read_json(root, 'test'), annotations=[]))
    with pytest.raises(UserError, match=r'\(test\): has no box to be found'):
        open_splits(DetectionConfig(data_dir=str(root), test_split='test'))
    assert np.all([len(image.boxes) for image in open_splits(DetectionConfig(data_dir=str(root)))['eval'].images])
