"""Where a run is, and which evaluation was its best."""
import math
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """The counters of a run; JSON types only, part of every checkpoint."""
    epoch: int = 0  # epochs done
    batch: int = 0  # batches of each process done in the current epoch
    updates: int = 0
    images: int = 0  # training images of the epochs done, all processes
    sums: dict[str, float] = field(default_factory=dict)  # of the current epoch, see `Meter`
    epoch_seconds: float = 0.  # training time of the current epoch
    train_seconds: float = 0.  # training time of the epochs done, without evaluation and checkpoints
    eval_seconds: float = 0.
    best: dict[str, Any] = field(default_factory=dict)
    stale: int = 0  # evaluations since the best one
    stopped_early: bool = False
    teacher_top1: float | None = None  # as --kd-check found it
    history: list[dict[str, Any]] = field(default_factory=list)  # rows of summary.csv

    @property
    def seconds(self) -> float:
        """Training and evaluation time of the whole run, over all its resumptions."""
        return self.train_seconds + self.epoch_seconds + self.eval_seconds

    @property
    def images_per_second(self) -> float:
        """Training speed over the epochs done."""
        return self.images / self.train_seconds if self.train_seconds else 0.

    def end_epoch(self, row: dict[str, Any]) -> None:
        """Close the current epoch with its row of the summary."""
        self.history.append(row)
        self.images += round(self.sums.get('images', 0))
        self.train_seconds += self.epoch_seconds
        self.epoch, self.batch, self.sums, self.epoch_seconds = self.epoch + 1, 0, {}, 0.

    def judge(self, row: dict[str, Any], metric: str, keep: str = 'best') -> str:
        """Compare an evaluated epoch with the best one so far.

        Args:
            row: Row of the summary, with ``eval_*`` and, when there is a moving average, ``ema_*``.
            metric: ``loss`` (lower is better) or the name of an accuracy (higher is better).
            keep: ``last`` takes any epoch with finite outputs for better than those before it.

        Returns:
            Which weights are the new best, ``model`` or ``ema``; empty when there is no new best.
        """
        sign = -1 if metric == 'loss' else 1
        best, chosen = None if keep == 'last' else self.best.get('value'), ''
        for weights, prefix in (('model', 'eval'), ('ema', 'ema')):
            value = row.get(f'{prefix}_{metric}')
            # a model that gives NaN for some images is never the best, whatever its accuracy on the others
            if value is None or not math.isfinite(row.get(f'{prefix}_loss', 0.)):
                continue
            if best is None or sign * value > sign * best:
                best, chosen = value, weights
                self.best = dict(epoch=row['epoch'], weights=weights, metric=metric, value=value)
                measured = {k.removeprefix(f'{prefix}_'): v for k, v in row.items() if k.startswith(f'{prefix}_')}
                self.best.update(measured)
        self.stale = 0 if chosen else self.stale + 1
        return chosen


def batches_done(batch: int, processes: int, now: int, accum: int) -> int:
    """Batches of each process that are done in an epoch, when it goes on with another number of processes.

    The same images are done, down to a whole update.

    Args:
        batch: Batches of each process that were done.
        processes: Processes there were.
        now: Processes there are.
        accum: Batches of an update.
    """
    if processes == now:
        return batch
    done = batch * processes // now
    return done - done % accum
