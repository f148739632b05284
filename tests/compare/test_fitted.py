"""Ridge, nearest neighbours and logistic regression: by hand, against scikit-learn, and how settings are chosen."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from timm_spinal.compare.fitted import FITTED, LogisticRegression, NearestNeighbours, Ridge, fit, settings_grid
from timm_spinal.compare.train_head import Features
from timm_spinal.errors import UserError
from timm_spinal.training.dataset import stratified_split


def close(actual, expected, atol=2e-6):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=atol)


def blobs(n=120, width=8, classes=4, seed=0, spread=1.5, dtype=torch.float64):
    """Points around a centre for each class, not separable."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    centres = torch.randn(classes, width, generator=generator, dtype=dtype)
    return centres[y] + spread * torch.randn(n, width, generator=generator, dtype=dtype), y


def test_ridge_by_hand():
    x, y = torch.tensor([[1., 0], [0, 1], [2, 2], [3, 1]]), torch.tensor([0, 0, 1, 1])
    ridge = Ridge(x, y, 2)
    weight, bias = ridge.solve(1.)
    close(weight, [[-0.294118, 0.294118], [-0.235294, 0.235294]])
    close(bias, [1.176471, -0.176471])
    close(ridge.eigenvalues, [1.697224, 5.302776])
    layer = ridge.at(penalty=1. / 3.5)  # in units of their mean
    close(layer.weight, weight.T, 1e-6)
    close(layer(x), x.double() @ weight + bias, 1e-6)


@pytest.mark.parametrize('n', [120, 6])  # by features and by images
@pytest.mark.parametrize('penalty', [1e-3, 1., 1e3])
def test_ridge_is_scikit_learns(n, penalty):
    linear_model = pytest.importorskip('sklearn.linear_model')
    x, y = blobs(n)
    weight, bias = Ridge(x, y, 4).solve(penalty)
    reference = linear_model.Ridge(alpha=penalty, solver='cholesky').fit(x.numpy(), F.one_hot(y, 4).double().numpy())
    np.testing.assert_allclose(weight.T.numpy(), reference.coef_, rtol=0, atol=1e-8)
    np.testing.assert_allclose(bias.numpy(), reference.intercept_, rtol=0, atol=1e-8)


def test_neighbours_by_hand():
    x, y = torch.tensor([[1., 0], [0, 1], [1, 1], [-1, 0]]), torch.tensor([0, 1, 1, 0])
    vote = NearestNeighbours(x, y, 2).at(k=3, temperature=0.07)
    cosines, classes = vote.neighbours(torch.tensor([[3., 1]]))
    close(cosines, [[0.948683, 0.894427, 0.316228]])
    assert classes.tolist() == [[0, 1, 1]]
    close(vote(torch.tensor([[3., 1]])).exp(), [[0.684564, 0.315436]])


@pytest.mark.parametrize('k, temperature', [(1, 0.07), (7, 0.07), (120, 0.2)])
def test_neighbours_are_scikit_learns(k, temperature):
    neighbors = pytest.importorskip('sklearn.neighbors')
    x, y = blobs()
    query, _ = blobs(50, seed=1)
    reference = neighbors.KNeighborsClassifier(
        k, metric='cosine', algorithm='brute', weights=lambda d: np.exp((1 - d) / temperature)).fit(x, y)
    expected = reference.predict_proba(query)
    fitted = NearestNeighbours(x, y, 4)
    close(fitted.at(k=k, temperature=temperature)(query), np.log(expected.clip(1e-6)), 1e-9)
    point = dict(k=k, temperature=temperature)
    close(list(fitted.scores([dict(k=1, temperature=1.), point], query))[1], np.log(expected.clip(1e-6)), 1e-9)


def test_low_temperatures_do_not_overflow():
    x, y = blobs(dtype=torch.float32)
    assert NearestNeighbours(x, y, 4).at(k=5, temperature=1e-4)(x).isfinite().all()


@pytest.mark.parametrize('c', [0.01, 1., 100.])
def test_logistic_regression_is_scikit_learns(c, monkeypatch):
    linear_model = pytest.importorskip('sklearn.linear_model')
    monkeypatch.setattr(LogisticRegression, 'tolerance', 1e-9)
    x, y = blobs()
    x = 0.5 * x + 0.5  # of another mean and variance
    fitted = LogisticRegression(x, y, 4)
    fitted.at(c=1e-3)  # from where the next one starts
    layer = fitted.at(c=c * float(x.var(0, correction=0).mean()))
    reference = linear_model.LogisticRegression(C=c, max_iter=5000, tol=1e-10).fit(x.numpy(), y.numpy())
    np.testing.assert_allclose(layer.weight.numpy(), reference.coef_, rtol=1e-5, atol=1e-5)
    bias = layer.bias.numpy() - layer.bias.numpy().mean()  # free up to a number that all have in common
    np.testing.assert_allclose(bias, reference.intercept_ - reference.intercept_.mean(), rtol=1e-5, atol=1e-5)


def test_it_is_fitted_inside_of_inference_too():
    x, y = blobs()
    with torch.no_grad():
        layer = LogisticRegression(x, y, 4).at(c=1.)
    assert (layer(x).argmax(1) == y).double().mean() > 0.6 and not layer.weight.requires_grad


@pytest.mark.parametrize('head', FITTED)
def test_settings_are_chosen_on_held_out_images_and_fitted_to_all(head):
    x, y = blobs(200, spread=2.)
    grid = settings_grid(head, head, {}, {}, y.numpy())
    choice = fit(head, Features(x[None], y), 4, grid)
    kept, held = stratified_split(y.numpy(), 0.1, 0)
    tops = []
    for point in grid:
        scores = FITTED[head](x[kept], y[kept], 4).at(**point)(x[held])
        tops.append(100 * float((scores.argmax(1) == y[held]).double().mean()))
    assert [point['held_out_top1'] for point in choice.points] == pytest.approx(tops)
    assert choice.settings == grid[tops.index(max(tops))] and len(set(tops)) > 1
    close(choice.model(x), FITTED[head](x, y, 4).at(**choice.settings)(x), 1e-2)  # of L-BFGS, from another start
    assert len(held) == 20


def test_one_setting_is_taken_without_a_choice():
    x, y = blobs(40)
    grid = settings_grid('knn', 'knn', dict(k=40, temperature=0.1), {}, y.numpy())
    choice = fit('knn', Features(x[None], y), 4, grid)
    assert choice.settings == dict(k=40, temperature=0.1) and choice.points == [] and choice.model.k == 40


def test_all_passes_are_fitted_to_and_the_first_is_chosen_by():
    x, y = blobs(40)
    both = torch.stack([x, x + 5.])
    choice = fit('ridge', Features(both, y), 4, [dict(penalty=1e-3)])
    torch.testing.assert_close(
        choice.model.weight, Ridge(both.flatten(0, 1), y.repeat(2), 4).at(penalty=1e-3).weight)


def test_constant_features_have_a_solution():
    layer = Ridge(torch.ones(6, 3), torch.tensor([0, 0, 0, 0, 1, 1]), 2).at(penalty=1.)
    close(layer(torch.ones(1, 3)), [[4 / 6, 2 / 6]])


def test_values_that_were_not_given_are_the_controls_own_as_far_as_there_are_images():
    labels = np.arange(60) % 3
    assert [p['k'] for p in settings_grid('knn', 'knn', dict(temperature=0.1), {}, labels)] == [5, 10, 20, 50]
    assert [p['k'] for p in settings_grid('knn', 'knn', dict(temperature=1), {}, np.array([0, 0, 1, 1]))] == [2]
    assert settings_grid('ridge', 'ridge', {}, dict(penalty=[10., 1., 10.]), labels) == [
        dict(penalty=1.), dict(penalty=10.)]
    penalties = [p['penalty'] for p in settings_grid('ridge', 'ridge', {}, dict(penalty=[]), labels)]
    assert len(penalties) == 17 and penalties[0] == pytest.approx(1e-6) and penalties[-1] == pytest.approx(100)


LABELS = np.arange(60) % 3


@pytest.mark.parametrize('head, given, grids, labels, message', [
    ('ridge', {}, dict(penalty=[0.]), LABELS, '--ridge-penalty: penalty must be a positive number, got 0.0'),
    ('ridge', {}, dict(penalty=[1., -1.]), LABELS, '--ridge-penalty: penalty must be a positive number, got -1.0'),
    ('ridge', dict(penalty='high'), {}, LABELS, "--heads ridge: penalty must be a positive number, got 'high'"),
    ('ridge', dict(penalty=float('nan')), {}, LABELS, 'must be a positive number, got nan'),
    ('logreg', {}, dict(c=[float('inf')]), LABELS, '--logreg-c: c must be a positive number, got inf'),
    ('knn', dict(k=2.5), {}, LABELS, 'k must be a positive whole number, got 2.5'),
    ('knn', dict(k=True), {}, LABELS, 'k must be a positive whole number, got True'),
    ('knn', {}, dict(k=[5, 55]), LABELS, r'--knn-k: k = 55 is above the number of images .* \(54\); give at most 54'),
    ('knn', dict(k=61, temperature=1.), {}, LABELS, r'--heads knn: k = 61 is above the number of images .* \(60\)'),
    ('knn', {}, {}, np.arange(5), '--heads knn: no class has two training images.*as knn:k=5:temperature=0.07'),
])
def test_refused(head, given, grids, labels, message):
    with pytest.raises(UserError, match=message) as error:
        settings_grid(head, head, given, grids, labels)
    assert '\n' not in str(error.value)
