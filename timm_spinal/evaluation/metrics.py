"""What an evaluation counts, by the kind of target, and which of it chooses the best epoch."""
from collections import OrderedDict
from typing import Any, Iterable, Sequence

import torch
import torch.nn as nn
from timm.task import ClassificationEvaluator

from timm_spinal.errors import UserError

# accuracies in percent, by the name that they have in summary.csv and result.json
TITLES = {
    'top1': 'top-1', 'top5': 'top-5', 'exact': 'exact pairs', 'digit': 'digits', 'top2': 'top-2',
    'ap': 'AP', 'ap50': 'AP50', 'ap75': 'AP75', 'ap_small': 'AP small', 'ap_medium': 'AP medium',
    'ap_large': 'AP large', 'r2': 'R2',
}
MAIN = ('top1', 'exact', 'ap', 'r2')  # the main accuracy of each kind of target


class PairEvaluator(ClassificationEvaluator):
    """Loss and accuracies of images with two classes, as timm's evaluators: (B, C) scores, (B, C) memberships.

    ``loss`` is timm's for several classes per image, binary cross-entropy on the scores. The answer to an image are the
    two classes with the highest scores. ``exact``: images of which both are right; ``digit``: classes that are among
    the two of their image; ``top2``: images whose class of the smaller index is among the two, which is what the
    authors of XnODR call top 2. In percent.
    """

    default_metric = 'exact'
    metric_names = ('loss', 'exact', 'digit', 'top2')  # type: ignore[assignment]

    def __init__(self, device: Any = None):
        super().__init__(device, criterion=nn.BCEWithLogitsLoss())

    def reset(self) -> None:
        super().reset()
        self.counts = torch.zeros(4, dtype=torch.int64, device=self.device)  # images, exact, digits, smaller digits

    @torch.no_grad()
    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        output, target = self._prepare(output, target)
        if not output.shape[0]:
            return
        self._accumulate_loss(self.criterion(output, target), output.shape[0])
        answers = output.topk(2, dim=-1).indices
        classes = target.nonzero()[:, 1].view(-1, 2)  # the smaller first
        right = (answers[:, None] == classes[:, :, None]).any(-1)
        self.counts[1:] += torch.stack([right.all(-1).sum(), right.sum(), right[:, 0].sum()])

    def _summary(self, loss_sum: torch.Tensor, counts: torch.Tensor) -> OrderedDict:
        images, exact, digits, smaller = counts.tolist()
        percent = 100 / max(images, 1)
        return OrderedDict(
            loss=loss_sum.item() / max(images, 1), exact=percent * exact, digit=percent * digits / 2,
            top2=percent * smaller)


class SameAnswer:
    """Whether a model gives one and the same answer to images of different classes.

    Args:
        classes: Classes of an answer: 1, or 2 where images have two.
    """

    def __init__(self, classes: int = 1):
        self.classes = classes
        self.first: tuple[torch.Tensor, ...] = ()  # answer, scores and target of the first image
        self.differ = torch.zeros(2, dtype=torch.bool)  # answers, targets

    @torch.no_grad()
    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Look at scores (B, C) and their targets; nothing waits for the device."""
        if not len(output):
            return
        answers = output.topk(self.classes, dim=-1).indices.sort().values
        if not self.first:
            self.first = answers[0], output[0], target[0]
            self.differ = self.differ.to(output.device)
        answer, scores, first_target = self.first
        # equal scores are one answer, whichever of equal classes is taken for the highest
        same = (answers == answer).all(-1) | (output == scores).all(-1)
        self.differ |= torch.stack([~same.all(), (target != first_target).any()])

    def compute(self) -> list[int] | None:
        """The classes of the only answer; None where there are several, or where one answer may be right."""
        answers_differ, targets_differ = self.differ.tolist()
        return self.first[0].tolist() if targets_differ and not answers_differ else None


def same_answer_warning(name: str, answer: list[int] | None, class_names: Sequence[str] | None) -> list[str]:
    """A line that says that a model has one answer, if it has.

    Args:
        name: What to call the model.
        answer: As `SameAnswer.compute` gives it.
        class_names: Names of the classes, if known.
    """
    if answer is None:
        return []
    known = ' and '.join(class_names[i] if class_names and i < len(class_names) else f'class {i}' for i in answer)
    return [f'warning: {name} answers {known} for every image, so it tells no classes apart; train it with more '
            f'updates (--epochs, --min-updates) or another --lr']


def evaluator_for(multi_label: bool) -> type[ClassificationEvaluator]:
    """The evaluator of images with one class, or with two."""
    return PairEvaluator if multi_label else ClassificationEvaluator


def accuracies(multi_label: bool) -> tuple[str, ...]:
    """Names of the accuracies in percent that are measured; the first is the main one."""
    return tuple(name for name in evaluator_for(multi_label).metric_names if name != 'loss')


def choosing_metric(name: str, multi_label: bool) -> str:
    """The metric that --eval-metric means; ``top1``, its default, is ``exact`` where images have two classes.

    Raises:
        UserError: A metric that the data do not have.
    """
    known = evaluator_for(multi_label).metric_names
    name = 'exact' if multi_label and name == 'top1' else name
    if name not in known:
        kind = 'two classes' if multi_label else 'one class'
        raise UserError(f'--eval-metric {name}: is not measured for images with {kind}; use {", ".join(known)}')
    return name


def main_accuracy(names: Iterable[str], prefix: str = '') -> str:
    """Which of the columns of a result, such as ``eval_top1`` for the prefix ``eval_``, is the main accuracy."""
    columns = set(names)
    return next((name for name in MAIN if prefix + name in columns), MAIN[0])
