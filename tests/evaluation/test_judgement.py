"""Counts by hand and by scikit-learn, pictures that can be looked at, and a report that nothing in a name can break."""
import csv
import re

import numpy as np
import pytest
from PIL import Image

from timm_spinal.evaluation.figures import draw_confusion, draw_sheet
from timm_spinal.evaluation.judgement import draw_mistakes, named_classes, write_report
from timm_spinal.evaluation.mistakes import Confusion, Pair, per_class, worst

TARGET = np.array([0, 0, 0, 1, 1, 2, 2, 2])
SAID = np.array([0, 1, 1, 1, 0, 2, 2, 1])
BAD_NAMES = ['<script>alert(1)</script>', '$x^{$', '=HYPERLINK("a")']


def kept(n=8, classes=3):
    rng = np.random.default_rng(0)
    target = TARGET if n == 8 else rng.integers(0, classes, n)
    said = SAID if n == 8 else np.where(rng.random(n) < 0.7, target, rng.integers(0, classes, n))
    return dict(prediction=said, target=target, confidence=rng.random(n).astype(np.float32),
                loss=np.arange(n).astype(np.float32), place=np.arange(n),
                file=np.asarray([f'<b>/{i}.png' for i in range(n)]))


def picture(place):
    return Image.new('RGB', (40 + place, 30), (10 * place, 100, 50))


def test_confusion_by_hand():
    confusion = Confusion(SAID, TARGET, 4)
    assert confusion.matrix().tolist() == [[1, 2, 0, 0], [1, 1, 0, 0], [0, 1, 2, 0], [0, 0, 0, 0]]
    assert confusion.pairs() == [Pair(0, 1, 2, 3), Pair(1, 0, 1, 2), Pair(2, 1, 1, 3)]
    assert confusion.rows('abcd')[0] == {'class': 'a', 'a': 1, 'b': 2, 'c': 0, 'd': 0}
    assert confusion.rows('abcd')[3] == {'class': 'd', 'a': 0, 'b': 0, 'c': 0, 'd': 0}


def test_confusion_of_many_classes_keeps_what_occurs():
    confusion = Confusion(np.array([20_000, 5, 5]), np.array([20_000, 7, 7]), 21_841)
    names = named_classes(None, 21_841)
    assert confusion.rows(names) == [{'class': '7', 'prediction': '5', 'images': 2},
                                     {'class': '20000', 'prediction': '20000', 'images': 1}]
    assert confusion.pairs() == [Pair(7, 5, 2, 2)]


def test_precision_and_recall_by_hand():
    pytest.importorskip('sklearn')
    a, b, c, d = per_class(SAID, TARGET, 'abcd')
    assert a == {'class': 'a', 'precision': 0.5, 'recall': pytest.approx(1 / 3), 'f1': pytest.approx(0.4), 'support': 3}
    assert (b['precision'], b['recall'], b['support']) == (0.25, 0.5, 2)
    assert (c['precision'], c['recall'], c['support']) == (1., pytest.approx(2 / 3), 3)
    assert (d['precision'], d['recall'], d['support']) == (None, None, 0)


def test_worst_are_the_greatest_losses():
    assert worst(np.array([1., np.nan, 3., 2., np.inf]), 4).tolist() == [1, 4, 2, 3]


@pytest.mark.parametrize('classes, least', [(2, 400), (10, 800), (100, 2500), (101, 600)])
def test_confusion_has_room_for_its_classes(classes, least, tmp_path):
    columns = kept(40 * classes, classes)
    names = [f'a rather long name of class {i}' for i in range(classes)]
    draw_confusion(tmp_path / 'c.png', Confusion(columns['prediction'], columns['target'], classes), names)
    with Image.open(tmp_path / 'c.png') as image:
        assert least < min(image.size) and max(image.size) < 4000
        assert np.asarray(image.convert('L')).std() > 20


def test_sheet_holds_every_image(tmp_path):
    draw_sheet(tmp_path / 's.png', [Image.new('RGB', (30, 60), c) for c in ('red', 'lime', 'blue')], ['a\nb', 'c', 'ü'])
    pixels = np.asarray(Image.open(tmp_path / 's.png')).reshape(-1, 3)
    for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255)):
        assert (pixels == colour).all(1).sum() == pytest.approx(110 * 220, rel=0.05)


def test_report(tmp_path):
    pytest.importorskip('sklearn')
    write_report(tmp_path / 'out', '<i>run</i>', {'top-1': '50 %'}, kept(), BAD_NAMES, picture)
    page = (tmp_path / 'out' / 'report.html').read_text()
    assert '<script>' not in page and '<i>' not in page and '<b>/' not in page
    assert '&lt;script&gt;alert(1)&lt;/script&gt;' in page
    assert set(re.findall(r'(?:src|href)="([^"]{5})', page)) == {'data:'}
    assert 'http:' not in page and 'https' not in page
    assert page.count('data:image/jpeg') == 8 and page.count('data:image/png') == 2
    assert page.index('loss 7.00') < page.index('loss 6.00') < page.index('loss 0.00')
    assert {p.name for p in (tmp_path / 'out').iterdir()} == {
        'report.html', 'confusion.png', 'confusion.csv', 'worst.png', 'per_class.csv', 'predictions.csv',
        'calibration.png'}
    rows = list(csv.reader((tmp_path / 'out' / 'per_class.csv').open()))
    assert rows[0] == ['class', 'precision', 'recall', 'f1', 'support']
    assert rows[3][0] == '\'=HYPERLINK("a")' and rows[1][1] == '0.5'
    rows = list(csv.DictReader((tmp_path / 'out' / 'predictions.csv').open()))
    assert rows[7]['file'] == '<b>/7.png' and rows[7]['target'].startswith("'=") and float(rows[7]['loss']) == 7
    matrix = list(csv.reader((tmp_path / 'out' / 'confusion.csv').open()))
    assert [row[1:] for row in matrix[1:]] == [['1', '2', '0'], ['1', '1', '0'], ['0', '1', '2']]


def test_without_images_to_read(tmp_path):
    assert draw_mistakes(tmp_path, kept(), BAD_NAMES, None) == [tmp_path / 'confusion.png']

    def gone(place):
        raise OSError('gone')

    assert draw_mistakes(tmp_path, kept(), BAD_NAMES, gone) == [tmp_path / 'confusion.png']
    assert [p.name for p in draw_mistakes(tmp_path, kept(), BAD_NAMES, picture)] == ['confusion.png', 'worst.png']
