"""What inter-layer collision costs: icresnet50 against resnet50, timed in turns in one run.

    timm-spinal bench ic
    timm-spinal bench ic icresnet18 --threads 1 --rounds 40
    timm-spinal bench ic --compile --skip folded memory    # both sides by torch.compile

Channels last, float32, CPU. Prints the median of the paired ratios with the least and the greatest, of inference, of
inference with BatchNorm folded into the convolutions of both sides, and of a training step (forward, backward, SGD with
momentum). Then the memory of a training step, each side in a process of its own: its peak above that of the model at
rest, and the bytes that autograd keeps between forward and backward.
"""

import statistics
import sys
from functools import partial
from typing import Dict, List, NamedTuple, Optional, Tuple

import timm
import torch
from timm.models import is_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from ..arguments import Parser, number
from ..errors import UserError
from ..models import ensure_registered, fold_batchnorm
from .basis import Setting, create, images, training_step
from .heads import count_macs, count_params
from .memory import MIB, in_own_process, process_memory
from .timing import Ratio, machine_load, paired_ratio, paired_times

MODEL = 'icresnet50'
TARGETS = {'inference': 1.1, 'training': 1.25, 'memory': 1.25}  # ratios to stay under, of MODEL
PARTS = ('inference', 'folded', 'training', 'memory')


class Memory(NamedTuple):
    """MiB of a training step: peak above the model at rest, and what is kept between forward and backward."""

    peak: float
    saved: float


def plain_name(model: str) -> str:
    """The name of the model without collisions.

    Raises:
        UserError: If the name is none of an IC model.
    """
    if not model.startswith('ic') or not is_model(model[2:]) or not ensure_registered(model):
        raise UserError(f"'{model}' is no ic<timm model>; give a name such as {MODEL}")
    return model[2:]


def inference_times(name: str, setting: Setting, folded: bool, compiled: bool) -> Tuple[List[float], List[float]]:
    """Seconds of batches of the IC model and of the plain one, in eval mode."""
    models: List[nn.Module] = [create(side).eval() for side in (name, plain_name(name))]
    if folded:
        models = [fold_batchnorm(model).to(memory_format=torch.channels_last) for model in models]
    if compiled:
        models = [torch.compile(model) for model in models]  # type: ignore[misc]
    x = images(setting.batch_size, setting.image_size)
    ic, plain = (partial(model, x) for model in models)
    with torch.inference_mode():
        return paired_times(ic, plain, rounds=setting.rounds)


def training_times(name: str, setting: Setting, compiled: bool) -> Tuple[List[float], List[float]]:
    """Seconds of training steps of the IC model and of the plain one."""
    models = [create(side) for side in (name, plain_name(name))]
    if compiled:
        for model in models:
            model.compile()
    x = images(setting.batch_size, setting.image_size)
    ic, plain = (training_step(model, x) for model in models)
    return paired_times(ic, plain, rounds=setting.rounds, warmup=1)


def step_memory(name: str, batch_size: int, image_size: int, threads: int) -> Memory:
    """Memory of a training step; to be called in a process of its own."""
    torch.set_num_threads(threads)
    model, x = create(name), images(batch_size, image_size)
    training_step(model, images(2, 32))()  # gradients, momentum, and what torch allocates once
    before = process_memory('VmRSS')
    training_step(model, x)()
    return Memory(process_memory('VmHWM') - before, saved_bytes(model, x) / MIB)


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes that autograd keeps between forward and backward, each storage once, without parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: Dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model.train()(x).sum()
    del loss
    return sum(found.values())


def memory_of_both(name: str, setting: Setting, threads: int) -> Tuple[Memory, Memory]:
    """Of the IC model and of the plain one."""
    ic, plain = (in_own_process(step_memory, side, setting.batch_size, setting.image_size, threads)
                 for side in (name, plain_name(name)))
    return ic, plain


def _verdict(name: str, part: str, ratio: float) -> Tuple[str, bool]:
    """The words on the target, and whether none was missed."""
    target = TARGETS.get(part) if name == MODEL else None
    if target is None:
        return '', True
    met = ratio <= target
    return f', target <= {target:.2f}: {"met" if met else "missed"}', met


def _tell_times(name: str, part: str, times: Tuple[List[float], List[float]]) -> bool:
    ratio: Ratio = paired_ratio(*times)
    text, met = _verdict(name, part, ratio.median)
    ms = [f'{1000 * statistics.median(side):.1f}' for side in times]
    print(f'{name:20s} {part:10s} {ratio}{text}; {ms[0]} and {ms[1]} ms', flush=True)
    return met


def _tell_memory(name: str, ic: Memory, plain: Memory) -> bool:
    text, met = _verdict(name, 'memory', ic.peak / plain.peak)
    print(f'{name:20s} memory     peak {ic.peak / plain.peak:.3f}{text}; {ic.peak:.0f} and {plain.peak:.0f} MiB; '
          f'kept for backward {ic.saved / plain.saved:.3f}, {ic.saved:.0f} and {plain.saved:.0f} MiB', flush=True)
    return met


def _tell_size(name: str, image_size: int) -> None:
    models = [timm.create_model(side, device='meta').eval() for side in (name, plain_name(name))]
    x = torch.empty(1, 3, image_size, image_size, device='meta')
    params = [count_params(model) for model in models]
    macs = [count_macs(model, x) / 1e9 for model in models]
    print(f'{name:20s} parameters {params[0]:,} and {params[1]:,}; GMACs of convolutions and products '
          f'{macs[0]:.3f} and {macs[1]:.3f}')


def measure(name: str, setting: Setting, skip: List[str], compiled: bool) -> bool:
    """Print the lines of one model; True if no target was missed."""
    met = [True]
    _tell_size(name, setting.image_size)
    for part in ('inference', 'folded'):
        if part not in skip:
            met.append(_tell_times(name, part, inference_times(name, setting, part == 'folded', compiled)))
    if 'training' not in skip:
        met.append(_tell_times(name, 'training', training_times(name, setting, compiled)))
    if 'memory' not in skip:
        met.append(_tell_memory(name, *memory_of_both(name, setting, torch.get_num_threads())))
    return all(met)


def main(argv: Optional[List[str]] = None) -> int:
    """``timm-spinal bench ic``: returns 1 where a target is missed."""
    parser = Parser('timm-spinal bench ic', __doc__)
    parser.add_argument('models', nargs='*', default=[MODEL], help='ic<timm model> (default: %(default)s)')
    parser.add_argument('-b', '--batch-size', type=number(), default=8)
    parser.add_argument('--img-size', type=number(), default=224, help='pixels (default: %(default)s)')
    parser.add_argument('--rounds', type=number(), default=20, help='pairs of batches (default: %(default)s)')
    parser.add_argument('--threads', type=number(), default=torch.get_num_threads(),
                        help="CPU threads; 1 is steadier on a busy machine (default: torch's, %(default)s)")
    parser.add_argument('--compile', action='store_true', help='torch.compile on both sides, in the times')
    parser.add_argument('--skip', nargs='*', default=[], choices=PARTS, help='parts that are not measured')
    args = parser.parse_args(argv)
    for name in args.models:
        plain_name(name)
    torch.set_num_threads(args.threads)
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads, cpu, channels last, batch {args.batch_size}, '
          f'{args.img_size} px, {machine_load()}')
    print('time ratio, IC / plain: median of paired ratios')
    setting = Setting(args.batch_size, args.img_size, args.rounds)
    met = [measure(name, setting, args.skip, args.compile) for name in args.models]
    return int(not all(met))


if __name__ == '__main__':
    sys.exit(main())
