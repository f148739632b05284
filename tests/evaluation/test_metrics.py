import pytest
import torch

from timm_spinal.errors import UserError
from timm_spinal.evaluation.metrics import (
    PairEvaluator,
    SameAnswer,
    accuracies,
    choosing_metric,
    main_accuracy,
    same_answer_warning,
)


def two_hot(*pairs, classes=5):
    return torch.stack([torch.zeros(classes).index_fill(0, torch.tensor(pair), 1.) for pair in pairs])


def test_by_hand():
    # both right, only the smaller, only the larger, none
    scores = torch.tensor([
        [3., 9., 1., 8., 0.],
        [3., 9., 1., 8., 7.],
        [9., 0., 1., 8., 0.],
        [0., 7., 8., 0., 1.],
    ])
    target = two_hot((1, 3), (1, 4), (2, 3), (0, 4))
    evaluator = PairEvaluator()
    evaluator.update(scores[:3], target[:3])
    evaluator.update(scores[3:], target[3:])
    found = evaluator.compute()
    assert (found['exact'], found['digit'], found['top2']) == (25., 50., 50.)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(scores, target).item()
    assert found['loss'] == pytest.approx(expected) and evaluator.num_samples == 4


def test_against_sets_on_random_scores():
    torch.manual_seed(0)
    scores = torch.rand(200, 10)
    classes = torch.stack([torch.randperm(10)[:2] for _ in range(200)])
    evaluator = PairEvaluator()
    evaluator.update(scores, two_hot(*classes.tolist(), classes=10))
    hits = [len({*s.tolist()} & {*c.tolist()}) for s, c in zip(scores.topk(2).indices, classes)]
    smaller = [c.min() in s for s, c in zip(scores.topk(2).indices, classes)]
    found = evaluator.compute()
    assert found['exact'] == pytest.approx(100 * hits.count(2) / 200)
    assert found['digit'] == pytest.approx(100 * sum(hits) / 400)
    assert found['top2'] == pytest.approx(100 * sum(smaller) / 200)


def test_which_metric_chooses():
    assert accuracies(False) == ('top1', 'top5') and accuracies(True) == ('exact', 'digit', 'top2')
    assert choosing_metric('top1', False) == 'top1' and choosing_metric('top1', True) == 'exact'
    assert [choosing_metric(name, True) for name in ('loss', 'digit', 'top2')] == ['loss', 'digit', 'top2']
    with pytest.raises(UserError, match='--eval-metric digit: .* one class; use loss, top1, top5'):
        choosing_metric('digit', False)
    with pytest.raises(UserError, match='two classes; use loss, exact, digit, top2'):
        choosing_metric('top5', True)


def test_main_accuracy():
    assert main_accuracy(['epoch', 'eval_digit', 'eval_exact'], 'eval_') == 'exact'
    assert main_accuracy(['top1', 'top5']) == main_accuracy([]) == 'top1'


@pytest.mark.parametrize('scores, targets, expected', [
    ([[1., 3., 2.], [0., 9., 8.], [-1., 0., -2.]], [0, 1, 2], [1]),
    ([[1., 3., 2.], [0., 9., 8.], [1., 0., -2.]], [0, 1, 2], None),
    ([[1., 3., 2.], [0., 9., 8.]], [1, 1], None),  # they may all be right
    ([[0., 0., 0.], [0., 0., 0.]], [0, 2], [0]),  # no score at all, as of capsules that are all switched off
])
def test_same_answer(scores, targets, expected):
    found = SameAnswer()
    for start in (0, 1):  # in two batches
        part = slice(start, None) if start else slice(0, 1)
        found.update(torch.tensor(scores)[part], torch.tensor(targets)[part])
        found.update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    answer = found.compute()
    assert answer is None if expected is None else len(answer) == 1
    if expected == [1]:
        assert answer == [1]


def test_same_answer_of_pairs():
    found = SameAnswer(classes=2)
    found.update(torch.tensor([[9., 1., 8.], [3., 0., 5.]]), two_hot((0, 1), (1, 2), classes=3))
    assert found.compute() == [0, 2]
    found.update(torch.tensor([[9., 8., 1.]]), two_hot((0, 1), classes=3))
    assert found.compute() is None


def test_same_answer_is_named():
    assert same_answer_warning('it', None, ['a', 'b']) == []
    (line,) = same_answer_warning('it', [1], ['a', 'b'])
    assert line.startswith('warning: it answers b for every image, so it tells no classes apart; ')
    assert 'answers class 0 and class 2 for' in same_answer_warning('it', [0, 2], None)[0]
