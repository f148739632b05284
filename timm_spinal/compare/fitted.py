"""Controls that are computed and not trained by steps: ridge regression, nearest neighbours, logistic regression.

They read the pooled vectors. Their settings, such as the penalty, are chosen on a tenth of the training images, held
out by class and always the same; then they are fitted to all of them. Neither the validation nor the test split takes
part, and no seed: the result is the same for every seed of a comparison (docs/papers/attention_heads.md, section 4).
"""
import itertools
import math
from dataclasses import dataclass
from typing import Any, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from timm_spinal.errors import UserError
from timm_spinal.training.dataset import stratified_split

from .train_head import Features

HELD_OUT, HELD_OUT_SEED = 0.1, 0
_CHUNK = 4096  # images of a product in float64
_SIMILARITIES = 2 ** 24  # cosines that are held at a time

Point = dict[str, Any]


class Fitted:
    """A control on some training images: what all its settings share is computed once.

    Args:
        x: Vectors (N, F) in float32.
        y: Classes (N,).
        num_classes: Number of classes K.

    Attributes:
        grid: Settings by name, with the values that are tried where none are given.
        whole: Names of the settings that are whole numbers.
    """

    grid: dict[str, list[Any]] = {}
    whole: tuple[str, ...] = ()

    def __init__(self, x: torch.Tensor, y: torch.Tensor, num_classes: int):
        self.x, self.y, self.num_classes = x, y, num_classes

    def at(self, *args: Any, **settings: Any) -> nn.Module:
        """The classifier with these settings: vectors (B, F) -> scores (B, K)."""
        raise NotImplementedError

    def scores(self, points: list[Point], x: torch.Tensor) -> Iterator[torch.Tensor]:
        """Scores (B, K) of vectors (B, F) with each of some settings."""
        for point in points:
            yield self.at(**point)(x)


class Ridge(Fitted):
    """Least squares on one-hot classes with a penalty on the squared weights; the intercept is free::

        W = (Xc^T Xc + lambda 1)^-1 Xc^T Yc,    b = mean(Y) - mean(X) W,    Xc = X - mean(X), Yc = Y - mean(Y)

    One eigendecomposition, of Xc^T Xc or with fewer images than features of Xc Xc^T, serves all penalties. ``penalty``
    is lambda in units of the mean eigenvalue of Xc^T Xc. In float64.
    """

    grid = dict(penalty=[10. ** (e / 2) for e in range(-12, 5)])

    def __init__(self, x: torch.Tensor, y: torch.Tensor, num_classes: int):
        super().__init__(x, y, num_classes)
        n, width = x.shape
        targets = F.one_hot(y, num_classes).double()
        self.mean_y = targets.mean(0)
        self.mean_x = torch.stack([chunk.double().sum(0) for chunk in x.split(_CHUNK)]).sum(0) / n
        if n < width:
            centred = x.double() - self.mean_x
            s, v = torch.linalg.eigh(centred @ centred.T)
            self.left, self.right = centred.T @ v, v.T @ (targets - self.mean_y)
        else:
            gram = torch.zeros(width, width, dtype=torch.float64, device=x.device)
            moment = torch.zeros(width, num_classes, dtype=torch.float64, device=x.device)
            for chunk, answer in zip(x.split(_CHUNK), targets.split(_CHUNK)):
                centred = chunk.double() - self.mean_x
                gram += centred.T @ centred
                moment += centred.T @ (answer - self.mean_y)
            s, self.left = torch.linalg.eigh(gram)
            self.right = self.left.T @ moment
        self.eigenvalues = s.clamp_min(0.)
        self.unit = float(self.eigenvalues.sum()) / width or 1.

    def solve(self, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
        """W (F, K) and b (K,) in float64 for lambda itself."""
        weight = self.left @ (self.right / (self.eigenvalues + penalty)[:, None])
        return weight, self.mean_y - self.mean_x @ weight

    def at(self, *, penalty: float) -> nn.Linear:
        weight, bias = self.solve(penalty * self.unit)
        return _linear(weight.T, bias, self.x.dtype)


class NearestNeighbours(Fitted):
    """The ``k`` training images with the largest cosine s vote for their classes with weights exp(s / temperature)."""

    grid = dict(k=[5, 10, 20, 50, 100, 200], temperature=[0.07, 0.1, 0.2])
    whole = ('k',)

    def at(self, *, k: int, temperature: float) -> nn.Module:
        return NeighbourVote(self.x, self.y, self.num_classes, k, temperature)

    def scores(self, points: list[Point], x: torch.Tensor) -> Iterator[torch.Tensor]:
        vote = NeighbourVote(self.x, self.y, self.num_classes, max(point['k'] for point in points), 1.)
        cosines, classes = vote.neighbours(x)
        for point in points:
            k = point['k']
            yield votes(cosines[:, :k], classes[:, :k], self.num_classes, point['temperature'])


class NeighbourVote(nn.Module):
    """The classifier of :class:`NearestNeighbours`: vectors (B, F) -> logarithms (B, K) of the parts of the votes.

    Args:
        x: Training vectors (N, F).
        y: Their classes (N,).
        num_classes: Number of classes K.
        k: Number of neighbours; all images where there are fewer.
        temperature: Divides the cosines.
    """

    x: torch.Tensor
    y: torch.Tensor

    def __init__(self, x: torch.Tensor, y: torch.Tensor, num_classes: int, k: int, temperature: float):
        super().__init__()
        self.register_buffer('x', F.normalize(x, dim=1))
        self.register_buffer('y', y)
        self.num_classes, self.k, self.temperature = num_classes, min(k, len(y)), temperature

    def neighbours(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and classes (B, k) of the nearest images, the nearest first."""
        found = [(F.normalize(chunk, dim=1) @ self.x.T).topk(self.k, dim=1)
                 for chunk in x.split(max(1, _SIMILARITIES // len(self.y)))]
        return torch.cat([f.values for f in found]), self.y[torch.cat([f.indices for f in found])]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return votes(*self.neighbours(x), self.num_classes, self.temperature)


def votes(cosines: torch.Tensor, classes: torch.Tensor, num_classes: int, temperature: float) -> torch.Tensor:
    """Logarithms (B, K) of each class's part of the votes of its neighbours; the least is that of 1e-6."""
    weights = ((cosines - cosines[:, :1]) / temperature).exp()  # the greatest is 1, as no exponent may overflow
    total = torch.zeros(len(cosines), num_classes, dtype=cosines.dtype, device=cosines.device)
    total.scatter_add_(1, classes, weights)
    return (total / total.sum(1, keepdim=True)).clamp_min(1e-6).log()


class LogisticRegression(Fitted):
    """Cross entropy with a penalty on the squared weights, |W|^2 / 2 + C sum_i CE_i, by L-BFGS; the intercept is free.

    ``c`` is C in units of 1 / v, v the mean variance of the features, so that it means the same for features of any
    scale: scikit-learn's C of features that are divided by sqrt(v). Each setting starts from the solution of the one
    before.
    """

    grid = dict(c=[10. ** (e / 2) for e in range(-10, 3)])
    tolerance, most = 1e-4, 1000  # scikit-learn's: of the largest gradient of the mean, and iterations

    def __init__(self, x: torch.Tensor, y: torch.Tensor, num_classes: int):
        self.mean = x.mean(0)
        self.unit = float((x - self.mean).square().mean()) or 1.
        super().__init__((x - self.mean) / self.unit ** 0.5, y, num_classes)
        self.weight = torch.zeros(num_classes, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
        self.bias = torch.zeros(num_classes, dtype=x.dtype, device=x.device, requires_grad=True)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def at(self, *, c: float) -> nn.Linear:
        optimizer = torch.optim.LBFGS(
            [self.weight, self.bias], max_iter=self.most, history_size=10, line_search_fn='strong_wolfe',
            tolerance_grad=self.tolerance, tolerance_change=0.)

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            penalty = self.weight.square().sum() / (2. * c * len(self.y))
            value = F.cross_entropy(F.linear(self.x, self.weight, self.bias), self.y) + penalty
            value.backward()
            return value

        optimizer.step(loss)
        weight = self.weight.detach() / self.unit ** 0.5
        return _linear(weight, self.bias.detach() - weight @ self.mean, self.x.dtype)


def _linear(weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=dtype)
    layer.load_state_dict(dict(weight=weight, bias=bias))
    return layer.requires_grad_(False)


FITTED: dict[str, type[Fitted]] = {'ridge': Ridge, 'knn': NearestNeighbours, 'logreg': LogisticRegression}


# ---- the choice --------------------------------------------------------------------------------------------------


def settings_grid(name: str, head: str, given: Point, grids: dict[str, list[Any]], labels: np.ndarray) -> list[Point]:
    """All settings that a control is tried with.

    Args:
        name: What the user wrote, for messages.
        head: A row of `FITTED`.
        given: Settings with one value each, from ``knn:k=20``.
        grids: Values of the others by the name of the setting; an empty list stands for the control's own.
        labels: Classes of the training images.

    Raises:
        UserError: A value that is no positive number, more neighbours than images, or a choice without two images of
            any class.
    """
    kind, axes = FITTED[head], {}
    for key, default in kind.grid.items():
        where = f'--heads {name}' if key in given else f'--{head}-{key}'
        values = [given[key]] if key in given else grids.get(key) or default
        for value in values:
            _check_positive(where, key, value, key in kind.whole)
        axes[key] = sorted(set(values))
    images = len(labels)
    if math.prod(map(len, axes.values())) > 1:
        images = len(stratified_split(labels, HELD_OUT, HELD_OUT_SEED)[0])
        if images == len(labels):
            example = ':'.join([head, *(f'{key}={values[0]:g}' for key, values in axes.items())])
            raise UserError(f'--heads {name}: no class has two training images, so none can be held out to choose by; '
                            f'give one value of each setting, as {example}')
    if 'k' in axes:
        given_k = 'k' in given or grids.get('k')
        too_many = [k for k in axes['k'] if k > images]
        if given_k and too_many:
            raise UserError(f'{"--heads " + name if "k" in given else "--knn-k"}: k = {too_many[-1]} is above the '
                            f'number of images to choose neighbours from ({images}); give at most {images}')
        axes['k'] = [k for k in axes['k'] if k <= images] or [images]
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


def _check_positive(where: str, key: str, value: Any, whole: bool) -> None:
    is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value <= 0:
        what = 'a positive whole number' if whole else 'a positive number'
        raise UserError(f'{where}: {key} must be {what}, got {value!r}')


@dataclass(frozen=True)
class Choice:
    """A fitted control.

    Attributes:
        model: Vectors (B, F) -> scores (B, K).
        settings: The chosen ones.
        points: All settings that were tried, with ``held_out_top1``, the accuracy in percent on the images that were
            held out; empty where there was one.
    """
    model: nn.Module
    settings: Point
    points: list[Point]


@torch.no_grad()
def fit(head: str, train: Features, num_classes: int, grid: list[Point]) -> Choice:
    """Choose the settings of a control on the held-out tenth, and fit it to all training images.

    Args:
        head: A row of `FITTED`.
        train: Pooled vectors (P, N, F); all passes are fitted to, and pass 0 of the held-out images is chosen by.
        num_classes: Number of classes K.
        grid: From `settings_grid`. The first of the best settings is taken.
    """
    kind, points = FITTED[head], []
    chosen = grid[0]
    if len(grid) > 1:
        kept, held = (torch.from_numpy(i).to(train.y.device) for i in stratified_split(
            train.y.cpu().numpy(), HELD_OUT, HELD_OUT_SEED))
        part = kind(*_passes(train, kept), num_classes)
        for point, scores in zip(grid, part.scores(grid, train.x[0, held])):
            hits = (scores.argmax(dim=1) == train.y[held]).double().mean()
            points.append(dict(point, held_out_top1=100. * float(hits)))
        best = max(point['held_out_top1'] for point in points)
        chosen = grid[[point['held_out_top1'] for point in points].index(best)]
    everything = torch.arange(len(train.y), device=train.y.device)
    return Choice(kind(*_passes(train, everything), num_classes).at(**chosen), chosen, points)


def _passes(train: Features, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors and classes of some images, all passes one after the other."""
    return train.x[:, images].flatten(0, 1), train.y[images].repeat(len(train.x))
