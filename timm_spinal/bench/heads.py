"""What a head costs at inference: a model with a head and its plain backbone, timed in turns in one run.

    timm-spinal bench heads                                # resnet50_pspinal and resnet18_spinal
    timm-spinal bench heads convnext_nano_mlp --rounds 30  # any other

Prints the median of the paired ratios (time with head / time without, 1 = free) with the least and the greatest, and
parameters and multiply-accumulates of both. MACs are those that torch.utils.flop_counter counts (convolutions and
matrix products; its FLOPs halved), for one image.
"""

import statistics
import sys
from dataclasses import dataclass
from functools import partial
from typing import List, Optional

import timm
import torch
from timm.models import is_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..arguments import Parser, number
from ..errors import UserError
from ..layers import HEADS
from ..models import ensure_registered
from .timing import Ratio, machine_load, paired_ratio, paired_times

MODELS = {'resnet50_pspinal': 1.03, 'resnet18_spinal': 1.05}  # and the ratio to stay under


@dataclass(frozen=True)
class HeadCost:
    """One head against none: milliseconds per batch (medians), parameters and MACs per image, with head and without."""

    model: str
    backbone: str
    ratio: Ratio
    milliseconds: tuple
    params: tuple
    macs: tuple


def count_params(model: nn.Module) -> int:
    """Parameters, each counted once."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, x: torch.Tensor) -> int:
    """Multiply-accumulates of one forward: half the FLOPs that torch.utils.flop_counter counts."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() // 2


def measure_head(
        model_name: str,
        batch_size: int = 8,
        image_size: int = 224,
        rounds: int = 40,
        device: str = 'cpu',
        progress: bool = False,
) -> HeadCost:
    """Time `<backbone>_<head>` against `<backbone>`, both new, in eval mode, float32.

    Raises:
        UserError: If the name is not a timm backbone with a head of ours.
    """
    backbone, _, head = model_name.rpartition('_')
    if head not in HEADS or not is_model(backbone) or not ensure_registered(model_name):
        raise UserError(f"'{model_name}' is no <timm backbone>_<head>; give a name such as resnet50_pspinal.")
    models = [timm.create_model(name, device=device).eval() for name in (model_name, backbone)]
    x = torch.randn(batch_size, 3, image_size, image_size, device=device)

    def run(model: nn.Module) -> None:
        model(x)
        if x.is_cuda:
            torch.cuda.synchronize()

    with torch.inference_mode():
        headed, plain = (partial(run, model) for model in models)
        times = paired_times(headed, plain, rounds=rounds, progress=progress)
    return HeadCost(
        model=model_name,
        backbone=backbone,
        ratio=paired_ratio(*times),
        milliseconds=tuple(1000 * statistics.median(t) for t in times),
        params=tuple(count_params(model) for model in models),
        macs=tuple(count_macs(model, x[:1]) for model in models),
    )


def print_cost(cost: HeadCost) -> None:
    """Three lines for one model."""
    target = MODELS.get(cost.model)
    goal = f', target <= {target:.2f}: {"met" if cost.ratio.median <= target else "missed"}' if target else ''
    print(f'{cost.model} / {cost.backbone}: time ratio {cost.ratio}{goal}')
    for name, ms, params, macs in zip((cost.model, cost.backbone), cost.milliseconds, cost.params, cost.macs):
        print(f'    {name:32s} {ms:9.1f} ms per batch  {params / 1e6:8.2f} M params  {macs / 1e9:8.3f} GMACs')


def main(argv: Optional[List[str]] = None) -> int:
    """``timm-spinal bench heads``: returns 1 where a target is missed."""
    parser = Parser('timm-spinal bench heads', __doc__)
    parser.add_argument('models', nargs='*', default=list(MODELS), help='<timm backbone>_<head> (default: %(default)s)')
    parser.add_argument('-b', '--batch-size', type=number(), default=8)
    parser.add_argument('--img-size', type=number(), default=224, help='pixels (default: %(default)s)')
    parser.add_argument('--rounds', type=number(), default=40, help='pairs of batches (default: %(default)s)')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--threads', type=number(), default=torch.get_num_threads(),
                        help="CPU threads; 1 is steadier on a busy machine (default: torch's, %(default)s)")
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads, {args.device}, batch {args.batch_size}, '
          f'{args.img_size} px, {machine_load()}')
    print('time ratio: median of paired ratios, with head / without; GMACs per image by torch.utils.flop_counter / 2')
    missed = False
    for name in args.models:
        cost = measure_head(
            name, args.batch_size, args.img_size, args.rounds, args.device, progress=sys.stderr.isatty())
        print_cost(cost)
        missed |= cost.ratio.median > MODELS.get(name, float('inf'))
    return int(missed)


if __name__ == '__main__':
    sys.exit(main())
