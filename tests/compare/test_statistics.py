import numpy as np
import pytest
from scipy import stats

from timm_spinal.compare.statistics import differences, estimate, sampling_error


def test_interval_of_three_values_by_hand():
    # mean 2, standard deviation 1, t(0.975, 2) = 4.302653
    found = estimate([1., 2., 3.])
    assert found.mean == 2. and found.seeds == 3
    assert found.half == pytest.approx(4.302653 / np.sqrt(3), rel=1e-6)
    assert (found.low, found.high) == pytest.approx((2 - found.half, 2 + found.half))


@pytest.mark.parametrize('values', [[90.], [89., 91.], [90., 90., 90.]])
def test_no_interval_without_spread_or_of_fewer_than_three(values):
    found = estimate(values)
    assert found.mean == 90. and found.low is None and found.half is None and found.seeds == len(values)


def test_no_values_are_refused():
    with pytest.raises(ValueError, match='at least one'):
        estimate([])


def test_paired_difference_by_hand():
    values = {'a': {0: 91., 1: 93., 2: 95.}, 'c': {0: 90., 1: 91., 2: 92.}}
    gap, = differences([('a', 'c')], values)
    # differences 1, 2, 3: the interval above around 2, t = 2 / (1 / sqrt 3)
    assert gap.estimate.low == pytest.approx(2 - 4.302653 / np.sqrt(3), rel=1e-6)
    assert gap.p == pytest.approx(2 * stats.t.sf(2 * np.sqrt(3), 2))
    assert gap.verdict == 'open'


def test_differences_are_paired_over_common_seeds_only():
    values = {'a': {0: 91., 2: 95., 7: 10.}, 'c': {0: 90., 1: 50., 2: 92.}}
    gap, = differences([('a', 'c')], values)
    assert gap.estimate.mean == 2. and gap.estimate.seeds == 2
    assert differences([('a', 'c')], {'a': {0: 1.}, 'c': {1: 1.}}) == []


def test_more_comparisons_widen_the_intervals_and_raise_p():
    values = {'c': {0: 90., 1: 91., 2: 92.}, 'a': {0: 91., 1: 93., 2: 95.}, 'b': {0: 90.5, 1: 90.9, 2: 92.1}}
    one, = differences([('a', 'c')], values)
    two, other = differences([('a', 'c'), ('b', 'c')], values)
    # Bonferroni: level 1 - 0.05 / 2
    assert two.estimate.half / one.estimate.half == pytest.approx(stats.t.ppf(0.9875, 2) / stats.t.ppf(0.975, 2))
    raw = [stats.ttest_rel([values[v][s] for s in range(3)], [90., 91., 92.]).pvalue for v in 'ab']
    # Benjamini and Hochberg of two: the smaller is doubled, at most the larger
    assert two.p == pytest.approx(min(2 * min(raw), max(raw)))
    assert other.p == pytest.approx(max(raw))


def test_variants_without_an_interval_do_not_widen_those_of_others():
    values = {'c': {0: 90., 1: 91., 2: 92.}, 'a': {0: 91., 1: 93., 2: 95.}, 'two': {0: 91., 1: 93.}, 'other': {7: 91.},
              'same': {0: 91., 1: 92., 2: 93.}}
    one, = differences([('a', 'c')], values)
    among = differences([(v, 'c') for v in ('a', 'failed', 'two', 'other', 'same')], values)
    assert [gap.variant for gap in among] == ['a', 'two', 'same']
    assert among[0] == one and [gap.verdict for gap in among[1:]] == ['unknown', 'unknown']


@pytest.mark.parametrize('shift, verdict', [(5., 'above'), (-5., 'below'), (0., 'open')])
def test_verdicts(shift, verdict):
    values = {'c': {s: 90. + 0.1 * s for s in range(5)}, 'a': {s: 90. + shift + 0.2 * (s % 2) for s in range(5)}}
    assert differences([('a', 'c')], values)[0].verdict == verdict


def test_one_seed_has_no_verdict():
    gap, = differences([('a', 'c')], {'a': {0: 91.}, 'c': {0: 90.}})
    assert gap.verdict == 'unknown' and gap.p is None and gap.estimate.mean == 1.


def test_sampling_error_is_the_binomial_one():
    assert sampling_error(90., 10_000) == pytest.approx(0.3)
    assert sampling_error(100., 10) == 0.
