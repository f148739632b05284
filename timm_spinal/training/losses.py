"""Losses on capsule lengths (spec capsule_xnor_heads 6).

Both take scores (B, C) >= 0 and targets: class indices (B,), or memberships (B, C) in [0, 1], as mixup gives them or
as several classes per image have them. They are defined on lengths. Label smoothing s is timm's: a class index becomes
the membership 1 - s + s / C, the others s / C; memberships y become (1 - s) y + s / 2. The papers use none
(``--smoothing 0``).
"""
import torch
import torch.nn as nn
import torch.nn.functional as F


class CapsuleLoss(nn.Module):
    """What both share: targets of either kind as memberships.

    Args:
        smoothing: Label smoothing s in [0, 1); 0 with mixup, which smooths by itself.
    """

    def __init__(self, smoothing: float = 0.):
        super().__init__()
        self.smoothing = smoothing

    def memberships(self, scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Targets (B,) or (B, C) as (B, C)."""
        if target.ndim == scores.ndim:
            return target.to(scores.dtype) * (1. - self.smoothing) + 0.5 * self.smoothing
        one_hot = F.one_hot(target, scores.shape[-1]).to(scores.dtype)
        return one_hot * (1. - self.smoothing) + self.smoothing / scores.shape[-1]


class MarginLoss(CapsuleLoss):
    """Sum over classes of y max(0, 0.9 - p)^2 + 0.5 (1 - y) max(0, p - 0.1)^2, mean over the batch (Sabour et al.)."""

    def forward(self, scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        scores = scores.float()
        y = self.memberships(scores, target)
        present, absent = (0.9 - scores).relu().square(), (scores - 0.1).relu().square()
        return (y * present + 0.5 * (1. - y) * absent).sum(-1).mean()


class SquaredHingeLoss(CapsuleLoss):
    """Mean over batch and classes of max(0, 1 - t p)^2 with t = 2 y - 1.

    Lengths are >= 0, so a class that is absent costs at least 1: the floor is 0.9 for one class of ten.
    """

    def forward(self, scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        scores = scores.float()
        sign = 2. * self.memberships(scores, target) - 1.
        return (1. - sign * scores).relu().square().mean()


CAPSULE_LOSSES: dict[str, type[CapsuleLoss]] = {'margin': MarginLoss, 'squared_hinge': SquaredHingeLoss}
