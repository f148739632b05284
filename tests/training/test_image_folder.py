"""Folders and tars as people have them: classes, what is passed over, types of files, links and names."""
import os
import pickle
import random
import shutil
import tarfile
import unicodedata

import numpy as np
import pytest
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from timm_spinal.errors import UserError
from timm_spinal.training.config import ValidateConfig
from timm_spinal.training.image_files import TarReader, image_suffixes
from timm_spinal.training.image_folder import FolderReader, find_split, hash_split
from timm_spinal.training.splits import create_datasets, describe_splits, folder_split

from .images import make_folder, make_split, quick_config

NFC, NFD = (unicodedata.normalize(form, 'café') for form in ('NFC', 'NFD'))


def save(path, level=0, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (8, 8), (level,) * 3).save(path, **kwargs)


def write(path, content=b''):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def pack(folder, path, name='.'):
    with tarfile.open(path, 'w') as tar:
        tar.add(folder, arcname=name)
    return path


@pytest.fixture(params=['folder', 'tar', 'tar of the folder', 'tar with long paths'])
def opened(request, tmp_path):
    """Opens a split as it is, and packed in several ways."""
    def open_split(root):
        if request.param == 'folder':
            return folder_split(root)
        name = {'tar': '.', 'tar of the folder': 'train', 'tar with long paths': '/home/me/data/train'}[request.param]
        return folder_split(pack(root, tmp_path / 'packed.tar', name))

    return open_split


def refusal(call, *args, **kwargs):
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    assert '\n' not in str(error.value)
    return str(error.value)


# ---- classes ----


def test_classes_and_order_are_those_of_timm_in_a_clean_folder(tmp_path):
    draw = random.Random(0)
    for name in ('n02', 'n1', 'N10', 'Ärger', '7', '10', 'a b', 'x2y10', 'x2y9'):
        for i in range(12):
            suffix = draw.choice(['.png', '.jpg', '.JPEG'])
            write(tmp_path / 's' / name / (draw.choice(['%d', '%04d', 'i%d-b', 'I%dB']) % i + suffix), name.encode())
    theirs, ours = ReaderImageFolder(str(tmp_path / 's')), FolderReader(str(tmp_path / 's'))
    assert ours.samples == theirs.samples and list(ours.class_to_idx.items()) == list(theirs.class_to_idx.items())
    assert ours.filenames() == theirs.filenames() and ours.filenames(basename=True) == theirs.filenames(basename=True)
    path = str(pack(tmp_path / 's', tmp_path / 's.tar', 's'))
    theirs, ours = ReaderImageInTar(path, cache_tarinfo=False), TarReader(path)
    assert ours.filenames() == theirs.filenames() and ours.class_to_idx == theirs.class_name_to_idx
    assert [target for _, target in ours.samples] == theirs.targets.tolist()
    for i in range(0, len(ours), 7):
        assert ours[i][0].read() == theirs[i][0].read() != b''


def test_class_order_does_not_change_from_process_to_process(tmp_path):
    """Names that natural sorting does not tell apart; in a set their order is another in each process."""
    for name in ('1', '01', '001', 'Cat', 'cat'):
        save(tmp_path / name / '0.png')
    assert list(FolderReader(str(tmp_path)).class_to_idx) == ['001', '01', '1', 'Cat', 'cat']


def test_the_class_is_the_first_folder(tmp_path, opened):
    save(tmp_path / 'train' / 'cat' / '1.png')
    save(tmp_path / 'train' / 'cat' / 'dog' / '1.png')
    save(tmp_path / 'train' / 'cat' / 'old' / 'deep' / '1.png')
    save(tmp_path / 'train' / 'dog' / '2.png')
    source = opened(tmp_path / 'train')
    assert source.class_names == ['cat', 'dog'] and source.labels.tolist() == [0, 0, 0, 1]


def test_a_tar_of_one_class_has_that_class(tmp_path):
    save(tmp_path / 'validation' / 'cat' / '1.png')
    for name in ('.', 'validation', 'data/validation'):
        assert folder_split(pack(tmp_path / 'validation', tmp_path / 'v.tar', name)).class_names == ['cat']


def test_tars_within_a_tar_are_classes(tmp_path):
    with tarfile.open(tmp_path / 'train.tar', 'w') as outer:
        for level, name in ((10, 'n01'), (200, 'n02')):
            for i in range(3):
                save(tmp_path / name / f'{name}_{i}.png', level + i)
            outer.add(pack(tmp_path / name, tmp_path / f'{name}.tar'), arcname=f'{name}.tar')
    source = folder_split(tmp_path / 'train.tar')
    assert source.class_names == ['n01', 'n02']
    levels = [(int(np.asarray(image)[0, 0, 0]), label) for image, label in map(source.read, range(6))]
    assert levels == [(10, 0), (11, 0), (12, 0), (200, 1), (201, 1), (202, 1)]


def test_class_maps_keep_what_they_name_and_the_rest_is_counted(tmp_path):
    make_split(tmp_path / 'train', classes=('ant', 'bee', 'wasp'), per_class=2)
    (tmp_path / 'map.txt').write_text('wasp\nant\n')
    source = folder_split(tmp_path / 'train', str(tmp_path / 'map.txt'))
    assert source.class_names == ['wasp', 'ant'] and source.labels.tolist() == [1, 1, 0, 0]
    assert source.passed_over == '2 of classes that the class map has not (2 bee)'
    said = refusal(folder_split, tmp_path / 'train', {'fly': 0})
    assert 'in folders of classes that the class map has' in said and '2 wasp' in said


# ---- what is passed over ----


def test_what_editors_and_systems_leave_behind_makes_no_class(tmp_path, opened):
    root = make_split(tmp_path / 'train', per_class=3)
    for place in ('.ipynb_checkpoints', '.git/objects', 'ant/.ipynb_checkpoints', '@eaDir', 'bee/@eaDir/0.png',
                  '__MACOSX/ant', '$RECYCLE.BIN', 'lost+found', 'System Volume Information'):
        save(root / place / '0.png')
    for place in ('.DS_Store', 'ant/._0.png', 'ant/Thumbs.db', 'desktop.ini', 'notes.txt', 'ant/a.TXT', 'bee/clip.mp4',
                  'bee/README'):
        write(root / place)
    save(root / 'cover.png')
    write(root / 'wasp' / 'w.xyz')
    source = opened(root)
    assert source.class_names == ['ant', 'bee'] and source.labels.tolist() == [0] * 3 + [1] * 3
    for kind in ('5 hidden (2 .ipynb_checkpoints, ', '8 of the operating system (2 @eaDir, ',
                 '5 of other types (2 .txt, ', '1 outside the class folders (cover.png)', '1 without images (wasp)'):
        assert kind in source.passed_over
    assert '\n' not in source.passed_over and len(source.passed_over.split('), ')) == 5
    assert folder_split(make_split(tmp_path / 'clean')).passed_over == ''


def test_the_names_of_splits_are_not_those_of_hidden_folders(tmp_path):
    (tmp_path / '.git').mkdir()
    make_split(tmp_path / 'cats')
    (tmp_path / '__MACOSX').mkdir()
    assert '(it contains cats)' in refusal(create_datasets, quick_config(data_dir=str(tmp_path)))
    shutil.rmtree(tmp_path / 'cats')
    assert 'is empty' in refusal(create_datasets, quick_config(data_dir=str(tmp_path)))


def test_a_split_without_class_folders_says_what_is_there(tmp_path):
    save(tmp_path / 'train' / '1.png')
    write(tmp_path / 'train' / 'a' / '1.HEIC')
    said = refusal(folder_split, tmp_path / 'train')
    assert 'has no images in folders of classes' in said and '1 outside the class folders (1.png)' in said
    assert 'pillow-heif' in said


def test_a_split_that_is_a_file_is_named(tmp_path):
    write(tmp_path / 'train')
    said = refusal(create_datasets, quick_config(data_dir=str(tmp_path)))
    assert f'{tmp_path / "train"}: cannot be read (Not a directory)' in said


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, 'geteuid') else True, reason='everything can be read')
def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    root = make_split(tmp_path / 'train')
    (root / 'bee').chmod(0)
    assert f'{root / "bee"}: cannot be read (Permission denied)' in refusal(folder_split, root)


# ---- types of files ----


def test_every_format_that_pillow_writes_is_read(tmp_path):
    """In small letters and in capitals."""
    before, suffixes = get_img_extensions(), image_suffixes()
    (tmp_path / 'train' / 'a').mkdir(parents=True)
    written = 0
    for suffix, name in Image.registered_extensions().items():
        if suffix in suffixes and name in Image.SAVE:
            for end in (suffix, suffix.upper()):
                path = tmp_path / 'train' / 'a' / f'x{written}{end}'
                assert any(can_save(path, name, mode) for mode in ('RGB', 'L', '1', 'P'))
                written += 1
    source = folder_split(tmp_path / 'train')
    assert len(source) == written > 60 and source.passed_over == ''
    sizes = {source.read(i)[0].size for i in range(written)}
    assert sizes == {(16, 16), (1024, 1024)}  # Pillow makes its own sizes of .icns
    assert {'.bmp', '.webp', '.tif', '.tiff', '.gif', '.jp2', '.ppm', '.jfif', '.mpo', '.psd', '.tga'} <= suffixes
    assert suffixes.isdisjoint({'.eps', '.ps', '.pdf', '.wmf', '.emf', '.h5', '.grib', '.bufr', '.mpg', '.mpeg'})
    assert get_img_extensions() == before


def can_save(path, name, mode):
    try:
        Image.new(mode, (16, 16)).save(path, name)
        return True
    except (OSError, ValueError, KeyError):
        return False


def test_animations_give_their_first_frame(tmp_path):
    frames = [Image.new('RGB', (8, 8), (level,) * 3) for level in (40, 120, 200)]
    for name in ('a.gif', 'b.png', 'c.webp', 'd.tif'):
        (tmp_path / 's' / name[0]).mkdir(parents=True)
        lossless = dict(lossless=True) if name.endswith('webp') else {}
        frames[0].save(tmp_path / 's' / name[0] / name, save_all=True, append_images=frames[1:], **lossless)
    source = folder_split(tmp_path / 's')
    assert [source.read(i)[0].convert('RGB').getpixel((0, 0)) for i in range(4)] == [(40,) * 3] * 4


def test_heif_is_read_where_its_package_is_installed(tmp_path):
    heif = pytest.importorskip('pillow_heif')
    for level in (10, 200):
        (tmp_path / 's' / str(level)).mkdir(parents=True)
        heif.from_pillow(Image.new('RGB', (64, 64), (level,) * 3)).save(tmp_path / 's' / str(level) / 'x.HEIC')
    source = folder_split(tmp_path / 's')
    assert [np.asarray(source.read(i)[0]).mean() for i in range(2)] == pytest.approx([10, 200], abs=1)


def test_input_key_limits_the_suffixes(tmp_path):
    save(tmp_path / 's' / 'a' / '1.png')
    save(tmp_path / 's' / 'a' / '1.bmp')
    assert len(folder_split(tmp_path / 's', '', '.bmp')) == 1 and len(folder_split(tmp_path / 's')) == 2


# ---- links ----


def test_links_are_followed_and_no_folder_is_read_twice(tmp_path):
    root = make_split(tmp_path / 'train', per_class=2)
    save(tmp_path / 'elsewhere' / 'owls' / '0.png', 77)
    (root / 'owl').symlink_to('../elsewhere/owls')
    (root / 'a_owl').symlink_to(root / 'owl')
    (root / 'ant' / 'linked.png').symlink_to('0.png')
    for name, target in (('loop', '..'), ('top', '/'), ('up', tmp_path), ('same', '.')):
        (root / 'ant' / name).symlink_to(target)
    (root / 'antler').symlink_to('ant')
    (root / 'self').symlink_to('self')
    source = folder_split(root)
    assert source.class_names == ['a_owl', 'ant', 'bee'] and source.labels.tolist() == [0, 1, 1, 1, 2, 2]
    assert source.read(0)[0].getpixel((0, 0)) == (77,) * 3
    assert '6 linked a second time (' in source.passed_over and '1 linked to nothing (self)' in source.passed_over


def test_a_link_to_nothing_is_not_lost_without_a_word(tmp_path):
    root = make_split(tmp_path / 'train', per_class=2)
    (root / 'ant' / 'gone.png').symlink_to('nowhere.png')
    os.mkfifo(root / 'ant' / 'pipe.png')
    source = folder_split(root)
    assert len(source) == 5 and source.passed_over == '1 special (pipe.png)'
    with pytest.raises(FileNotFoundError):
        source.read(2)


def test_links_in_a_tar_have_the_content_of_their_targets(tmp_path):
    root = tmp_path / 'train'
    save(root / 'ant' / '0.png', 10)
    save(root / 'bee' / '0.png', 90)
    os.link(root / 'ant' / '0.png', root / 'ant' / '1.png')
    (root / 'bee' / '1.png').symlink_to('../ant/0.png')
    (root / 'bee' / '2.png').symlink_to('1.png')
    (root / 'bee' / '3.png').symlink_to('3.png')
    (root / 'wasp').symlink_to('bee')
    source = folder_split(pack(root, tmp_path / 'train.tar', 'train'))
    levels = [(source.read(i)[0].getpixel((0, 0))[0], source.read(i)[1]) for i in range(len(source))]
    assert levels == [(10, 0), (10, 0), (90, 1), (10, 1), (10, 1)]
    assert source.passed_over == '1 linked to nothing (3.png), 1 linked a second time (wasp)'


# ---- names ----


def test_classes_alike_but_for_their_unicode_form_are_refused(tmp_path, opened):
    for name in (NFC, NFD, 'tea'):
        save(tmp_path / 'train' / name / '0.png')
    if len(list((tmp_path / 'train').iterdir())) < 3:
        pytest.skip('this file system does not tell them apart')
    assert 'differ only in their Unicode form' in refusal(opened, tmp_path / 'train')


def test_unicode_forms_that_differ_between_the_splits_or_from_the_class_map_are_refused(tmp_path):
    for split, name in (('train', NFC), ('validation', NFD)):
        save(tmp_path / split / name / '0.png')
        save(tmp_path / split / 'tea' / '0.png')
    said = refusal(create_datasets, quick_config(data_dir=str(tmp_path)))
    assert 'Unicode form' in said and f'{tmp_path / "validation"}: ' in said
    assert 'Unicode form' in refusal(folder_split, tmp_path / 'train', {NFD: 0, 'tea': 1})


def test_names_that_are_no_text(tmp_path):
    root = make_split(tmp_path / 'train')
    shutil.copy(root / 'ant' / '0.png', os.fsencode(root / 'ant') + b'/caf\xe9.png')
    source = folder_split(root)
    assert len(source) == 13 and len(hash_split(source)) == 64
    shutil.copytree(root / 'ant', root / os.fsdecode(b'caf\xe9'))
    assert 'has a name that is not UTF-8' in refusal(folder_split, root)


# ---- damaged tars ----


def test_bad_tars_are_named(tmp_path):
    pack(make_split(tmp_path / 's'), tmp_path / 'good.tar')
    good = (tmp_path / 'good.tar').read_bytes()
    write(tmp_path / 'short.tar', good[:len(good) // 2 - 100])
    with tarfile.open(tmp_path / 'packed.tar', 'w:gz') as tar:
        tar.add(tmp_path / 's', arcname='s')
    write(tmp_path / 'inner' / 'ant' / 'x.tar', b'x' * 1000)
    pack(tmp_path / 'inner', tmp_path / 'nested.tar')
    for name in ('short', 'packed', 'nested'):
        assert f'{name}.tar: is not a tar file that can be read' in refusal(folder_split, tmp_path / f'{name}.tar')
    source = folder_split(tmp_path / 'good.tar')
    write(tmp_path / 'good.tar', good[:2000])
    with pytest.raises(OSError, match='ends within'):
        source.read(len(source) - 1)


def test_readers_survive_another_process(tmp_path):
    root = make_split(tmp_path / 's')
    for path in (root, pack(root, tmp_path / 's.tar')):
        source = folder_split(path)
        copied = pickle.loads(pickle.dumps(source))
        assert np.array_equal(copied.read(7)[0], source.read(7)[0]) and copied.describe(7) == source.describe(7)
        assert copied.describe(7).startswith(str(path)) and copied.describe(7).endswith('bee/1.png')


# ---- one folder by several names ----


def test_names_of_one_folder_give_the_same_data(tmp_path, monkeypatch):
    root = make_folder(tmp_path / 'data')
    (tmp_path / 'x').mkdir()
    (tmp_path / 'link').symlink_to('data')
    pack(root / 'train', tmp_path / 'data' / 'extra.tar')
    names = [str(root), 'data', './x/../data', 'link', f'{root}/']
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for split in ('train', 'extra'):
        hashes = {hash_split(create_datasets(ValidateConfig(data_dir=name, val_split=split), train=False).eval)
                  for name in [*names, '~/data']}
        assert len(hashes) == 1
    monkeypatch.chdir(root)
    for split in ('train', 'extra'):
        config = ValidateConfig(data_dir='.', val_split=split)
        found = hash_split(create_datasets(config, train=False).eval)
        config.data_dir = str(root)
        assert found == hash_split(create_datasets(config, train=False).eval)


# ---- what is said at the start ----


def test_table_of_splits(tmp_path):
    make_split(tmp_path / 'train', per_class=3)
    make_split(tmp_path / 'train', classes=('a class with a name that is far too long for a table',), per_class=1)
    make_split(tmp_path / 'validation', classes=('bee',), per_class=2)
    write(tmp_path / 'train' / 'ant' / 'x.txt')
    config = quick_config(data_dir=str(tmp_path))
    assert describe_splits(create_datasets(config).named(config)).splitlines() == [
        'split       images  classes  smallest class                      largest class',
        'train            7        3  a class with a name that is... (1)  bee (3)',
        'validation       2        1  a class with a name that is... (0)  bee (2)',
        f'{tmp_path / "train"}: skipped 1 of other types (.txt)',
    ]
    config = quick_config(data_dir=str(tmp_path / 'train'), val_split_fraction=0.4)
    (tmp_path / 'train' / 'ant' / 'x.txt').unlink()
    lines = describe_splits(create_datasets(config).named(config)).splitlines()
    assert [line.split('  ')[0] for line in lines] == ['split', 'train', 'part of train']


def test_one_class_is_refused_in_training_only(tmp_path):
    for split in ('train', 'validation'):
        make_split(tmp_path / split / 'flowers')
    said = refusal(create_datasets, quick_config(data_dir=str(tmp_path)))
    assert 'all 12 images are of the class flowers, but training needs two classes' in said and '--train-split' in said
    config = quick_config(data_dir=str(tmp_path), train_split='train/flowers', val_split='validation/flowers')
    assert create_datasets(config).class_names == ['ant', 'bee']
    alone = create_datasets(ValidateConfig(data_dir=str(tmp_path)), train=False)
    assert alone.class_names == ['flowers'] and len(alone.eval) == 12


def test_a_folder_one_above_the_splits_is_found(tmp_path):
    for split in ('train', 'validation'):
        (tmp_path / 'images' / split / 'cat').mkdir(parents=True)
    with pytest.raises(UserError, match=f"no split 'validation' in it .*; did you mean {tmp_path / 'images'}"):
        find_split(str(tmp_path), 'validation')
