"""How two sides are measured."""
from functools import partial

import pytest

from timm_spinal.bench.layers import routing_call
from timm_spinal.bench.runner import Pair, Setting, Side, measure, paired_ratio, peak_memory, run, seconds_in_turns

FAST = Setting(rounds=5, warmup=1)


class Counter:
    """Sides that note who was called."""

    def __init__(self):
        self.calls = []

    def side(self, name, work):
        def call():
            self.calls.append(name)
            return sum(range(work))

        return call


def test_the_sides_take_turns_in_being_first():
    counter = Counter()
    times = seconds_in_turns(counter.side('a', 1), counter.side('b', 1), Setting(rounds=4, warmup=1))
    assert ''.join(counter.calls) == 'baabbaabba' and [len(side) for side in times] == [4, 4]


def test_ratio_is_the_median_of_paired_ratios():
    ratio = paired_ratio([1., 4., 9.], [1., 2., 3.])
    assert (ratio.median, ratio.min, ratio.max, ratio.rounds) == (2., 1., 3., 3)
    assert str(ratio) == '2.000 (1.000 to 3.000, 3 rounds)'


@pytest.mark.parametrize('sides', [([], []), ([1.], [1., 2.])])
def test_sides_of_different_length_have_no_ratio(sides):
    with pytest.raises(ValueError, match='rounds of both sides'):
        paired_ratio(*sides)


def slow(setting, work):
    return partial(sum, range(work * setting.batch_size))


def test_ratio_is_what_over_against(capsys):
    """Twenty times the work takes longer, whichever side it is on; the line keeps the order of the sides."""
    much, little = Side('much', slow, (200_000,)), Side('little', slow, (10_000,))
    ratio, what, against = measure(Pair(much, little, ''), FAST)
    assert ratio.median > 3. and what > 3. * against
    assert measure(Pair(little, much, ''), FAST)[0].median < 1 / 3
    run([Pair(much, little, 'sums', lambda setting: f'{setting.batch_size} sums')], FAST)
    head, note, line = capsys.readouterr().out.splitlines()
    assert note == '8 sums' and line.startswith('much / little, sums: ') and 'batch 8' in head
    assert float(line.split(': ')[1].split()[0]) > 3.


@pytest.mark.slow
def test_peak_memory_is_that_of_one_call():
    """Whole routing keeps predictions of 50 MiB, lean routing does not."""
    setting = Setting(batch_size=64)
    whole, lean = (peak_memory(Side('', routing_call, ('caps', 100, memory, False)), setting)
                   for memory in ('whole', 'lean'))
    predictions = 64 * 128 * 100 * 16 * 4 / 2 ** 20
    assert whole > predictions and lean < 0.8 * whole
