import time

import pytest

from timm_spinal.bench.timing import paired_ratio, paired_times


def test_sides_take_turns_and_alternate_first_place():
    calls = []
    a, b = paired_times(lambda: calls.append('a'), lambda: calls.append('b'), rounds=3, warmup=1)
    assert ''.join(calls) == 'ba' + 'ab' + 'ba' + 'ab'
    assert len(a) == len(b) == 3


def test_times_belong_to_their_side():
    a, b = paired_times(lambda: time.sleep(0.02), lambda: None, rounds=4, warmup=0)
    assert min(a) >= 0.02 > max(b)


def test_ratio_is_the_median_of_pairs():
    ratio = paired_ratio([2., 30., 9.], [1., 10., 10.])
    assert (ratio.median, ratio.min, ratio.max, ratio.rounds) == (2., 0.9, 3., 3)
    assert str(ratio) == '2.000 (min 0.900, max 3.000, 3 rounds)'


@pytest.mark.parametrize('sides', [([], []), ([1.], [1., 2.])])
def test_unpaired_times_are_refused(sides):
    with pytest.raises(ValueError, match='Paired ratios need'):
        paired_ratio(*sides)
