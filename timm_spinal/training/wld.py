"""Weak logit distillation (WLD) of IC networks, as a timm `TrainingTask`.

    L(t) = CE(z_s, y) + lambda(t) D(z_s, z_t)

z_s, z_t (B, K) are the logits of student and teacher for the same augmented images, t counts updates, T are those of
the whole run, r is ``fade_end``. Sourced (abstract of arXiv 2102.03495): the teacher is a pretrained plain network, the
aim is faster training. Not sourced, and so reconstructions: the distance D, its weight and its fade.

    D   mse  mean over K of (z_s - z_t)^2, mean over B (default)
        kl   tau^2 KL(softmax(z_t / tau) || softmax(z_s / tau)), mean over B
    lambda(t) / lambda_0   linear  max(0, 1 - t / (r T)) (default, reading A)
                           step    1 while t < r T, then 0 (reading C)
                           constant  1 (reading B, with a small lambda_0)
"""
import logging
import math
from typing import Any, Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.task.classification import resolve_classification_loss
from timm.utils import unwrap_model

from timm_spinal.errors import UserError

from .task import Task
from .teacher import Teacher, open_teacher

_logger = logging.getLogger(__name__)

# lambda / lambda_0 by s = t / (r T)
FADES: dict[str, Callable[[float], float]] = {
    'linear': lambda s: max(0., 1. - s),
    'step': lambda s: float(s < 1.),
    'constant': lambda s: 1.,
}
FIRST_WEIGHT = {'mse': 1., 'kl': 0.5}


class WLDTask(Task):
    """Cross-entropy and a distance to a teacher's logits whose weight fades out.

    The task counts its training batches, so it needs no call from the loop: it runs in timm's as it stands. Once
    lambda is 0 the teacher is given up, and the loss is that of the criterion alone.

    Args:
        student_model: Student to train.
        teacher_model: As `load_teacher` takes it, a model, a `Teacher`, or None when the teacher's logits come with
            every batch, or a teacher is to be set later.
        epochs: Epochs of the run, for T.
        batches_per_epoch: Batches of this process in an epoch.
        criterion: Loss of the task. Made by ``create_classification_loss(**criterion_kwargs)`` when None.
        criterion_kwargs: Its arguments.
        loss_type: ``mse`` or ``kl``.
        distill_loss_weight: lambda_0 >= 0; 1 for mse and 0.5 for kl when None.
        temperature: tau of kl.
        fade: ``linear``, ``step`` or ``constant``.
        fade_end: r in (0, 1]; without effect on ``constant``.
        right_only: Count D as 0 for images whose class the teacher gets wrong (reading D). Of soft targets the greatest
            one is the class.
        two_stage: While lambda > 0 the loss is lambda D alone (reading E).
        grad_accum_steps: Batches of an update.
        renormalize: Convert images for a teacher that was trained with another mean and std.
        device: As in timm's tasks.
        dtype: As in timm's tasks.
        verbose: As in timm's tasks.

    Raises:
        UserError: A fade end outside (0, 1], two stages of which the second never comes, a teacher that does not fit.
    """

    def __init__(
            self,
            student_model: nn.Module,
            teacher_model: str | nn.Module | None,
            epochs: int,
            batches_per_epoch: int,
            criterion: nn.Module | None = None,
            criterion_kwargs: dict[str, Any] | None = None,
            loss_type: str = 'mse',
            distill_loss_weight: float | None = None,
            temperature: float = 4.,
            fade: str = 'linear',
            fade_end: float = 0.5,
            right_only: bool = False,
            two_stage: bool = False,
            grad_accum_steps: int = 1,
            renormalize: bool = False,
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
            verbose: bool = True,
    ):
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        check_options(loss_type, fade, fade_end, two_stage)
        self.trainable_module = student_model
        self.criterion = resolve_classification_loss(criterion, self.device, criterion_kwargs=criterion_kwargs)
        self.loss_type = loss_type
        self.first_weight = FIRST_WEIGHT[loss_type] if distill_loss_weight is None else distill_loss_weight
        self.temperature = temperature
        self.fade = fade
        self.fade_end = fade_end
        self.right_only = right_only
        self.two_stage = two_stage
        self.batches = 0  # training batches seen
        self.set_length(epochs, batches_per_epoch, grad_accum_steps)
        self.teacher: Teacher | None = None
        if teacher_model is not None and self.distill_weight:
            if not isinstance(teacher_model, Teacher):
                teacher_model = open_teacher(teacher_model, unwrap_model(student_model), renormalize=renormalize)
            self.teacher = teacher_model.to(device=self.device, dtype=self.dtype)
        if self.verbose:
            _logger.info(f'WLDTask: {loss_type}, weight {self.first_weight}, {fade} to {fade_end} of {self.total}')

    def set_length(self, epochs: int, batches_per_epoch: int, grad_accum_steps: int = 1) -> None:
        """Set T: epochs times updates of an epoch, of which the last may have fewer batches."""
        self.epochs, self.batches_per_epoch, self.grad_accum_steps = epochs, batches_per_epoch, grad_accum_steps

    def start_epoch(self, epoch: int, batch: int, batches: int) -> None:
        """Set t, which then goes on by itself."""
        self.batches = epoch * batches + batch

    @property
    def total(self) -> int:
        """T."""
        return self.epochs * math.ceil(self.batches_per_epoch / self.grad_accum_steps)

    @property
    def updates(self) -> int:
        """t: updates that are done before the next batch."""
        epoch, batch = divmod(self.batches, self.batches_per_epoch)
        return epoch * math.ceil(self.batches_per_epoch / self.grad_accum_steps) + batch // self.grad_accum_steps

    @property
    def distill_weight(self) -> float:
        """lambda(t) of the next batch."""
        # rounded, so that r T is whole where it should be
        return self.first_weight * FADES[self.fade](self.updates / round(self.total * self.fade_end, 6))

    def train(self, mode: bool = True) -> 'WLDTask':
        """Set training mode of the student; the teacher stays in eval mode."""
        super().train(mode)
        return self

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> 'WLDTask':
        """Wrap the student, and not the teacher, in DistributedDataParallel."""
        from torch.nn.parallel import DistributedDataParallel
        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def compile(  # type: ignore[override]  # timm's signature
            self,
            backend: str = 'inductor',
            mode: str | None = None,
            **compile_kwargs: Any,
    ) -> nn.Module:
        """Compile student and teacher; returns the student."""
        compiled: Any = torch.compile(self.trainable_module, backend=backend, mode=mode, **compile_kwargs)
        self.trainable_module = compiled
        self.eval_model = self.trainable_module
        if self.teacher is not None:
            self.teacher.compile(backend, mode, **compile_kwargs)
        return self.trainable_module

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """The batches seen, so that the fade of a resumed run goes on where it was."""
        return {} if ema else dict(batches=self.batches)

    def load_task_state(
            self,
            state: dict[str, Any] | None,
            strict: bool = True,
            module: nn.Module | None = None,
            ema: bool = False,
    ) -> None:
        """Put back what `get_task_state` returned."""
        if state:
            self.batches = state['batches']

    def forward(
            self,
            input: torch.Tensor,
            target: torch.Tensor,
            teacher_logits: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Loss of a batch.

        Args:
            input: Images (B, C, H, W), normalised for the student and mixed where there is mixing.
            target: Class indices (B,) or soft targets (B, K).
            teacher_logits: (B, K), in place of the teacher.

        Returns:
            ``loss``, ``output`` (logits of the student), ``task_loss``, ``kd_weight`` (lambda), and ``kd_loss`` (D)
            while lambda > 0.
        """
        weight = self.distill_weight
        self.batches += self.training
        output = self.trainable_module(input)
        task_loss = self.criterion(output, target)
        parts = dict(loss=task_loss, output=output, task_loss=task_loss, kd_weight=task_loss.new_full((), weight))
        if not weight:
            self.teacher = None
            return parts
        if teacher_logits is None:
            if self.teacher is None:
                raise RuntimeError('WLDTask: lambda is not 0, and there is no teacher: none was given, or it was given '
                                   'up when lambda was 0')
            teacher_logits = self.teacher(input)
        kd_loss = self.distance(output, teacher_logits.detach(), target)
        loss = weight * kd_loss if self.two_stage else task_loss + weight * kd_loss
        return dict(parts, loss=loss, kd_loss=kd_loss)

    def distance(self, output: torch.Tensor, given: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """D, mean over the batch, in float32."""
        output, given = output.float(), given.float()
        if self.loss_type == 'mse':
            each = (output - given).square().mean(dim=-1)
        else:
            log_s, log_t = (F.log_softmax(z / self.temperature, dim=-1) for z in (output, given))
            each = self.temperature ** 2 * F.kl_div(log_s, log_t, reduction='none', log_target=True).sum(dim=-1)
        if self.right_only:
            label = target.argmax(dim=-1) if target.ndim == 2 else target
            each = each * (given.argmax(dim=-1) == label)
        return each.mean()


def check_options(loss_type: str, fade: str, fade_end: float, two_stage: bool) -> None:
    """Refuse settings of WLD that make no sense.

    Raises:
        UserError: Names the setting.
    """
    for name, value, known in (('kd-loss-type', loss_type, FIRST_WEIGHT), ('kd-fade', fade, FADES)):
        if value not in known:
            raise UserError(f'--{name} {value}: unknown; use {" or ".join(known)}')
    if not 0. < fade_end <= 1.:
        raise UserError(f'--kd-fade-end {fade_end:g}: is not in (0, 1]; give the part of the run after which the '
                        'teacher is dropped, or use --kd-fade constant')
    if two_stage and fade == 'constant':
        raise UserError('--kd-two-stage: with --kd-fade constant the first stage never ends; use --kd-fade step')
