import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from timm_spinal.compare.controls import new_heads, parse_variants
from timm_spinal.compare.train_head import Features, Recipe, seed_dropout, train_head


def digits(passes=1):
    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32)[None], torch.tensor(data.target)
    return Features(x[:, :600].repeat(passes, 1, 1), y[:600]), Features(x[:, 600:900], y[600:900])


# losses of version 0.1, whose dropout and matrix products were other code
@pytest.mark.parametrize('text, train_loss, eval_loss', [
    ('linear', 1.8746271, 1.8620587),
    ('spinal:width=12', 2.0759490, 2.0409577),  # dropout in front of every linear
    ('pspinal:width=8', 1.8549119, 1.8231224),  # dropout on the input
])
def test_a_seed_has_the_results_of_earlier_versions(text, train_loss, eval_loss):
    head = new_heads(parse_variants(text)[0], 64, 10, [4])[0]
    history = train_head(head, 4, *digits(), Recipe(epochs=2, batch_size=50, lr=0.05, opt='sgd')).history
    assert history[-1]['train_loss'] == pytest.approx(train_loss, rel=1e-5)
    assert history[-1]['eval_loss'] == pytest.approx(eval_loss, rel=1e-5)


def dropped(p, seed, x):
    head = nn.Sequential(nn.Sequential(nn.Dropout(p)))
    seed_dropout(head, seed)
    return head(x)


@pytest.mark.parametrize('p', [0.3, 0.5])
def test_dropout_keeps_the_mean_and_differs_by_seed(p):
    x = torch.ones(101, 103)  # numbers that four do not divide
    first, other, again = (dropped(p, seed, x) for seed in (0, 1, 0))
    assert first.unique().tolist() == pytest.approx([0., 1 / (1 - p)])
    assert (first == 0).double().mean().item() == pytest.approx(p, abs=0.01)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_dropout_is_in_the_gradient_and_not_in_evaluation():
    head = nn.Sequential(nn.Dropout(0.5))
    seed_dropout(head, 0)
    x = torch.ones(50, 20, requires_grad=True)
    output = head(x)
    output.sum().backward()
    assert torch.equal(x.grad, output) and 0 < int((output == 0).sum()) < 1000
    assert head.eval()(x) is x
    before = torch.get_rng_state()
    head.train()(x)
    assert torch.equal(torch.get_rng_state(), before)


def test_weight_decay_is_for_matrices_only():
    class Unused(nn.Linear):
        """Its gradients are zero, so that the decay alone changes it."""
        def forward(self, x):
            return super().forward(x) * 0.

    head = Unused(9, 4)
    weight, bias = (p.detach().clone() for p in head.parameters())
    train, _ = digits()
    data = Features(train.x[:, :, :9], train.y % 4)
    train_head(head, 0, data, data, Recipe(epochs=1, batch_size=100, lr=0.1, weight_decay=0.5, opt='adamw'))
    assert torch.equal(head.bias, bias)
    assert 0.7 * weight.norm() < head.weight.norm() < 0.95 * weight.norm()


def test_order_is_that_of_the_trainer_and_the_same_for_every_head():
    from timm_spinal.training.dataset import TrainSampler
    seen = []

    class Spy(nn.Linear):
        def forward(self, x):
            if self.training:
                seen.append(x[:, 0].long().tolist())
            return super().forward(x)

    x = torch.arange(10.)[None, :, None]
    data = Features(x, torch.zeros(10, dtype=torch.long))
    train_head(Spy(1, 2), 6, data, data, Recipe(epochs=2, batch_size=5))
    sampler = TrainSampler(10, 6)
    for epoch in (0, 1):
        sampler.begin_epoch(epoch)
        assert sum(seen[2 * epoch:2 * epoch + 2], []) == [i for i, _ in sampler]


def test_augmented_passes_are_all_used():
    train, validation = digits(passes=3)
    seen = set()

    class Spy(nn.Linear):
        def forward(self, x):
            if self.training:
                seen.update(x[:, 0].round().long().tolist())
            return super().forward(x)

    train = Features(torch.stack([torch.full_like(train.x[0], p) for p in range(3)]), train.y)
    train_head(Spy(64, 10), 0, train, validation, Recipe(epochs=1, batch_size=50))
    assert seen == {0, 1, 2}
