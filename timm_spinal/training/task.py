"""What is minimised: a task by name, the penalties around it, and losses on capsule lengths.

`OBJECTIVES` maps the name of an objective to the function that makes its `Task`: timm's for classification and for its
kinds of distillation, ours for `wld`. `PENALTIES` maps the name of a penalty to a factory that looks at the config and
the model and returns a function without arguments (the penalty, a scalar tensor), or None when the config does not ask
for it. The loop adds every penalty once per optimizer update, whatever the gradient accumulation, and logs it under its
own name.
"""
from typing import Any, Callable

import torch
import torch.nn as nn
from timm import task as timm_task

from timm_spinal.errors import UserError

from .config import LoopConfig, TrainConfig
from .optim import Frozen
from .teacher import check_logits, open_teacher
from .transforms import resolve_data


class Task(timm_task.TrainingTask):
    """timm's `TrainingTask`, which the loop tells how long the run is and where it stands.

    Most tasks need to know neither, so both methods do nothing here.

    Attributes:
        penalties: Penalties on weights by name; the loop adds each once per update, whatever the accumulation.
        frozen: Parts of the model that the loop keeps still.
    """
    penalties: dict[str, Callable[[], torch.Tensor]] = {}
    frozen: Frozen = Frozen()

    @property
    def trained(self) -> nn.Module:
        """The module that the optimizer trains, prepared."""
        module = self.get_trainable_module()
        assert module is not None
        return module

    def setup_average(self, config: LoopConfig) -> None:
        """Start the moving average of the weights when a config asks for one."""
        if config.model_ema:
            device = torch.device('cpu') if config.model_ema_force_cpu else None
            self.setup_ema(decay=config.model_ema_decay, use_warmup=config.model_ema_warmup, device=device)

    def evaluated(self, ema: bool = False) -> nn.Module:
        """The model that is evaluated; with ``ema`` its average, which must have been set up."""
        model = self.get_eval_model(ema=ema)
        assert model is not None
        return model

    def set_length(self, epochs: int, batches_per_epoch: int, grad_accum_steps: int = 1) -> None:
        """Called once, when loaders and schedule are made.

        Args:
            epochs: Epochs of the schedule.
            batches_per_epoch: Batches of this process in an epoch.
            grad_accum_steps: Batches of an update.
        """

    def start_epoch(self, epoch: int, batch: int, batches: int) -> None:
        """Called before the first batch of an epoch, and before the next one of an epoch that a resumed run is in.

        Args:
            epoch: Epochs that are done.
            batch: Batches of this epoch that are done.
            batches: Batches of this process in an epoch.
        """


class ClassificationTask(Task, timm_task.ClassificationTask):
    """timm's."""


class MultiLabelClassificationTask(Task, timm_task.MultiLabelClassificationTask):
    """timm's."""


class LogitDistillationTask(Task, timm_task.LogitDistillationTask):
    """timm's."""


class FeatureDistillationTask(Task, timm_task.FeatureDistillationTask):
    """timm's."""


class TokenDistillationTask(Task, timm_task.TokenDistillationTask):
    """timm's."""

# ---- losses on capsule lengths --------------------------------------------------------------------------------------


class CapsuleLoss(nn.Module):
    """Base class of losses on capsule lengths, which are defined on scores (B, C) >= 0.

    Targets are class indices (B,), or memberships (B, C) in [0, 1], as mixup gives them or as several classes per image
    have them. Label smoothing s is timm's: a class index becomes the membership 1 - s + s / C, the others s / C;
    memberships y become (1 - s) y + s / 2. The papers use none (``--smoothing 0``).

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
        one_hot = torch.zeros_like(scores).scatter_(-1, target.unsqueeze(-1), 1.)  # F.one_hot reads numbers on a CPU
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


# ---- penalties on weights -------------------------------------------------------------------------------------------


Penalty = Callable[[], torch.Tensor]


def orthogonality(config: TrainConfig, model: nn.Module) -> Penalty | None:
    """``sb_ortho`` times the distance of a model's shared filter bases from orthonormal.

    Raises:
        UserError: The model shares no filters.
    """
    if not config.sb_ortho:
        return None
    distance = getattr(model, 'orthogonality_loss', None)
    if distance is None:
        raise UserError(f'--sb-ortho {config.sb_ortho:g}: {config.model} has no shared filter bases; take a model such '
                        'as resnet34_sb_s48u1d, or leave it out')
    try:
        distance(config.sb_ortho_mode)
    except ValueError as e:
        raise UserError(f'--sb-ortho {config.sb_ortho:g}: {e} Leave it out') from e
    return lambda: config.sb_ortho * distance(config.sb_ortho_mode)


# ---- objectives -----------------------------------------------------------------------------------------------------


Builder = Callable[[TrainConfig, nn.Module, dict[str, Any]], Task]


def criterion_kwargs(config: TrainConfig, mixup_active: bool, multi_label: bool = False) -> dict[str, Any]:
    """Arguments of `timm.loss.create_classification_loss` for a config; targets are soft when mixup is active."""
    loss = config.loss or ('bce' if config.bce_loss or multi_label else 'ce')
    kwargs: dict[str, Any] = dict(loss_type=loss, smoothing=config.smoothing, soft_targets=mixup_active)
    options = dict(bce_target_thresh=config.bce_target_thresh, pos_weight=config.bce_pos_weight)
    kwargs.update({k: v for k, v in options.items() if v is not None}, bce_sum=config.bce_sum)
    if loss == 'asl':
        kwargs.update(asl_gamma_pos=config.asl_gamma_pos, asl_gamma_neg=config.asl_gamma_neg)
    if loss == 'poly':
        kwargs.update(poly_epsilon=config.poly_epsilon)
    return kwargs


def criterion_options(
        config: TrainConfig,
        model: nn.Module,
        mixup_active: bool,
        multi_label: bool = False,
) -> dict[str, Any]:
    """The loss of a config as arguments of timm's tasks.

    Raises:
        UserError: A loss of capsule lengths on a model that makes logits of them.
    """
    if config.loss not in CAPSULE_LOSSES:
        return dict(criterion_kwargs=criterion_kwargs(config, mixup_active, multi_label))
    if any(getattr(module, 'logit_scale', None) is True for module in model.modules()):
        raise UserError(f'--loss {config.loss}: is defined on the lengths of capsules, but head_logit_scale turns them '
                        'into logits; leave out head_logit_scale, or use --loss ce')
    return dict(criterion=CAPSULE_LOSSES[config.loss](0. if mixup_active else config.smoothing))


def _classification(config: TrainConfig, model: nn.Module, common: dict[str, Any]) -> Task:
    return ClassificationTask(model, **common)


def _multi_label(config: TrainConfig, model: nn.Module, common: dict[str, Any]) -> Task:
    return MultiLabelClassificationTask(model, **common)


def _logit(config: TrainConfig, model: nn.Module, common: dict[str, Any]) -> Task:
    return LogitDistillationTask(
        model, loss_type=config.kd_loss_type or 'kl', temperature=config.kd_temperature, **_weights(config), **common)


def _feature(config: TrainConfig, model: nn.Module, common: dict[str, Any]) -> Task:
    return FeatureDistillationTask(
        model,
        student_feature_dim=config.kd_student_feature_dim,
        teacher_feature_dim=config.kd_teacher_feature_dim,
        **_weights(config),
        **common,
    )


def _token(config: TrainConfig, model: nn.Module, common: dict[str, Any]) -> Task:
    return TokenDistillationTask(
        model,
        distill_type=config.kd_token_distill_type,
        temperature=config.kd_temperature,
        **_weights(config),
        **common,
    )


def _wld(config: TrainConfig, model: nn.Module, common: dict[str, Any]) -> Task:
    from .wld import WLDTask  # which is a `Task`
    # `set_length` gives it the length of the run, `distill.prepare_teacher` its teacher
    return WLDTask(
        model,
        teacher_model=None,
        epochs=1,
        batches_per_epoch=1,
        loss_type=config.kd_loss_type or 'mse',
        distill_loss_weight=config.distill_loss_weight,
        temperature=config.kd_temperature,
        fade=config.kd_fade,
        fade_end=config.kd_fade_end,
        right_only=config.kd_right_only,
        two_stage=config.kd_two_stage,
        **common,
    )


def _weights(config: TrainConfig) -> dict[str, Any]:
    return dict(distill_loss_weight=config.distill_loss_weight, task_loss_weight=config.task_loss_weight)


OBJECTIVES: dict[str, Builder] = {
    'classification': _classification,
    'multi_label': _multi_label,
    'logit': _logit,
    'feature': _feature,
    'token': _token,
    'wld': _wld,
}

NEED_LOGITS = ('logit', 'token', 'wld')  # of student and teacher

PENALTIES: dict[str, Callable[[TrainConfig, nn.Module], Penalty | None]] = {'ortho': orthogonality}


def build_task(
        config: TrainConfig,
        model: nn.Module,
        mixup_active: bool,
        device: torch.device,
        data_config: dict[str, Any] | None = None,
        class_names: list[str] | None = None,
        multi_label: bool = False,
) -> Task:
    """The training task of a config around a model that is on its device and not yet prepared.

    A teacher is frozen, on the same device, and must not be prepared: wrap ``task.trainable_module`` only. WLD has
    none yet; see `distill.prepare_teacher`.

    Args:
        config: The run's config.
        model: The student.
        mixup_active: Targets are soft.
        device: Where the model is.
        data_config: Normalisation and size of the images, as `timm.data.resolve_data_config`; the model's when None.
        class_names: Names of the classes, to compare with those of a teacher.
        multi_label: Images have several classes, targets are memberships (B, C).

    Raises:
        UserError: Loss options that exclude each other or the data, a teacher that is unknown or does not fit, a
            student that cannot be distilled so.
    """
    name = config.kd_distill_type if config.kd_model_name else 'multi_label' if multi_label else 'classification'
    if multi_label and config.kd_model_name:
        raise UserError(f'--kd-model-name {config.kd_model_name}: distillation needs images with one class, but those '
                        f'of dataset {config.dataset} have two; leave it out')
    if multi_label and config.loss == 'ce':
        raise UserError(f'--loss ce: needs images with one class, but those of dataset {config.dataset} have two; use '
                        f'bce, asl, poly, margin or squared_hinge')
    common = dict(criterion_options(config, model, mixup_active, multi_label), device=device, verbose=False)
    if name in NEED_LOGITS:
        check_logits(model, f'--kd-distill-type {name}: the student', 'add --model-kwargs head_logit_scale=True')
    if name in ('logit', 'feature', 'token'):
        data_config = data_config or resolve_data(config, model)
        assert config.kd_model_name is not None
        common['teacher_model'] = open_teacher(
            config.kd_model_name, model, data_config, renormalize=True, class_names=class_names,
            features=name == 'feature').to(device).compile_for(config)
    try:
        return OBJECTIVES[name](config, model, common)
    except (ValueError, RuntimeError, OSError) as e:
        raise UserError(f'objective {name}: {" ".join(str(e).split())}') from e


def build_penalties(config: TrainConfig, model: nn.Module) -> dict[str, Penalty]:
    """The penalties that a config asks for, by name."""
    made = {name: factory(config, model) for name, factory in PENALTIES.items()}
    return {name: penalty for name, penalty in made.items() if penalty is not None}
