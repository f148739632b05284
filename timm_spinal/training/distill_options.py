"""Options of distillation. Those that timm's ``train.py`` has keep its names; the others belong to `wld`."""
from dataclasses import dataclass

from .options import option

BESIDE = 'beside'  # value of a bare --kd-cache


@dataclass
class DistillOptions:
    """Distillation and warm start"""
    kd_model_name: str | None = option(
        None, 'teacher: a name, hf-hub:ORG/NAME, local-dir:FOLDER or the folder of a run')
    kd_distill_type: str = option(
        'logit', 'what is distilled; wld: logits, weakly (training/wld.py)',
        choices=('logit', 'feature', 'token', 'wld'))
    kd_loss_type: str | None = option(
        None, 'distance of logits; not given: mse for wld, kl for logit', choices=('kl', 'mse'))
    kd_temperature: float = option(4., 'temperature of kl', low=0.01)
    distill_loss_weight: float | None = option(
        None, 'weight of the distillation loss; for wld the first one, before it fades: 1 for mse, 0.5 for kl', low=0.)
    task_loss_weight: float | None = option(None, 'weight of the classification loss; not for wld', low=0.)
    kd_student_feature_dim: int | None = option(None, 'width of the student features', low=1)
    kd_teacher_feature_dim: int | None = option(None, 'width of the teacher features', low=1)
    kd_token_distill_type: str = option('soft', 'kind of token distillation', choices=('soft', 'hard'))
    kd_fade: str = option(
        'linear', 'course of the weight of wld: linear down to 0, step (whole, then 0) or constant to the end of the '
        'run', choices=('linear', 'step', 'constant'))
    kd_fade_end: float = option(0.5, 'part of the run, in (0, 1], after which linear and step are 0')
    kd_right_only: bool = option(False, 'wld only on images that the teacher gets right')
    kd_two_stage: bool = option(False, 'wld in two stages: the distillation loss alone, then the loss alone')
    kd_renormalize: bool = option(
        False, "convert the images to the teacher's mean and std, if it has others (wld; timm's kinds always do)")
    kd_check: float | None = option(
        None, 'evaluate the teacher before training and refuse it below this top-1 in percent; without a value: when '
        'it is no better than chance', low=0., high=100., const=0., changes_result=False)
    kd_cache: str | None = option(
        None, "keep the teacher's logits of the training images in this folder, for wld with --no-aug; without a "
        'value: teacher-logits beside the run folder', const=BESIDE)
    ic_warm_start: float | None = option(
        None, "models with inter-layer collision and a plain model's weights: before training, choose w' so that this "
        'part of the places collides, and estimate BatchNorm statistics anew; without a value: 0.01', low=0.0001,
        high=0.9999, const=0.01)
