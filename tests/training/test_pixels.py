import io
import logging
import pickle

import numpy as np
import pytest
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from torchvision import transforms

from timm_spinal.training import pixels
from timm_spinal.training.dataset import EvalSampler, ImageData, Split
from timm_spinal.training.image_folder import open_images
from timm_spinal.training.named_datasets import open_torch
from timm_spinal.training.pixels import UNREADABLE, Decoder, open_image, usable_modes

from .images import make_split

RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8))
GREY = RGB.convert('L')
LEVELS = np.array([[0, 255, 256, 8000], [40000, 65535, 300, 128]], dtype=np.uint16)
UPPER = (LEVELS >> 8).tolist()


def stored(image, kind, **options):
    """An image as it comes out of a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return open_image(file)


def decode(image, mode='L', **options):
    return np.asarray(Decoder(mode, **options)(image, lambda: 'x')).tolist()


def on_white(image):
    """What a picture with transparency looks like on white paper, by arithmetic."""
    values = np.asarray(image.convert('RGBA')).astype(float)
    alpha = values[..., 3:] / 255
    return values[..., :3] * alpha + 255 * (1 - alpha)


def tiff(values: np.ndarray, signed: bool = False, bits: int = 0) -> io.BytesIO:
    """A plain TIFF of one grey strip; with ``bits`` the values are bytes in which rows of so many bits are packed."""
    rows, columns = values.shape
    data = values.tobytes()
    columns, bits = (columns * 8 // bits, bits) if bits else (columns, values.itemsize * 8)
    tags = {256: columns, 257: rows, 258: bits, 259: 1, 262: 1, 273: 8 + 2 + 10 * 12 + 4, 277: 1, 278: rows,
            279: len(data), 339: 2 if signed else 1}
    entries = b''.join(np.array([tag, 3], '<u2').tobytes() + np.array([1, value], '<u4').tobytes()
                       for tag, value in tags.items())
    return io.BytesIO(b'II*\0\x08\0\0\0' + np.array([len(tags)], '<u2').tobytes() + entries + bytes(4) + data)


@pytest.mark.parametrize('kind', ['PNG', 'TIFF', 'JPEG2000', 'PPM'])
def test_grey_of_16_bits_is_scaled(kind):
    if kind == 'PPM':
        image = open_image(io.BytesIO(b'P5 4 2 65535\n' + LEVELS.astype('>u2').tobytes()))
    else:
        image = stored(Image.fromarray(LEVELS), kind)
    assert decode(image) == UPPER
    assert decode(image, 'RGB') == np.repeat(np.array(UPPER)[..., None], 3, axis=2).tolist()


def test_16_bits_of_the_other_byte_order_of_12_bits_and_with_a_sign():
    assert decode(stored(Image.frombytes('I;16B', (4, 2), LEVELS.astype('>u2').tobytes()), 'TIFF')) == UPPER
    assert decode(open_image(tiff((LEVELS.astype(int) - 32768).astype('<i2'), signed=True))) == UPPER
    packed = np.array([[0x00, 0x00, 0xff, 0x80, 0x0f, 0xff]], np.uint8)  # 0, 255, 2048, 4095
    assert decode(open_image(tiff(packed, bits=12))) == [[0, 15, 128, 255]]


@pytest.mark.parametrize('values, expected', [
    (LEVELS.astype(np.int32), UPPER),
    (np.array([[0, 7, 255, 254]], np.int32), [[0, 7, 255, 254]]),
    (np.array([[-500, 500, 1500, 3500]], np.int32), [[0, 64, 128, 255]]),  # nothing says what is white
    (np.array([[0, 10 ** 6, 10 ** 6 // 2, 10 ** 6 // 4]], np.int32), [[0, 255, 128, 64]]),
    (np.arange(256, dtype=np.float32)[None] / 255, [list(range(256))]),
    (np.array([[0.25, 0.5, 0.75]], np.float32), [[64, 128, 192]]),
    (np.array([[-0.05, 0.5, 1.05]], np.float32), [[0, 128, 255]]),  # what resampling makes of 0..1
    (np.array([[-1, 0, 0.5]], np.float32), [[0, 128, 192]]),
    (np.array([[0.5, 30, 200.9]], np.float32), [[0, 30, 200]]),
    (LEVELS.astype(np.float32), UPPER),
    (np.array([[np.nan, np.inf, -np.inf, 0.5]], np.float32), [[0, 255, 0, 128]]),
    (np.full((1, 3), np.nan, np.float32), [[0, 0, 0]]),
    (np.array([[-2., 0., 2., 6.]], np.float32), [[0, 64, 128, 255]]),
    (np.array([[3., 3.]], np.float32), [[0, 0]]),
])
def test_grey_of_32_bits(values, expected):
    assert decode(stored(Image.fromarray(values), 'TIFF')) == expected


def test_levels_are_the_same_in_images_of_the_same_range():
    dim, bright = (Image.fromarray(np.full((2, 2), level, np.float32)) for level in (0.125, 0.75))
    assert (decode(dim), decode(bright)) == ([[32] * 2] * 2, [[192] * 2] * 2)


@pytest.mark.parametrize('image', [
    stored(RGB, 'PNG'), stored(RGB, 'JPEG'), stored(GREY, 'PNG'), stored(RGB.convert('P'), 'PNG'),
    stored(RGB.convert('CMYK'), 'JPEG'), stored(RGB.convert('CMYK'), 'TIFF'), stored(GREY.convert('1'), 'PNG'),
    RGB.convert('YCbCr'), RGB.convert('HSV'), RGB.convert('RGBX'), stored(RGB, 'WEBP', lossless=True),
])
def test_ordinary_images_are_as_pillow_converts_them(image):
    for mode in ('RGB', 'L'):
        assert decode(image, mode) == np.asarray(image.convert(mode)).tolist()


def test_an_image_of_the_mode_is_not_even_copied():
    image = stored(RGB, 'PNG')
    assert Decoder()(image, lambda: 'x') is image


def test_lab_and_inverted_cmyk_have_the_colours_of_the_picture():
    muted = RGB.point(lambda v: 80 + v // 3)  # saturated colours are coarse in 8 bits of LAB
    for image in (stored(muted.convert('LAB'), 'TIFF'), stored(muted.convert('CMYK'), 'TIFF')):
        assert np.abs(np.array(decode(image, 'RGB')) - np.asarray(muted)).max() <= 4
        assert np.abs(np.array(decode(image, 'L')) - np.asarray(muted.convert('L'))).max() <= 3
    flat = Image.new('RGB', (8, 8), (200, 120, 40)).convert('CMYK')
    # Adobe's programs write CMYK inverted, and Pillow does as they do
    assert np.abs(np.array(decode(stored(flat, 'JPEG'), 'RGB')) - (200, 120, 40)).max() <= 2


ALPHA = Image.fromarray(np.linspace(0, 255, 9 * 14).reshape(9, 14).astype(np.uint8))
INDEXED = RGB.convert('P', palette=Image.Palette.ADAPTIVE, colors=16)
INDEXED_ALPHA = INDEXED.convert('PA')
INDEXED_ALPHA.putalpha(ALPHA)


@pytest.mark.parametrize('image', [
    stored(Image.merge('RGBA', (*RGB.split(), ALPHA)), 'PNG'),
    stored(Image.merge('LA', (GREY, ALPHA)), 'PNG'),
    INDEXED_ALPHA,
    stored(INDEXED, 'PNG', transparency=bytes(range(0, 256, 16))),
    stored(INDEXED, 'PNG', transparency=INDEXED.getpixel((0, 0))),
    stored(INDEXED, 'GIF', transparency=INDEXED.getpixel((0, 0))),
    stored(RGB, 'PNG', transparency=RGB.getpixel((2, 2))),
    stored(GREY, 'PNG', transparency=GREY.getpixel((2, 2))),
    stored(GREY.convert('1'), 'PNG', transparency=0),
])
def test_transparent_parts_are_white(image):
    expected = on_white(image)
    assert not np.array_equal(expected, np.asarray(image.convert('RGBA'))[..., :3])
    assert np.abs(np.array(decode(image, 'RGB')) - expected).max() <= 1
    weights = np.array([0.299, 0.587, 0.114])
    assert np.abs(np.array(decode(image, 'L')) - expected @ weights).max() <= 2
    assert np.array_equal(decode(image, 'RGBA'), np.asarray(image.convert('RGBA')))


def test_premultiplied_alpha_and_a_transparent_level_of_16_bits():
    whole = Image.merge('RGBA', (*RGB.split(), ALPHA))
    shown = np.array(decode(whole, 'RGB'))
    assert np.abs(np.array(decode(whole.convert('RGBa'), 'RGB')) - shown).max() <= 2
    pair = Image.merge('LA', (GREY, ALPHA))
    assert np.abs(np.array(decode(pair.convert('La'))) - np.array(decode(pair))).max() <= 2
    image = stored(Image.fromarray(LEVELS), 'PNG', transparency=8000)
    white = [[0, 0, 1, 255], [156, 255, 1, 0]]
    assert decode(image) == white
    assert decode(image, 'LA')[0] == [[0, 255], [0, 255], [1, 255], [31, 0]]


def test_an_opaque_alpha_changes_nothing():
    image = RGB.copy()
    image.putalpha(255)
    assert decode(stored(image, 'PNG'), 'RGB') == np.asarray(RGB).tolist()


def test_modes_that_a_model_can_take():
    modes = usable_modes()
    assert {'L': 1, 'LA': 2, 'RGB': 3, 'RGBA': 4, 'CMYK': 4, 'HSV': 3, 'YCbCr': 3}.items() <= modes.items()
    assert not {'1', 'P', 'PA', 'I', 'F', 'I;16'} & modes.keys()
    for source in Image.MODES:
        for mode, channels in modes.items():
            image = Decoder(mode)(Image.new(source, (3, 2)), lambda: 'x')
            assert (image.mode, np.asarray(image).size) == (mode, 6 * channels)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind, mode', [('AVIF', 'RGB'), ('ICNS', 'RGB'), ('ICNS', 'P'), ('BLP', 'P'), ('PNG', 'RGB')])
def test_damaged_files_of_any_format_fail_in_one_way(kind, mode, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 10_000)
    file = io.BytesIO()
    try:
        RGB.convert(mode).save(file, kind)
    except (KeyError, OSError):
        pytest.skip(f'Pillow has no {kind}')
    whole, rng = file.getvalue(), np.random.default_rng(0)
    failed = 0
    for _ in range(40):
        damaged = bytearray(whole[:rng.integers(8, len(whole) + 1)])
        for place in rng.integers(4, min(200, len(damaged)), size=4):
            damaged[place] = rng.integers(256)
        try:
            Decoder()(open_image(io.BytesIO(damaged)), lambda: 'x')
        except UNREADABLE:
            failed += 1
    assert failed


# ---- first frame, orientation -----------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['GIF', 'PNG', 'WEBP', 'TIFF', 'MPO'])
def test_the_first_frame_of_an_animation(kind):
    frames = [Image.new('RGB', (16, 16), colour) for colour in ('red', 'lime', 'blue')]
    image = stored(frames[0], kind, save_all=True, append_images=frames[1:])
    assert image.n_frames == 3
    assert np.abs(np.array(decode(image, 'RGB')) - (255, 0, 0)).max() <= 2


def exif(orientation):
    tags = Image.Exif()
    tags[0x112] = orientation
    return tags


@pytest.mark.parametrize('kind', ['PNG', 'WEBP'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_images_are_turned_as_pillow_turns_them(kind, orientation):
    def image():
        return stored(RGB, kind, exif=exif(orientation), **(dict(lossless=True) if kind == 'WEBP' else {}))

    assert decode(image(), 'RGB') == np.asarray(RGB).tolist()
    upright = ImageOps.exif_transpose(image())
    assert decode(image(), 'RGB', exif_transpose=True) == np.asarray(upright).tolist()
    assert decode(image(), 'L', exif_transpose=True) == np.asarray(upright.convert('L')).tolist()


def test_a_grey_image_of_16_bits_is_turned_too():
    image = stored(Image.fromarray(LEVELS), 'PNG', exif=exif(6))
    assert decode(image, exif_transpose=True) == np.rot90(np.array(UPPER), -1).tolist()


@pytest.mark.parametrize('damaged', [b'garbage', b'Exif\0\0garbage', b'Exif\0\0II*\0\x08\0\0\0\xff\xff'])
@pytest.mark.filterwarnings('ignore:Corrupt EXIF')
def test_damaged_exif_leaves_an_image_readable(damaged):
    image = stored(RGB, 'PNG', exif=damaged)
    assert decode(image, 'RGB', exif_transpose=True) == np.asarray(RGB).tolist()


def test_the_annotated_size_decides_where_it_can():
    stored_size, shown = RGB.size, RGB.size[::-1]
    for upright in (False, True):
        decoder = Decoder(exif_transpose=upright)
        for size in (stored_size, shown):
            assert decoder(stored(RGB, 'PNG', exif=exif(6)), lambda: 'x', size).size == size
        # half a turn fits in both ways, and so does a size that fits in none
        turned = decoder(stored(RGB, 'PNG', exif=exif(3)), lambda: 'x', stored_size)
        assert np.array_equal(turned, np.rot90(RGB, 2) if upright else RGB)
        unknown = decoder(stored(RGB, 'PNG', exif=exif(6)), lambda: 'x', (5, 5))
        assert unknown.size == (shown if upright else stored_size)


def test_what_is_noticed_is_told_once(caplog):
    image, decoder = stored(RGB, 'PNG', exif=exif(6)), Decoder()
    for name in ('one.png', 'two.png'):
        decoder(image, lambda name=name: name)
        decoder(Image.new('F', (2, 2)), lambda name=name: name)
    first, second = (r.getMessage() for r in caplog.records)
    assert first.startswith('image one.png has EXIF orientation 6 and is used as it is stored')
    assert '--exif-transpose' in first
    assert second.startswith('image one.png has grey levels of 32 bits (mode F), read as 0 (black) to 1 (white)')
    caplog.clear()
    Decoder(exif_transpose=True)(image, lambda: 'x')
    Decoder()(stored(RGB, 'PNG', exif=exif(1)), lambda: 'x')
    Decoder()(stored(Image.fromarray(LEVELS), 'PNG'), lambda: 'x')
    assert not caplog.records


def test_other_processes_of_a_launch_are_quiet(caplog, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    Decoder()(stored(RGB, 'PNG', exif=exif(6)), lambda: 'x')
    assert not caplog.records


class _ToFile(logging.Handler):
    def __init__(self, path):
        super().__init__()
        self.path = path

    def emit(self, record):
        with open(self.path, 'a') as f:
            f.write(record.getMessage() + '\n')


def test_loader_workers_tell_it_once_together(tmp_path, monkeypatch):
    split = make_split(tmp_path / 'train')
    for file in split.rglob('*.png'):
        Image.open(file).save(file, exif=exif(8))
    log = _ToFile(tmp_path / 'log')
    monkeypatch.setattr(pixels._logger, 'handlers', [log])
    source = Split('train', open_images(split), labels=np.repeat([0, 1], 6))
    data = ImageData(source, transforms.ToTensor(), Decoder())
    for _ in range(2):
        list(DataLoader(data, batch_size=2, sampler=EvalSampler(12), num_workers=2))
    lines = (tmp_path / 'log').read_text().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f'image {split}') and 'orientation 8' in lines[0]


def test_a_folder_read_by_torchvision_keeps_its_levels_too(tmp_path):
    (tmp_path / 'ant').mkdir()
    Image.fromarray(LEVELS).save(tmp_path / 'ant' / '0.png')
    source = Split('x', open_torch('image_folder', 'train', str(tmp_path), False)[0])
    data = ImageData(source, transforms.PILToTensor(), Decoder('L'))
    assert data[0, None][0][0].tolist() == UPPER


def test_a_decoder_names_itself_for_caches():
    assert (str(Decoder('L')), str(Decoder('L', exif_transpose=True))) == ('L', 'L upright')
    with pytest.raises(RuntimeError, match='inheritance'):  # it is shared with workers, not sent elsewhere
        pickle.dumps(Decoder())
