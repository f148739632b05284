"""What shared filter bases cost: ResNet34 with and without them, timed in turns in one run.

    timm-spinal bench basis
    timm-spinal bench basis --threads 1 --rounds 40 --skip ortho

Channels last, float32. Prints the median of the paired ratios with the least and the greatest, and where there is one
the ratio to stay under; then what else shrinks with the parameters, and which form of each stage is the faster one.
"""

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from ..arguments import Parser, number
from ..models import fold_bases, fold_batchnorm, merge_bases
from ..models._shared_model import SharedBasisModel
from .fastest_bases import fastest_bases
from .heads import count_macs, count_params
from .timing import Ratio, machine_load, paired_ratio, paired_times

PLAIN = 'resnet34'
AS_CREATED = 'as created'
FORMS: Dict[str, Callable[[nn.Module], nn.Module]] = {
    AS_CREATED: lambda model: model,
    'bases folded': fold_bases,
    'all norms folded': lambda model: fold_batchnorm(
        fold_bases(model) if isinstance(model, SharedBasisModel) else model),
    'merged': merge_bases,
}


class Row(NamedTuple):
    """A model in one of its forms, and the ratio of its time to resnet34's, in a form as well, to stay under."""

    model: str
    form: str
    target: Optional[float] = None
    plain_form: str = AS_CREATED


# resnet34 gains from folding as well: the rows of folded models against it say what is not the bases' merit
INFERENCE = (
    Row('resnet34_sb_s32u1', AS_CREATED, 0.75),
    Row('resnet34_sb_s32u1', 'bases folded', 0.75),
    Row('resnet34_sb_s32u1', 'all norms folded', 0.75),
    Row('resnet34_sb_s32u1', 'all norms folded', plain_form='all norms folded'),
    Row('resnet34_sb_s48u1d', AS_CREATED, 1.),
    Row('resnet34_sb_s48u1d', 'bases folded', 1.),
    Row('resnet34_sb_s48u1d', 'all norms folded', 1.),
    Row('resnet34_sb_s48u1d', 'all norms folded', plain_form='all norms folded'),
    Row('resnet34_sb_s48u1d', 'merged', 1.02),
)
TRAINING = Row('resnet34_sb_s32u1', 'training step', 0.9)
ORTHO = Row('resnet34_sb_s48u1d', 'penalty / training step', 0.03)
PARTS = ('inference', 'training', 'ortho', 'size', 'forms')


class Setting(NamedTuple):
    """Batch size, pixels and rounds."""

    batch_size: int
    image_size: int
    rounds: int


def create(name: str) -> nn.Module:
    """A new model that lies channels last."""
    return timm.create_model(name).to(memory_format=torch.channels_last)


def images(batch_size: int, size: int) -> torch.Tensor:
    """Noise that lies channels last."""
    return torch.randn(batch_size, 3, size, size).to(memory_format=torch.channels_last)


def inference_ratio(row: Row, setting: Setting) -> Tuple[Ratio, float]:
    """Time of one form of a model over that of one of resnet34's, and its MACs over resnet34's, both in eval mode."""
    x = images(setting.batch_size, setting.image_size)
    made, plain = (
        FORMS[form](create(name).eval()).to(memory_format=torch.channels_last)
        for name, form in ((row.model, row.form), (PLAIN, row.plain_form)))
    with torch.inference_mode():
        ratio = paired_ratio(*paired_times(partial(made, x), partial(plain, x), rounds=setting.rounds))
        return ratio, count_macs(made, x[:1]) / count_macs(plain, x[:1])


def training_step(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """Forward, backward and an SGD step with momentum on noise."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    target = torch.arange(len(x)) % model.num_classes

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()

    return step


def training_ratio(row: Row, setting: Setting) -> Ratio:
    """Time of a training step over resnet34's."""
    x = images(setting.batch_size, setting.image_size)
    sides = [training_step(create(name), x) for name in (row.model, PLAIN)]
    return paired_ratio(*paired_times(*sides, rounds=setting.rounds, warmup=1))


def ortho_ratio(row: Row, image_size: int, batch_size: int = 64, rounds: int = 3) -> Ratio:
    """Time of the orthogonality penalty with its gradient, once per update, over that of a training step."""
    model: Any = create(row.model)

    def penalty() -> None:
        model.orthogonality_loss().backward()

    step = training_step(model, images(batch_size, image_size))
    return paired_ratio(*paired_times(penalty, step, rounds=rounds, warmup=1))


def sizes(name: str, folder: Path) -> Dict[str, int]:
    """Numbers of parameters, gradients and optimizer state of one step, and bytes of the saved file."""
    model = create(name).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    model(images(2, 32)).sum().backward()
    optimizer.step()
    path = folder / f'{name}.safetensors'
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return dict(
        parameters=count_params(model),
        gradients=sum(p.grad.numel() for p in model.parameters() if p.grad is not None),
        optimizer=sum(state['momentum_buffer'].numel() for state in optimizer.state.values()),
        file=path.stat().st_size,
    )


def _tell(row: Row, ratio: Ratio, more: str = '') -> bool:
    """Print a line; False if a target is missed."""
    met = row.target is None or ratio.median <= row.target
    target = '' if row.target is None else f', target <= {row.target:.2f}: {"met" if met else "missed"}'
    plain = '' if row.plain_form == AS_CREATED else f' (resnet34: {row.plain_form})'
    print(f'{row.model:20s} {row.form:24s} {ratio}{target}{more}{plain}', flush=True)
    return met


def _tell_sizes() -> None:
    with tempfile.TemporaryDirectory() as folder:
        plain = sizes(PLAIN, Path(folder))
        for name in dict.fromkeys(row.model for row in INFERENCE):
            made = sizes(name, Path(folder))
            print(f'{name:20s} of {PLAIN}: ' + ', '.join(f'{key} {made[key] / plain[key]:.3f}' for key in plain))


def _tell_forms(setting: Setting) -> None:
    x = images(setting.batch_size, setting.image_size)
    for name in dict.fromkeys(row.model for row in INFERENCE):
        _, forms = fastest_bases(create(name).eval(), x, rounds=setting.rounds)
        print(f'{name:20s} folded / merged: ' + ', '.join(
            f'{stage} {form.folded_to_merged.median:.3f} {form.form}' for stage, form in forms.items()))


def main(argv: Optional[List[str]] = None) -> int:
    """``timm-spinal bench basis``: returns 1 where a target is missed."""
    parser = Parser('timm-spinal bench basis', __doc__)
    parser.add_argument('-b', '--batch-size', type=number(), default=8)
    parser.add_argument('--img-size', type=number(), default=224, help='pixels (default: %(default)s)')
    parser.add_argument('--rounds', type=number(), default=20, help='pairs of batches (default: %(default)s)')
    parser.add_argument('--threads', type=number(), default=torch.get_num_threads(),
                        help="CPU threads; 1 is steadier on a busy machine (default: torch's, %(default)s)")
    parser.add_argument('--skip', nargs='*', default=[], choices=PARTS, help='parts that are not measured')
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    setting = Setting(args.batch_size, args.img_size, args.rounds)
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads, cpu, channels last, batch {args.batch_size}, '
          f'{args.img_size} px, {machine_load()}')
    print(f"time ratio to timm's {PLAIN}: median of paired ratios")
    met = []
    if 'inference' not in args.skip:
        for row in INFERENCE:
            ratio, macs = inference_ratio(row, setting)
            met.append(_tell(row, ratio, f'; MACs {macs:.3f}'))
    if 'training' not in args.skip:
        met.append(_tell(TRAINING, training_ratio(TRAINING, setting)))
    if 'ortho' not in args.skip:
        met.append(_tell(ORTHO, ortho_ratio(ORTHO, args.img_size), '; batch 64'))
    if 'size' not in args.skip:
        _tell_sizes()
    if 'forms' not in args.skip:
        _tell_forms(setting)
    return int(not all(met))


if __name__ == '__main__':
    sys.exit(main())
