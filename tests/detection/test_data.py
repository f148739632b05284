import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from timm_spinal.detection.data import DetectionData, create_data, open_splits, read_image
from timm_spinal.detection.image_files import image_size
from timm_spinal.detection.options import DetectionConfig
from timm_spinal.detection.plot import draw_boxes
from timm_spinal.errors import UserError
from timm_spinal.training.pixels import Decoder, open_image

from .shapes import draw, read_json, write_coco, write_json, write_voc


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp('shapes'), train=8, val=3)


def config(folder, **options):
    return DetectionConfig(**{**dict(data_dir=str(folder), workers=0, batch_size=2, seed=1), **options})


def test_image_and_target(folder):
    data = DetectionData(open_splits(config(folder))['train'].images)
    image, target = data[2, None]
    drawn, shapes = draw(2)
    assert torch.equal(image, torch.from_numpy(np.array(drawn)).permute(2, 0, 1) / 255)
    assert target['boxes'].tolist() == [[float(v) for v in box] for _, box in shapes]
    assert target['boxes'].dtype == torch.float32 and target['labels'].dtype == torch.int64 and target['image_id'] == 2


def test_flip_turns_image_and_boxes(folder):
    records = open_splits(config(folder))['train'].images
    plain, target = DetectionData(records, hflip=1.)[3, None]
    flipped, other = DetectionData(records, hflip=1.)[3, 77]
    assert torch.equal(flipped, plain.flip(2))
    assert len(target['boxes'])
    for (x1, y1, x2, y2), mirrored in zip(target['boxes'].tolist(), other['boxes'].tolist()):
        assert mirrored == [96 - x2, y1, 96 - x1, y2]
    # what is read again is not what was flipped
    assert torch.equal(DetectionData(records, hflip=0.)[3, 77][1]['boxes'], target['boxes'])
    halves = DetectionData(records, hflip=0.5)
    turned = sum(not torch.equal(halves[3, seed][0], plain) for seed in range(40))
    assert 8 < turned < 32


def test_crowds_are_not_trained_on(folder):
    record = open_splits(config(folder))['train'].images[0]
    crowd = np.zeros(len(record.boxes), dtype=bool)
    crowd[0] = True
    target = DetectionData([replace(record, crowd=crowd)])[0, None][1]
    assert len(target['boxes']) == len(target['labels']) == len(record.boxes) - 1


def batches(folder, epoch, **options):
    made = config(folder, **options)
    data = create_data(made, open_splits(made), num_processes=1)
    data.set_epoch(epoch)
    return [(images, [t['image_id'].item() for t in targets]) for images, targets in data.train_loader]


def test_epochs_differ_and_repeat(folder):
    one, again, other = batches(folder, 0), batches(folder, 0, workers=1), batches(folder, 1)
    assert [ids for _, ids in one] == [ids for _, ids in again] != [ids for _, ids in other]
    assert all(torch.equal(a, b) for (x, _), (y, _) in zip(one, again) for a, b in zip(x, y))
    assert sorted(i for _, ids in one for i in ids) == list(range(8))
    assert len(batches(folder, 0, epoch_repeats=2.)) == 8


def test_small_data_lose_no_image(folder):
    assert {i for _, ids in batches(folder, 0, batch_size=3) for i in ids} == set(range(8))
    made = config(folder, epochs=4, min_updates=30)
    assert len(create_data(made, open_splits(made), num_processes=2).train_loader.sampler) == 8 * 2 * made.batch_size


def test_batch_that_is_never_full(folder):
    made = config(folder, batch_size=5)
    with pytest.raises(UserError, match='--batch-size 5 in each of 2 processes: .* than the 8 images .*; use .* 4 or'):
        create_data(made, open_splits(made), num_processes=2)


def test_image_that_cannot_be_read(tmp_path):
    root = write_coco(tmp_path, train=2, val=1)
    data = DetectionData(open_splits(config(root))['train'].images)
    (root / 'train' / '0.png').write_bytes(b'no image')
    Image.new('RGB', (80, 96)).save(root / 'train' / '1.png')
    with pytest.raises(UserError, match=r'0.png cannot be read \(cannot identify image file'):
        data[0, None]
    with pytest.raises(UserError, match=r'1.png is 80x96, but its annotations are for 96x80'):
        data[1, None]


def turn(folder, orientation, as_shown):
    """Give the training images of a folder an EXIF orientation; what is shown, or stored, is what was drawn."""
    tags = Image.Exif()
    tags[0x112] = orientation
    for file in (folder / 'train').iterdir():
        image = Image.open(file)
        if as_shown:
            back = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
            image = image.transpose(back[orientation])
        image.save(file, exif=tags)


@pytest.mark.parametrize('upright', [False, True])
@pytest.mark.parametrize('as_shown', [False, True])
@pytest.mark.parametrize('orientation', [3, 6, 8])
def test_turned_images_fit_their_boxes(tmp_path, caplog, orientation, as_shown, upright):
    root = write_coco(tmp_path, train=2, val=1)
    turn(root, orientation, as_shown)
    made = config(root, exif_transpose=upright)
    data = create_data(made, open_splits(made), num_processes=1).train_loader.dataset
    drawn = torch.from_numpy(np.array(draw(1)[0])).permute(2, 0, 1) / 255
    for index in (1, 0, 1):
        image, _ = data[index, None]
    if orientation == 3:  # 96 x 80 both ways, so that the flag decides
        assert torch.equal(image, drawn if as_shown == upright else drawn.flip(1, 2))
        assert len(caplog.records) == (not upright)
    else:
        assert torch.equal(image, drawn) and not caplog.records


@pytest.mark.parametrize('convert', [
    lambda image: Image.fromarray(np.asarray(image.convert('L')).astype(np.uint16) * 257),
    lambda image: Image.fromarray(np.asarray(image.convert('L')).astype(np.float32) / 255),
    lambda image: Image.merge('LA', (image.convert('L'), Image.new('L', image.size, 255))),
    lambda image: image.convert('L'),
])
def test_images_of_other_modes_keep_their_levels(tmp_path, convert):
    root = write_coco(tmp_path, train=1, val=1)
    image = convert(draw(0)[0])
    image.save(root / 'train' / '0.png', 'TIFF' if image.mode == 'F' else 'PNG')
    grey = torch.from_numpy(np.array(draw(0)[0].convert('L'))) / 255
    found = DetectionData(open_splits(config(root))['train'].images)[0, None][0]
    assert torch.equal(found, grey.expand(3, -1, -1))


def forget_sizes(root, kind):
    """Take the sizes out of the training split's annotations."""
    if kind == 'coco':
        content = read_json(root, 'train')
        write_json(root, 'train', dict(content, images=[
            {k: v for k, v in row.items() if k not in ('width', 'height')} for row in content['images']]))
        return
    for file in (root / 'Annotations').glob('train_*.xml'):
        file.write_text(re.sub('<size>.*</size>', '', file.read_text()))


@pytest.mark.parametrize('upright', [False, True])
@pytest.mark.parametrize('orientation', [3, 5, 6, 8, 9])
@pytest.mark.parametrize('kind', ['coco', 'voc'])
def test_size_that_annotations_do_not_say_is_that_of_the_decoded_image(tmp_path, kind, orientation, upright):
    root = dict(coco=write_coco, voc=write_voc)[kind](tmp_path, train=1, val=1)
    forget_sizes(root, kind)
    made = config(root, exif_transpose=upright)
    file = open_splits(made)['train'].images[0].file
    tags = Image.Exif()
    tags[0x112] = orientation
    draw(0)[0].save(file, exif=tags)
    record = open_splits(made)['train'].images[0]
    assert (record.width, record.height) == ((80, 96) if upright and 5 <= orientation <= 8 else (96, 80))
    expected = Image.open(file).convert('RGB')
    if upright:
        expected = ImageOps.exif_transpose(expected)
    assert np.array_equal(read_image(record, Decoder(exif_transpose=upright)), expected)


@pytest.mark.parametrize('suffix, kind', [('.jpg', 'JPEG'), ('.tif', 'TIFF'), ('.jp2', 'JPEG2000')])
def test_unknown_size_of_other_formats(tmp_path, suffix, kind):
    """Pillow turns TIFF files by itself, the size it says before decoding too."""
    tags = Image.Exif()
    tags[0x112] = 6
    file = tmp_path / f'image{suffix}'
    draw(0)[0].save(file, kind, **({} if kind == 'JPEG2000' else dict(exif=tags)))
    for upright in (False, True):
        decoded = Decoder(exif_transpose=upright)(open_image(file), lambda: '')
        assert image_size(file, upright) == decoded.size


def rename(root, index, name):
    content = read_json(root, 'train')
    content['images'][index]['file_name'] = name
    write_json(root, 'train', content)


def missing(root):
    rename(root, 0, 'new\nline.png')


def twice(root):
    (root / 'train' / 'new\nline.png').write_bytes((root / 'train' / '0.png').read_bytes())
    rename(root, 0, 'new\nline.png')
    rename(root, 1, 'new\nline.png')


def ambiguous(root):
    for suffix in ('.bmp', '.gif'):
        draw(0)[0].save(root / 'train' / f'new\nline{suffix}')
    rename(root, 0, 'new\nline.png')


def damaged(root):
    (root / 'train' / 'new\nline.png').write_bytes(b'no image')
    rename(root, 0, 'new\nline.png')


def damaged_without_size(root):
    damaged(root)
    forget_sizes(root, 'coco')


def of_another_size(root):
    draw(0, 90, 90)[0].save(root / 'train' / 'new\nline.png')
    rename(root, 0, 'new\nline.png')


@pytest.mark.parametrize('change, message', [
    (missing, r'images are missing, for instance .*new\\nline.png; check'),
    (twice, r'its image .*new\\nline.png is also that of'),
    (ambiguous, r'new\\nline.bmp and new\\nline.gif in .* could both be meant'),
    (damaged, r'new\\nline.png cannot be read'),
    (damaged_without_size, r'new\\nline.png cannot be read'),
    (of_another_size, r'new\\nline.png is 90x90, but its annotations are for 96x80'),
])
def test_name_of_several_lines_is_told_on_one(tmp_path, change, message):
    root = write_coco(tmp_path, train=2, val=1)
    change(root)
    with pytest.raises(UserError, match=message) as error:
        DetectionData(open_splits(config(root))['train'].images)[0, None]
    assert len(str(error.value).splitlines()) == 1


def test_formats_are_those_of_the_classifiers_folders(tmp_path):
    """Neither what needs another program nor what has no pixels is taken for an image."""
    root = write_coco(tmp_path, train=1, val=1)
    (root / 'train' / '0.png').rename(root / 'train' / '0.mpo')
    for name in ('0.eps', '0.mpg', '0.wmf'):
        (root / 'train' / name).write_bytes(b'')
    rename(root, 0, '0')
    assert open_splits(config(root))['train'].images[0].file.name == '0.mpo'


def test_boxes_are_drawn_on_what_the_detector_gets(tmp_path):
    """The drawn image is the decoded one: 16 bits of grey as grey, not as white."""
    root = write_coco(tmp_path, train=1, val=1)
    grey = np.asarray(draw(0)[0].convert('L'))
    Image.fromarray(grey.astype(np.uint16) * 257).save(root / 'train' / '0.png')
    images = open_splits(config(root))['train'].images
    draw_boxes(tmp_path / 'boxes.png', images, {0: (np.zeros((0, 4)), [], [])}, ['disc', 'square'], Decoder())
    shown = np.asarray(Image.open(tmp_path / 'boxes.png').convert('L'))
    assert (shown < 60).mean() > 0.3 < (grey < 60).mean()
