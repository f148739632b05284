"""Packed capsule layers, which compute with bits, against the float ones, in turns in one run.

    timm-spinal bench xnor                            # capsules 128 and 256, classes 10 to 1,000, batch 1, 32 and 256
    timm-spinal bench xnor --layer xnidr --capsules 128
    timm-spinal bench xnor --threads 1 --classes 10 -b 32 --models

Product, of XnODR alone: the projector; torch.bmm of xnorized float32, which gives u_hat in float32, against XOR and
popcount of packed x and W (the packing of x counts), which gives its sums P in bytes, the scales being apart. Both
sides write into memory that is there. Head: feature map of 7 x 7 to scores, the papers' primary block included
(MobileNetV2's with 128 capsules, ResNet's with 256). 'prepared' is a float head whose W was xnorized before, which
the float head does in every call. Milliseconds are medians, ratios medians of the ratios of each round. At the end,
what share the capsule layer has of whole networks.
"""

import copy
import statistics
import sys
from dataclasses import dataclass
from typing import Any, Callable, List, Optional, Sequence, Tuple

import timm
import torch
from torch import nn

from ..arguments import Parser, number
from ..layers import create_head, xnor_backend, xnorize
from ..layers.xnor import pack_signs
from ..layers.xnor.library import run
from ..models import ensure_registered, pack_xnodr
from .heads import count_macs
from .timing import machine_load, paired_ratio, times_in_turns

LAYERS = ('xnodr', 'xnidr')
IN_DIM, CLASS_DIM, ITERATIONS = 8, 16, 3
PRIMARY = {128: ('depthwise', 1280), 256: ('bottleneck', 2048)}  # the papers' block and its channels
LARGEST = 2 ** 27  # predictions of a product: 512 MiB of floats
LONG = 20.  # seconds of a round of all sides
PRODUCT_TARGET, HEAD_TARGET = 2., 1.5  # from batch 32 with 10 and 100 classes; XnODR at 1,000 classes
SHARED_MODELS = ('mobilenetv2_100_xnodr', 'resnet50_xnodr')


@dataclass(frozen=True)
class Case:
    """One line: capsules N, classes J, batch B."""

    capsules: int
    classes: int
    batch: int

    @property
    def predictions(self) -> int:
        return self.batch * self.capsules * self.classes * CLASS_DIM


@dataclass(frozen=True)
class Comparison:
    """Median milliseconds of each side, and ratios of the sides to the last one."""

    milliseconds: Tuple[float, ...]
    ratios: Tuple[float, ...]


def compare(calls: Sequence[Callable[[], object]], seconds: float) -> Comparison:
    """Time sides in turns for about so many seconds, 3 to 100 rounds after a first one; 1 where a round takes long."""
    first = sum(times[0] for times in times_in_turns(calls, rounds=1, warmup=0))
    least = 1 if first > LONG else 3
    times = times_in_turns(calls, max(least, min(100, int(seconds / first))), warmup=0)
    return Comparison(
        milliseconds=tuple(1000 * statistics.median(side) for side in times),
        ratios=tuple(paired_ratio(side, times[-1]).median for side in times[:-1]),
    )


def projector_calls(case: Case) -> List[Callable[[], torch.Tensor]]:
    """u_hat (N, B, J D) in float32, and P (B, N, J, D) in int8."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(case.batch, case.capsules, IN_DIM, generator=g).relu()
    weight = 0.1 * torch.randn(case.capsules, case.classes, IN_DIM, CLASS_DIM, generator=g)
    bits, _ = pack_signs(weight)
    floats = xnorize(x, 2).transpose(0, 1).contiguous()
    matrices = xnorize(weight, 2).transpose(1, 2).flatten(2)
    theirs = torch.empty(case.capsules, case.batch, case.classes * CLASS_DIM)
    ours = torch.empty(case.batch, case.capsules, case.classes, CLASS_DIM, dtype=torch.int8)
    return [
        lambda: torch.bmm(floats, matrices, out=theirs),
        lambda: run('products', x, bits, None, ours, case.capsules, IN_DIM, case.classes, CLASS_DIM),
    ]


def make_head(layer: str, case: Case) -> Any:
    """A float head with weights of a size that training gives them."""
    primary, channels = PRIMARY.get(case.capsules, ('depthwise', 1280))
    head: Any = create_head(layer, channels, case.classes, primary=primary, capsules=case.capsules).eval()
    nn.init.normal_(head.fc.weight, 0., 0.1, generator=torch.Generator().manual_seed(0))
    return head


def head_calls(layer: str, case: Case) -> List[Callable[[], object]]:
    """Float, prepared (XnODR only), packed."""
    head = make_head(layer, case)
    heads = [head]
    if layer == 'xnodr':
        prepared = copy.deepcopy(head)
        prepared.fc.weight.data = xnorize(head.fc.weight.data, 2)
        prepared.fc.xnor_projector = False
        heads.append(prepared)  # with float x, which costs the same
    packed = copy.deepcopy(head)
    packed.pack()
    x = torch.randn(case.batch, head.in_features, 7, 7, generator=torch.Generator().manual_seed(1))
    return [lambda h=h: h(x) for h in (*heads, packed)]  # type: ignore[misc]


def measure(layer: str, case: Case, seconds: float) -> bool:
    """Print the line of a case; whether it keeps the targets."""
    kept = True
    columns = [f'{case.capsules:8d} {case.classes:7,d} {case.batch:5d}']
    if layer != 'xnodr' or case.predictions > LARGEST or xnor_backend() == 'torch':
        columns.append(f'{"-":>10} {"-":>9} {"-":>6}')
    else:
        found = compare(projector_calls(case), seconds)
        columns.append('{:10.3f} {:9.3f} {:6.2f}'.format(*found.milliseconds, *found.ratios))
        kept = case.batch < 32 or case.classes > 100 or found.ratios[0] >= PRODUCT_TARGET
    found = compare(head_calls(layer, case), seconds)
    columns += [f'{ms:10.3f}' for ms in found.milliseconds] + [f'{ratio:6.2f}' for ratio in found.ratios]
    kept &= found.ratios[-1] >= (HEAD_TARGET if layer == 'xnodr' and case.classes >= 1000 else 1.)
    print(' '.join(columns) + ('' if kept else '  missed'), flush=True)
    return kept


def print_counts(capsules: int, classes: int) -> None:
    """Work for one image: the projector in floats or bits, and the rest of routing, which is float."""
    products = capsules * classes * IN_DIM * CLASS_DIM
    agreement = capsules * classes * CLASS_DIM
    print(f'{capsules} capsules, {classes:,} classes: projector {products:,} MACs, or {products:,} bit products '
          f'({products // 64:,} OPs at 64 a MAC), made in each of {ITERATIONS} iterations when packed; '
          f'an agreement {agreement:,} MACs or bit products ({agreement // 64:,} OPs), '
          f'a weighted sum {agreement:,} MACs')


def print_share(name: str, classes: int, batch: int, seconds: float) -> None:
    """What the capsule layer is of a whole network at 224 pixels."""
    ensure_registered(name)
    model: Any = timm.create_model(name, num_classes=classes).eval()
    packed: Any = pack_xnodr(copy.deepcopy(model))
    images = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    head = model.attached_head
    capsules = head(model.pooled(model.forward_features(images), False), pre_logits=True).unflatten(1, (-1, IN_DIM))
    layers = compare([lambda: head.fc(capsules), lambda: packed.attached_head.fc(capsules)], seconds)
    networks = compare([lambda: model(images), lambda: packed(images)], seconds)
    total, part = count_macs(model, images[:1]), count_macs(head.fc, capsules[:1])
    print(f'{name}, {classes} classes, batch {batch}: float {networks.milliseconds[0]:.1f} ms, packed '
          f'{networks.milliseconds[1]:.1f} ms; its capsule layer {layers.milliseconds[0]:.2f} and '
          f'{layers.milliseconds[1]:.2f} ms, {100 * layers.milliseconds[0] / networks.milliseconds[0]:.1f} % of the '
          f'float time and {100 * part / total:.2f} % of {total / 1e6:,.1f} M MACs', flush=True)


def main(argv: Optional[List[str]] = None) -> int:
    """``timm-spinal bench xnor``: returns 1 where a target is missed."""
    parser = Parser('timm-spinal bench xnor', __doc__)
    parser.add_argument('--layer', default='xnodr', choices=LAYERS)
    parser.add_argument('--capsules', type=number(), nargs='+', default=[128, 256], metavar='N')
    parser.add_argument('--classes', type=number(low=2), nargs='+', default=[10, 100, 1000], metavar='J')
    parser.add_argument('-b', '--batch-size', type=number(), nargs='+', default=[1, 32, 256], metavar='B')
    parser.add_argument('--threads', type=number(), nargs='+', default=sorted({1, torch.get_num_threads()}))
    parser.add_argument('--models', nargs='*', default=list(SHARED_MODELS), help='whole networks')
    parser.add_argument('--seconds', type=number(float, 0), default=1., help='of a measurement (default: %(default)s)')
    args = parser.parse_args(argv)
    kept = True
    with torch.inference_mode():
        for threads in args.threads:
            torch.set_num_threads(threads)
            print(f'torch {torch.__version__}, {threads} threads, {args.layer}, bits by {xnor_backend()}, '
                  f'{machine_load()}')
            prepared = ('   prepared', ' ratio') if args.layer == 'xnodr' else ('', '')
            print('capsules classes batch    bmm ms   bits ms  ratio  head float'
                  f'{prepared[0]}     packed  ratio{prepared[1]}')
            for capsules in args.capsules:
                for classes in args.classes:
                    for batch in args.batch_size:
                        kept &= measure(args.layer, Case(capsules, classes, batch), args.seconds)
            for model in args.models:
                for batch in (1, 8):
                    print_share(model, 10, batch, args.seconds)
    for capsules in args.capsules:
        for classes in args.classes:
            print_counts(capsules, classes)
    return int(not kept)


if __name__ == '__main__':
    sys.exit(main())
