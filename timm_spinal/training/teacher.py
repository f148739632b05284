"""The teacher of a distillation: a frozen classifier that must fit the student and the data."""
from pathlib import Path
from typing import Any, Sequence

import timm
import torch
import torch.nn as nn
from timm.models import parse_model_name
from timm.task import DistillationTeacher

from timm_spinal.errors import UserError
from timm_spinal.models.hub_checksums import check_download
from timm_spinal.models.hub_errors import explain, one_line

from .config import TrainConfig
from .model import check_model_name
from .results import CONFIG, WEIGHTS
from .transforms import resolve_data

_NO_TEACHER = (ValueError, RuntimeError, OSError, KeyError, TypeError, AttributeError)


class Teacher(DistillationTeacher):
    """A frozen model that answers images normalised for the student; always in eval mode.

    timm's tasks take it as it is. It converts images itself, from the normalisation that they really have: timm goes by
    the student's ``pretrained_cfg``, which --mean and --std may differ from.

    Args:
        model: The classifier.
        mean: Mean of the pixels that the model was trained with, one number per channel.
        std: Their standard deviation.
        student_mean: Mean that the images are normalised with.
        student_std: Their standard deviation.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(
            self,
            model: nn.Module,
            mean: Sequence[float],
            std: Sequence[float],
            student_mean: Sequence[float],
            student_std: Sequence[float],
    ):
        super().__init__(model.requires_grad_(False))
        # x std_s + mean_s is the image, which the teacher wants less mean_t and over std_t
        mean_t, std_t, mean_s, std_s = (
            torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (mean, std, student_mean, student_std))
        self.same_input = same_range(mean, std, student_mean, student_std)
        self.register_buffer('scale', (std_s / std_t).float(), persistent=False)
        self.register_buffer('shift', ((mean_s - mean_t) / std_t).float(), persistent=False)

    def train(self, mode: bool = True) -> 'Teacher':
        """Stays in eval mode."""
        return super().train(False)

    def normalize_input(self, input: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Images as they are: `forward` converts them."""
        return input

    def compile_for(self, config: TrainConfig) -> 'Teacher':
        """Compile what the distillation of a config uses, when it asks for compilation."""
        if config.torchcompile:
            features = config.kd_distill_type == 'feature'
            self.compile(
                config.torchcompile, config.torchcompile_mode, compile_model=not features, compile_features=features)
        return self

    @torch.no_grad()
    def forward(self, input: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        """Logits (B, K), or pooled features (B, F), of images (B, C, H, W)."""
        return super().forward(input if self.same_input else input * self.scale + self.shift, return_features)


def same_range(
        mean: Sequence[float],
        std: Sequence[float],
        other_mean: Sequence[float],
        other_std: Sequence[float],
) -> bool:
    """Whether two normalisations give the same input to 1e-4 of the range of pixels."""
    pairs = [*zip(mean, other_mean), *zip(std, other_std)]
    return len(mean) == len(other_mean) and all(abs(a - b) <= 1e-4 for a, b in pairs)


def load_teacher(name: str) -> nn.Module:
    """A pretrained classifier as it was trained: with its own classes and channels.

    Args:
        name: Name of timm or of ours, ``hf-hub:ORG/NAME``, ``local-dir:FOLDER``, or the folder of a finished run.

    Raises:
        UserError: Unknown name, a folder that is no finished run, weights that are missing or unreachable.
    """
    folder = Path(parse_model_name(name)[1] if name.startswith('local-dir:') else name)
    if name.startswith('local-dir:') or (folder.is_dir() and not timm.is_model(name)):
        missing = [file for file in (CONFIG, WEIGHTS) if not (folder / file).is_file()]
        if missing:
            raise UserError(f'teacher {name}: {" and ".join(missing)} not found there; give the folder of a finished '
                            'run')
        name = f'local-dir:{folder}'
    try:
        check_model_name(name)
        model: Any = timm.create_model(name, pretrained=True)
    except Exception as e:
        if not isinstance(e, UserError):
            check_download(f'teacher {name}', name)  # damaged weights may raise any error
        reason = explain(e)
        if reason is None and not isinstance(e, _NO_TEACHER):
            raise
        raise UserError(f'teacher {name}: {reason or one_line(e, 300)}') from e
    check_download(f'teacher {name}', model.pretrained_cfg)
    return model


def open_teacher(
        name: str | nn.Module,
        student: Any,
        data: dict[str, Any] | None = None,
        renormalize: bool = False,
        class_names: list[str] | None = None,
        features: bool = False,
) -> Teacher:
    """A teacher that fits the student, on the CPU.

    Args:
        name: As in `load_teacher`, or the model itself.
        student: Its classes, channels and, without ``data``, its normalisation are what the teacher must fit.
        data: ``mean``, ``std`` and ``input_size`` of the images, as `timm.data.resolve_data_config`.
        renormalize: Convert images for a teacher that was trained with another mean and std.
        class_names: Names of the student's classes, to compare with those that the teacher knows.
        features: Only features of the teacher are used; its classes may be any.

    Raises:
        UserError: Other classes, channels or input range, or a teacher that gives no logits or refuses the images.
    """
    model = load_teacher(name) if isinstance(name, str) else name
    label = name if isinstance(name, str) else type(model).__name__
    if not features:
        check_classes(label, model, student, class_names)
        check_logits(model, f'teacher {label}', 'choose another teacher')
    wanted, given = data or resolve_data(TrainConfig(), student), resolve_data(TrainConfig(), model)
    channels, of_student = given['input_size'][0], wanted['input_size'][0]
    if channels != of_student:
        raise UserError(f'teacher {label}: takes images of {channels} channels, the student {of_student}; choose '
                        f'another teacher, or give the student --in-chans {channels}')
    normalisations = given['mean'], given['std'], wanted['mean'], wanted['std']
    if not renormalize and not same_range(*normalisations):
        raise UserError(
            f"teacher {label}: was trained on another input range (mean {_numbers(given['mean'])}, std "
            f"{_numbers(given['std'])}) than the student's (mean {_numbers(wanted['mean'])}, std "
            f"{_numbers(wanted['std'])}); train with the teacher's --mean and --std, or convert with --kd-renormalize")
    teacher = Teacher(model, *normalisations)
    if data is not None:
        _check_images(label, teacher, data['input_size'])
    return teacher


def check_classes(label: str, model: Any, student: Any, class_names: list[str] | None = None) -> None:
    """Refuse a teacher whose classes are not the student's, in number, name or order.

    Raises:
        UserError: Says both.
    """
    have, want = getattr(model, 'num_classes', 0), student.num_classes
    if have != want:
        raise UserError(f'teacher {label}: has {have} classes, the student {want}; train a teacher on the same data')
    known = getattr(model, 'pretrained_cfg', {}).get('label_names')
    if known and class_names and len(known) == len(class_names) and list(known) != list(class_names):
        wrong, right = next((a, b) for a, b in zip(known, class_names) if a != b)
        raise UserError(f'teacher {label}: was trained for other classes than those of the data (its {wrong!r} is '
                        f'{right!r}); use --class-map')


def check_logits(model: nn.Module, what: str, advice: str) -> None:
    """Refuse a model that answers with capsule lengths.

    Raises:
        UserError: Says what and gives the advice.
    """
    if any(getattr(module, 'logit_scale', None) is False for module in model.modules()):
        raise UserError(f'{what}: its scores are lengths of capsules, not logits; {advice}')


def _check_images(label: str, teacher: Teacher, input_size: Sequence[int]) -> None:
    try:
        teacher(torch.zeros(1, *input_size))
    except (RuntimeError, ValueError, AssertionError) as e:
        reason = ' '.join(str(e).split())[:200]
        raise UserError(f'teacher {label}: refuses images of {_numbers(input_size, " x ")} ({reason}); choose another '
                        '--img-size or teacher') from e


def _numbers(values: Sequence[float], separator: str = ' ') -> str:
    return separator.join(f'{v:.4g}' for v in values)
