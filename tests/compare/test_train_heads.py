import threading
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from timm_spinal.compare.controls import new_head, new_heads, parse_variants
from timm_spinal.compare.train_head import Features, Recipe, train_head
from timm_spinal.compare.train_heads import HeadTask, one_core_each, predict
from timm_spinal.compare.train_heads import train_heads as train_tasks
from timm_spinal.errors import UserError


def train_heads(new_heads, seeds, train, validation, recipe):
    """One head, its seeds in their order."""
    results = [trained for _, trained in train_tasks([HeadTask(new_heads, seeds, train, validation, recipe)])]
    return sorted(results, key=lambda trained: seeds.index(trained.seed))


def digits(passes=1):
    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32)[None], torch.tensor(data.target)
    train = Features(x[:, :600].repeat(passes, 1, 1), y[:600])
    return train, Features(x[:, 600:900], y[600:900]), Features(x[:, 900:], y[900:])


def maker(text='spinal:width=12'):
    return partial(new_heads, parse_variants(text)[0], 64, 10)


RECIPE = Recipe(epochs=4, batch_size=50, lr=0.01)


@pytest.mark.parametrize('text', ['spinal:width=12', 'spinal:width=64', 'pspinal:width=8'])
def test_seeds_side_by_side_are_those_that_train_alone(text):
    train, validation, _ = digits()
    recipe = Recipe(epochs=2, batch_size=50, lr=0.05, opt='sgd')
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        three = train_heads(maker(text), [0, 4, 7], train, validation, recipe)  # two cores
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    for trained in three:
        assert all(value.is_contiguous() for value in trained.state.values())
        alone = train_head(maker(text)([trained.seed])[0], trained.seed, train, validation, recipe)
        for ours, theirs in zip(trained.history, alone.history):
            assert ours['train_loss'] == pytest.approx(theirs['train_loss'], rel=1e-4)
            assert ours['eval_loss'] == pytest.approx(theirs['eval_loss'], rel=1e-4)
    assert three[0].history != three[1].history


def test_heads_that_draw_from_the_global_generator_train_alone():
    """Threads share that generator: side by side, a seed would depend on its neighbour."""
    train, validation, _ = digits()

    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(nn.functional.dropout(x, 0.5, self.training))

    def heads(seeds):
        torch.manual_seed(0)
        return [Noisy(64, 10) for _ in seeds]

    two = train_heads(heads, [3, 5], train, validation, RECIPE)
    alone = train_heads(heads, [3], train, validation, RECIPE)[0]
    assert two[0].history == alone.history
    assert two[0].history != two[1].history


def test_heads_learn_digits_and_the_best_epoch_is_kept():
    train, validation, test = digits()
    recipe = Recipe(epochs=20, batch_size=50, lr=0.01)
    results = train_heads(maker('spinal:width=12:dropout=0.1'), [0, 1], train, validation, recipe)
    for result in results:
        tops = [row['eval_top1'] for row in result.history]
        assert result.best['top1'] == max(tops) == tops[result.best_epoch]
        assert result.best_epoch == tops.index(max(tops))
        head = new_head(parse_variants('spinal:width=12:dropout=0.1')[0], 64, 10)
        again = predict(head, result.state, validation).argmax(1)
        assert 100 * (again == validation.y).double().mean().item() == pytest.approx(result.best['top1'], abs=0.4)
        assert (predict(head, result.state, test).argmax(1) == test.y).double().mean() > 0.85


def test_results_are_reproducible_and_leave_the_global_stream_alone():
    train, validation, _ = digits()
    torch.manual_seed(1)
    first = train_heads(maker(), [2], train, validation, RECIPE)[0]
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.rand(1) == drawn
    again = train_heads(maker(), [2], train, validation, RECIPE)[0]
    assert first.history == again.history


def test_a_diverging_seed_is_told_and_has_no_effect_on_another():
    train, validation, _ = digits()

    def heads(seeds):
        made = maker('linear')(seeds)
        for seed, head in zip(seeds, made):
            if seed == 1:
                head.fc.weight.data.fill_(float('nan'))
        return made

    good, bad = train_heads(heads, [0, 1], train, validation, RECIPE)
    assert good.failure == '' and good.best['top1'] > 60
    assert 'loss is nan' in bad.failure and bad.best_epoch == -1


def test_learning_rate_warms_up_and_falls_to_zero():
    train, validation, _ = digits()
    history = train_heads(maker('linear'), [0], train, validation, Recipe(epochs=6, batch_size=50, lr=0.1))[0].history
    rates = [row['lr'] for row in history]
    assert np.argmax(rates) in (0, 1) and rates[-1] < 1e-3
    assert rates[1:] == sorted(rates[1:], reverse=True)


def test_each_worker_computes_with_one_thread_and_torch_has_all_again_at_the_end():
    before = torch.get_num_threads()
    barrier = threading.Barrier(before, timeout=60)

    def threads():
        barrier.wait()  # so that every worker answers
        return torch.get_num_threads()

    with one_core_each() as pool:
        assert [future.result() for future in [pool.submit(threads) for _ in range(before)]] == [1] * before
    assert torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError), one_core_each() as pool:
        pool.submit(lambda: 1 / 0).result()
    assert torch.get_num_threads() == before


@pytest.mark.parametrize('precision', ['highest', 'medium'])
def test_products_have_the_precision_that_torch_is_set_to(precision):
    train, validation, _ = digits()
    seen = set()

    class Spy(nn.Linear):
        def forward(self, x):
            seen.add(torch.get_float32_matmul_precision())
            return super().forward(x)

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        train_heads(lambda seeds: [Spy(64, 10) for _ in seeds], [0, 1], train, validation, RECIPE)
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == {precision}


def test_errors_name_the_fix():
    train, validation, _ = digits()
    with pytest.raises(UserError, match='use --head-batch-size 600 or less'):
        train_heads(maker(), [0], train, validation, Recipe(batch_size=601))
    with pytest.raises(UserError, match='--opt nonsense'):
        train_heads(maker(), [0], train, validation, Recipe(opt='nonsense', batch_size=50))
