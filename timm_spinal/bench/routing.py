"""Memory and time of dynamic routing: whole, which keeps the predictions, against lean, which makes them in chunks.

    timm-spinal bench routing                                      # 10, 100, 1,000 and 10,000 classes
    timm-spinal bench routing --layer xnidr -b 64 --classes 1000
    timm-spinal bench routing --network resnet50_xnodr -b 64 --classes 1000     # a training step of a whole network

One line per number of classes: peak memory above that of the inputs and weights, for inference and for a training step
(forward and backward), each in a process of its own; time of both in turns in one process. Then the largest difference
of values and gradients, relative to the largest value. --network gives the peak memory of a process that makes a
network and takes two training steps (SGD with momentum, images of --img-size) instead.
"""

import statistics
import sys
from dataclasses import dataclass
from functools import partial
from typing import List, Optional, Tuple

import timm
import torch

from ..arguments import Parser, number
from ..layers import dynamic_routing
from ..models import ensure_registered
from .basis import training_step
from .memory import in_own_process, process_memory
from .timing import machine_load, paired_times

LAYERS = {'caps': (False, False), 'xnodr': (True, False), 'xnidr': (False, True)}
MODES = ('whole', 'lean')
ITERATIONS, IN_DIM, CLASS_DIM = 3, 8, 16


@dataclass(frozen=True)
class Case:
    """One measurement: layer, batch B, capsules N, classes J."""

    layer: str
    batch: int
    capsules: int
    classes: int

    def inputs(self) -> Tuple[torch.Tensor, torch.Tensor]:
        g = torch.Generator().manual_seed(0)
        x = torch.randn(self.batch, self.capsules, IN_DIM, generator=g).relu()
        weight = 0.1 * torch.randn(self.capsules, self.classes, IN_DIM, CLASS_DIM, generator=g)
        return x.requires_grad_(), weight.requires_grad_()

    def route(self, x: torch.Tensor, weight: torch.Tensor, memory: str) -> torch.Tensor:
        return dynamic_routing(x, weight, ITERATIONS, *LAYERS[self.layer], memory)


def _step(case: Case, x: torch.Tensor, weight: torch.Tensor, memory: str) -> torch.Tensor:
    x.grad = weight.grad = None
    v = case.route(x, weight, memory)
    v.square().sum().backward()
    return v.detach()


def peak_memory(case: Case, memory: str, threads: int = 1, train: bool = True) -> Tuple[float, float]:
    """MiB above inputs and weights, of inference and of a training step; to be called in a process of its own."""
    torch.set_num_threads(threads)
    small = Case(case.layer, 1, 2, 3)
    _step(small, *small.inputs(), memory)  # what torch allocates once
    x, weight = case.inputs()
    before = process_memory('VmRSS')
    with torch.no_grad():
        case.route(x, weight, memory)
    inference = process_memory('VmHWM') - before
    if train:
        _step(case, x, weight, memory)
    return max(inference, 0.), max(process_memory('VmHWM') - before, 0.)


def largest_difference(case: Case) -> float:
    """Between whole and lean, over values and both gradients, each relative to its largest magnitude."""
    results = []
    for memory in MODES:
        x, weight = case.inputs()
        v = _step(case, x, weight, memory)
        assert x.grad is not None and weight.grad is not None
        results.append((v, x.grad, weight.grad))
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(*results))


def times(case: Case, rounds: int) -> List[float]:
    """Median milliseconds: inference whole and lean, training step whole and lean."""
    x, weight = case.inputs()
    with torch.no_grad():
        whole, lean = (partial(case.route, x, weight, mode) for mode in MODES)
        inference = paired_times(whole, lean, rounds=rounds, warmup=1)
    whole, lean = (partial(_step, case, x, weight, mode) for mode in MODES)
    training = paired_times(whole, lean, rounds=rounds, warmup=1)
    return [1000 * statistics.median(side) for side in (*inference, *training)]


def network_peak(name: str, batch: int, classes: int, size: int, threads: int) -> float:
    """MiB of the whole process after two training steps of a network; to be called in a process of its own."""
    torch.set_num_threads(threads)
    ensure_registered(name)
    step = training_step(timm.create_model(name, num_classes=classes), torch.randn(batch, 3, size, size))
    for _ in range(2):
        step()
    return process_memory('VmHWM')


def measure_network(name: str, batch: int, classes: int, size: int) -> None:
    """Print the line of a network."""
    peak = in_own_process(network_peak, name, batch, classes, size, torch.get_num_threads())
    print(f'{name}, {classes:,} classes, batch {batch}, {size} px: training takes {peak / 1024:.2f} GiB, all of the '
          f'process ({machine_load()})', flush=True)


def measure(case: Case, rounds: int) -> None:
    """Print the line of one case."""
    peaks = [in_own_process(peak_memory, case, mode, torch.get_num_threads()) for mode in MODES]
    (whole_inference, whole_training), (lean_inference, lean_training) = peaks
    ms = times(case, rounds)
    memory = f'{whole_inference:9,.0f} {lean_inference:6,.0f} {whole_training:9,.0f} {lean_training:6,.0f}'
    time = f'{ms[0]:11,.1f} {ms[1]:8,.1f} {ms[2]:11,.1f} {ms[3]:8,.1f}'
    print(f'{case.classes:8,d} {memory} {time}   {largest_difference(case):.1e}', flush=True)


def main(argv: Optional[List[str]] = None) -> int:
    """``timm-spinal bench routing``."""
    parser = Parser('timm-spinal bench routing', __doc__)
    parser.add_argument('--classes', type=number(low=2), nargs='+', default=[10, 100, 1000, 10_000], metavar='J')
    parser.add_argument('--layer', default='xnodr', choices=list(LAYERS))
    parser.add_argument('-b', '--batch-size', type=number(), default=16)
    parser.add_argument('--capsules', type=number(), default=128, help='input capsules (default: %(default)s)')
    parser.add_argument('--rounds', type=number(), default=2, help='pairs of calls (default: %(default)s)')
    parser.add_argument('--network', metavar='MODEL', help='a network of timm instead of a layer')
    parser.add_argument('--img-size', type=number(), default=64, help='pixels, of --network (default: %(default)s)')
    args = parser.parse_args(argv)

    if args.network:
        for classes in args.classes:
            measure_network(args.network, args.batch_size, classes, args.img_size)
        return 0
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads, {args.layer}, batch {args.batch_size}, '
          f'{args.capsules} x {IN_DIM} capsules to J x {CLASS_DIM}, {machine_load()}')
    print('         peak MiB, inference  peak MiB, training   ms, inference        ms, training         largest')
    print(' classes     whole   lean     whole   lean       whole     lean       whole     lean   difference')
    for classes in args.classes:
        measure(Case(args.layer, args.batch_size, args.capsules, classes), args.rounds)
    return 0


if __name__ == '__main__':
    sys.exit(main())
