"""AP against numbers worked out by hand."""
import sys
from pathlib import Path

import numpy as np
import pytest

from timm_spinal.detection.annotations import Annotated
from timm_spinal.detection.coco_metrics import Detections, average_precision, check_installed
from timm_spinal.errors import UserError


def image(boxes, labels, crowd=None):
    boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    crowd = np.array(crowd or [False] * len(labels), dtype=bool)
    return Annotated(Path('x'), 200, 200, boxes, np.array(labels, dtype=np.int64), crowd, area)


def found(boxes, labels, scores):
    return Detections(np.array(boxes, dtype=np.float32).reshape(-1, 4), np.array(labels), np.array(scores))


SMALL, MEDIUM, LARGE = [10, 10, 30, 30], [50, 50, 100, 100], [60, 60, 160, 160]


def test_everything_found_is_100_percent():
    images = [image([SMALL, MEDIUM], [1, 2]), image([LARGE], [2]), image([], [])]
    perfect = {i: found(x.boxes, x.labels, [0.9] * len(x.labels)) for i, x in enumerate(images)}
    assert average_precision(images, perfect, 2) == pytest.approx(
        dict(ap=100., ap50=100., ap75=100., ap_small=100., ap_medium=100., ap_large=100.))


def test_half_found():
    """Precision 1 up to recall 0.5: 51 of COCO's 101 points of recall. Nothing is large."""
    images = [image([SMALL], [1]), image([MEDIUM], [1])]
    half = {0: found([SMALL], [1], [0.9]), 1: found([], [], [])}
    measured = average_precision(images, half, 1)
    assert measured['ap'] == measured['ap50'] == pytest.approx(100 * 51 / 101)
    assert measured['ap_small'] == pytest.approx(100.)
    assert measured['ap_medium'] == 0. and measured['ap_large'] is None


def test_overlap_decides():
    """IoU 0.8: right at the thresholds 0.5 to 0.8, seven of ten."""
    loose = {0: found([[0, 0, 100, 80]], [1], [0.9])}
    measured = average_precision([image([[0, 0, 100, 100]], [1])], loose, 1)
    assert measured['ap'] == pytest.approx(70.)
    assert measured['ap50'] == measured['ap75'] == pytest.approx(100.)


def test_wrong_class_and_false_alarms():
    """A false box with a higher score halves precision; a box of another class is no match."""
    images = [image([SMALL], [1])]
    alarm = {0: found([LARGE, SMALL], [1, 1], [0.9, 0.8])}
    assert average_precision(images, alarm, 2)['ap'] == pytest.approx(50.)
    assert average_precision(images, {0: found([SMALL], [2], [0.9])}, 2)['ap'] == 0.


def test_crowds_are_neither_right_nor_wrong():
    images = [image([SMALL, LARGE], [1, 1], [False, True])]
    both = {0: found([LARGE, SMALL], [1, 1], [0.9, 0.8])}
    assert average_precision(images, both, 1)['ap'] == pytest.approx(100.)


def test_nothing_found():
    nothing = {0: found([], [], [])}
    assert average_precision([image([SMALL], [1])], nothing, 1) == dict(
        ap=0., ap50=0., ap75=0., ap_small=0., ap_medium=None, ap_large=None)


def test_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pycocotools', None)
    with pytest.raises(UserError, match=r"pip install 'timm-spinal\[detection\]'"):
        check_installed()
