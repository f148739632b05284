"""Time of something over that of something else, both sides in turns in one run.

    timm-spinal bench                                        lists the prepared comparisons
    timm-spinal bench ic --rounds 40                         one of them
    timm-spinal bench train vgg5_pspinal --img-size 28 -b 128            the same for another model
    timm-spinal bench resnet50_pspinal                       a model against the plain one beside it
    timm-spinal bench convnext_atto_mlp resnet18 --forms eager compiled  any two models; of more, each against the last

A ratio is the median of the ratios of all rounds, with the least and the greatest; below 1 the first side is faster.
"""
import difflib
import logging
import sys
from functools import partial
from typing import Callable, NamedTuple, Sequence

import timm
import torch

from timm_spinal.arguments import Parser, number
from timm_spinal.errors import UserError
from timm_spinal.models import ensure_registered

from .layers import head_call, routing_call
from .loops import bare_backbone, bare_steps, features, our_epochs, timm_epochs
from .models import FORMS, pairs_of, plain_model
from .runner import Pair, Setting, Side, run


class Comparison(NamedTuple):
    """A prepared comparison: what it answers, its pairs for names of models, these names, and its own defaults."""
    title: str
    pairs: Callable[[Sequence[str]], list[Pair]]
    models: tuple[str, ...] = ()
    defaults: dict[str, int] = {}


def _against_plain(models: Sequence[str], forms: Sequence[str] = ('eager',)) -> list[Pair]:
    return [pair for name in models for pair in pairs_of(name, plain_model(name), forms)]


def _routing(models: Sequence[str]) -> list[Pair]:
    return [
        Pair(Side('lean routing', routing_call, ('xnodr', classes, 'lean', train)),
             Side('whole routing', routing_call, ('xnodr', classes, 'whole', train)),
             f'{classes:,} classes, {"training" if train else "inference"}')
        for classes in (10, 100, 1000, 10_000) for train in (False, True)
    ]


def _xnor(models: Sequence[str]) -> list[Pair]:
    heads = [
        Pair(Side(f'packed {layer} head', head_call, (layer, classes, True)),
             Side(f'float {layer} head', head_call, (layer, classes, False)), f'{classes:,} classes')
        for layer in ('xnodr', 'xnidr') for classes in (10, 100, 1000)
    ]
    return heads + _against_plain(models, ('eager', 'packed'))


def _loops(first: Side, second: Side, models: Sequence[str]) -> list[Pair]:
    return [Pair(first._replace(args=(name, *first.args)), second._replace(args=(name, *second.args)), name)
            for name in models]


EVERY = ('eager', 'compiled', 'folded', 'training', 'compiled training')
SMALL_IMAGES = dict(batch_size=128, img_size=28, batches=64, rounds=9)
COMPARISONS = {
    'heads': Comparison('models with a head against the plain ones, at inference',
                        partial(_against_plain, forms=('eager', 'compiled')), ('resnet50_pspinal', 'resnet18_spinal')),
    'ic': Comparison('models with inter-layer collision against the plain ones',
                     partial(_against_plain, forms=EVERY), ('icresnet50',)),
    'basis': Comparison('models with shared filter bases against the plain ones',
                        partial(_against_plain, forms=(*EVERY, 'merged')), ('resnet34_sb_s32u1', 'resnet34_sb_s48u1d')),
    'routing': Comparison('capsule routing in chunks against routing that keeps all predictions', _routing,
                          defaults=dict(batch_size=16, rounds=3)),
    'xnor': Comparison('capsule heads that compute with bits against float ones', _xnor, ('mobilenetv2_100_xnodr',)),
    'train': Comparison("an epoch of this trainer against one of timm's train.py",
                        partial(_loops, Side('our epoch', our_epochs), Side("timm's epoch", timm_epochs)),
                        ('resnet18',), dict(batch_size=16, rounds=9)),
    'step': Comparison("an epoch of this trainer against its bare steps on a batch in memory",
                       partial(_loops, Side('our epoch', our_epochs), Side('bare steps', bare_steps)),
                       ('spinalcnn_a1', 'vgg5'), SMALL_IMAGES),
    'data': Comparison('an epoch with the images on the device against one through the loader',
                       partial(_loops, Side('our epoch', our_epochs), Side('our epoch by the loader', our_epochs,
                                                                           ('never',))),
                       ('spinalcnn_a1',), SMALL_IMAGES),
    'features': Comparison('the features of `timm-spinal compare` against the bare backbone',
                           partial(_loops, Side('features', features), Side('bare backbone', bare_backbone)),
                           ('tf_efficientnet_lite0',), dict(batch_size=128, img_size=128, rounds=3, workers=2)),
}


def main(argv: list[str] | None = None) -> int:
    """``timm-spinal bench``; returns the exit code."""
    listing = '\n'.join(f'  {name:10}{comparison.title}' for name, comparison in COMPARISONS.items())
    parser = Parser('timm-spinal bench', f'{__doc__}\nprepared comparisons:\n{listing}\n')
    parser.add_argument('names', nargs='*', metavar='NAME', help='a comparison, models for it, or models alone')
    parser.add_argument('-b', '--batch-size', type=number(), help='images of a call; 8, or as the comparison has it')
    parser.add_argument('--img-size', type=number(low=8), help='pixels of an image; 224, or as the comparison has it')
    parser.add_argument('--rounds', type=number(), help='rounds that count; 20, or as the comparison has it')
    parser.add_argument('-j', '--workers', type=number(low=0), help='loader workers of train, step, data and features')
    parser.add_argument('--batches', type=number(), help='batches of an epoch; 8, or as the comparison has it')
    parser.add_argument('--no-aug', action='store_true', help='epochs without augmentation')
    parser.add_argument('--threads', type=number(), default=torch.get_num_threads(),
                        help="CPU threads; 1 is steadier on a busy machine (default: torch's, %(default)s)")
    parser.add_argument('--device', default='cpu', help='device of both sides (default: %(default)s)')
    parser.add_argument('--forms', nargs='+', choices=list(FORMS), help='forms of models (default: eager)')
    parser.add_argument('--memory', action='store_true', help='peak memory of a call too, in processes of their own')
    args = parser.parse_args(argv)
    if not args.names:
        print(parser.format_help())
        return 0
    given = {k: v for k, v in vars(args).items() if k in Setting.__annotations__ and v is not None}
    comparison = COMPARISONS.get(args.names[0])
    setting = Setting(**{**(comparison.defaults if comparison else {}), **given})
    pairs = _pairs(args.names, args.forms)
    _check_device(args.device)
    logging.getLogger('timm').setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    run(pairs, setting, args.memory, progress=sys.stderr.isatty())
    return 0


def _pairs(names: Sequence[str], forms: Sequence[str] | None) -> list[Pair]:
    """The pairs that the names of a command line ask for.

    Raises:
        UserError: No such comparison or model, or one that has no plain model beside it.
    """
    first, *models = names
    comparison = COMPARISONS.get(first)
    for name in models if comparison else names:
        _check_model(name)
    if comparison is None:
        pairs = [pair for name in names[:-1] for pair in pairs_of(name, names[-1], forms or ('eager',))]
        return pairs or _against_plain(names, forms or ('eager',))
    if models and not comparison.models:
        raise UserError(f'bench {first}: it measures layers and takes no models; leave out {" ".join(models)}')
    pairs = comparison.pairs(models or comparison.models)
    if forms:
        pairs = [pair for pair in pairs if pair.form in forms]
        if not pairs:
            raise UserError(f'--forms {" ".join(forms)}: the comparison {first} has none of these forms; give names of '
                            f'models instead of {first}')
    return pairs


def _check_model(name: str) -> None:
    if ensure_registered(name):
        return
    near = difflib.get_close_matches(name, [*COMPARISONS, *timm.list_models()], n=1)
    hint = f'did you mean {near[0]}?' if near else 'see timm-spinal list, and timm.list_models()'
    raise UserError(f'{name}: neither a comparison nor a model has this name; {hint}')


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f'--device {name}: torch finds no such device on this machine; use cpu, or another '
                        'device') from e


if __name__ == '__main__':
    sys.exit(main())
