from timm_spinal.compare.findings import count_text, findings
from timm_spinal.compare.runs import Comparison, RunResult, values_by_variant
from timm_spinal.compare.statistics import differences


def found(tops, kind='frozen', metric='test_top1', sized_as=None, params=None, failed=(), val=None, **kwargs):
    """Sentences on made accuracies: {variant: [one for each seed]}."""
    seeds = list(range(max(map(len, tops.values()))))
    comparison = Comparison(
        kind, 'cmd', list(tops), 'linear', seeds, sized_as=sized_as or {}, data=dict(test_size=10_000), **kwargs)
    val = val or {}
    rows = [RunResult(v, s, 'done', test_top1=top, val_top1=val[v][s] if v in val else top,
                      params=(params or {}).get(v))
            for v, by_seed in tops.items() for s, top in enumerate(by_seed)]
    rows += [RunResult(v, s, 'failed', error=e) for v, s, e in failed]
    values = values_by_variant(rows, metric)
    pairs = comparison.pairs(comparison.strongest(rows, metric))
    return findings(comparison, rows, values, differences(pairs, values), metric)


LINEAR = [90.0, 90.2, 90.1, 89.9, 90.0]


def test_no_head_beats_the_control():
    sentences = found({'linear': LINEAR, 'spinal': [90.1, 90.0, 90.3, 89.7, 90.1]})
    assert sentences[0] == 'No head beats `linear` by more than its interval.'
    assert sentences[1].startswith('Undecided against `linear`: `spinal` (0.00 points (interval -0.')


def test_a_head_that_beats_the_control_is_named_with_its_interval():
    sentences = found({'linear': LINEAR, 'spinal': [91.0, 91.3, 91.1, 90.8, 91.1]})
    assert sentences[0].startswith('`spinal` beats `linear` by 1.02 points (interval 0.')
    assert not any('No head' in s for s in sentences)


def test_a_head_that_is_worse_is_named():
    sentences = found({'linear': LINEAR, 'pspinal': [88.0, 88.3, 88.0, 87.8, 88.1]})
    assert sentences[0] == 'No head beats `linear` by more than its interval.'
    assert sentences[1].startswith('`pspinal` is worse than `linear` by 2.00 points (interval 1.')


def test_equal_size_controls_are_compared_with_their_head():
    sentences = found(
        {'linear': LINEAR, 'spinal': [91.0, 91.3, 91.1, 90.8, 91.1], 'mlp=spinal': [92.0, 92.4, 92.1, 91.8, 92.2]},
        sized_as={'mlp=spinal': 'spinal'})
    assert any(s.startswith('`spinal` is worse than `mlp=spinal`, an MLP of its size, by 1.04 points (interval 0.')
               for s in sentences)


def test_every_head_is_compared_with_the_strongest_control_too():
    tops = {'linear': LINEAR, 'ridge': [91.] * 5, 'knn': [95.] * 5, 'spinal': [90.5, 90.7, 90.6, 90.4, 90.3]}
    # chosen by the validation split, on which knn is worse than on the test split
    sentences = found(tops, controls=['linear', 'ridge', 'knn'], val={'knn': [80.] * 5})
    assert 'The strongest control on the validation split is `ridge` (the others: `linear`, `knn`).' in sentences
    assert any(s.startswith('`spinal` beats `linear` by 0.46 points') for s in sentences)
    assert any(s.startswith('`spinal` is worse than `ridge` by 0.50 points') for s in sentences)
    assert '`knn` has +4.00 points against `ridge` and no interval: the seeds do not differ.' in sentences
    assert not any('`linear` is worse than `ridge`' in s for s in sentences)  # `ridge` beats `linear` says it


def test_intervals_are_corrected_for_the_comparisons_with_the_strongest_control():
    tops = {'linear': LINEAR, 'mlp': [91., 91.2, 91.3, 90.9, 91.1], 'spinal': [90.5, 90.7, 90.6, 90.4, 90.3]}
    alone, both = (next(s for s in found(tops, controls=c) if s.startswith(('`spinal` beats', 'Undecided')))
                   for c in ([], ['linear', 'mlp']))
    assert alone != both  # three intervals and no longer two


def test_a_control_that_is_the_strongest_already_is_compared_once():
    sentences = found({'linear': LINEAR, 'ridge': [80.] * 5, 'spinal': LINEAR[::-1]}, controls=['linear', 'ridge'])
    assert 'The strongest control on the validation split is `linear` (the others: `ridge`).' in sentences
    assert sum('Undecided against' in s for s in sentences) == 1


def test_cost_in_parameters():
    sentences = found(
        {'linear': LINEAR, 'pspinal': LINEAR[::-1], 'spinal': LINEAR[::-1]},
        params={'linear': 12_810, 'pspinal': 153_720, 'spinal': 15_372})
    assert 'Against `linear` (12.8 k parameters of the head) the cost in parameters is: `pspinal` 12x, `spinal` ' \
           '1.20x.' in sentences


def test_network_time():
    costs = {'linear': dict(params=1, network_ms=10.), 'pspinal': dict(params=2, network_ms=10.5)}
    sentences = found({'linear': LINEAR, 'pspinal': LINEAR[::-1]}, costs=costs)
    assert 'One image through the whole network takes 10.0 ms with `linear`; with the others: `pspinal` 1.05x.' \
        in sentences


def test_one_seed_says_that_there_is_no_interval():
    sentences = found({'linear': [90.], 'spinal': [95.]})
    assert sentences[0] == 'Fewer than 3 seeds, so there is no interval and no verdict: the differences may be chance.'
    assert sentences[1] == '`spinal` is +5.00 points against `linear`.'
    assert not any('beats' in s for s in sentences)


def test_two_seeds_have_no_interval_and_it_is_said():
    sentences = found({'linear': [90., 90.1], 'spinal': [95., 95.2]})
    assert sentences[0] == 'Fewer than 3 seeds, so there is no interval and no verdict: the differences may be chance.'
    sentences = found({'linear': LINEAR, 'spinal': LINEAR[::-1], 'caps': [95., 95.2]})
    assert '`caps` has +5.00 points against `linear` and no interval: 2 seeds in common, and it takes 3.' in sentences
    assert not any('`caps` beats' in s for s in sentences)


def test_failures_are_told_and_left_out():
    sentences = found({'linear': LINEAR, 'spinal': LINEAR[::-1]}, failed=[('spinal', 9, 'loss is nan')])
    assert sentences[-1] == '1 of 11 runs are not in these numbers: `spinal` seed 9 failed (loss is nan).'


def test_runs_without_test_split_are_told():
    sentences = found({'linear': LINEAR, 'spinal': LINEAR[::-1]}, metric='val_top1')
    assert any('have read no test split' in s for s in sentences)


def test_sampling_error_of_the_test_split():
    assert any('10,000 images' in s and 'about 0.30 points' in s for s in found({'linear': LINEAR, 'a': LINEAR[::-1]}))


def test_nothing_finished():
    sentences = found({'linear': []}, failed=[('linear', 0, 'disk full')])
    assert sentences[0].startswith('No run has finished')


def test_counts_as_people_write_them():
    assert [count_text(n) for n in (12, 12_810, 1_310_000, 2e9)] == ['12', '12.8 k', '1.31 M', '2 G']
