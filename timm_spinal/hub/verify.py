"""Check what is published: fetch it, load it, compare with its golden tensors, measure its accuracy again.

    timm-spinal verify me/resnet50_pspinal.pets
    timm-spinal verify me/resnet50_pspinal.pets@v1 --data-dir my/pets        also the accuracy that the card names
    timm-spinal verify folder                                               of a dry run

Everything is fetched into an empty cache. The accuracy is measured on the split that the card names, with the recipe's
data options; --data-dir says where the data are, or --dataset where they need no folder.
"""
import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import Sequence

from huggingface_hub import HfApi

from timm_spinal.arguments import Parser, number
from timm_spinal.errors import UserError
from timm_spinal.evaluation.metrics import TITLES
from timm_spinal.models.hub_checksums import is_damaged
from timm_spinal.training.config import TrainConfig
from timm_spinal.training.parser import load_yaml
from timm_spinal.validate import validate

from .card_check import check_card
from .download import download
from .measure import evaluation, tolerance
from .options import check_repo_name
from .package import CARD, FILES, HPARAMS, check_package
from .retry import Say, with_retries
from .scores import stated_accuracy


def main(argv: Sequence[str] | None = None) -> int:
    """``timm-spinal verify``; returns the exit code.

    Raises:
        UserError: It is not what it should be; one line.
    """
    args = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory(prefix='timm_spinal_hub_') as cache:
        folder = Path(args.name) if Path(args.name).is_dir() else fetch(args.name, Path(cache), print)
        difference = check_package(folder, args.name)
        print(f'{args.name}: loads, card complete, golden tensors differ by {difference:.1e} of their greatest value')
        if args.data_dir or args.dataset:
            print(check_accuracy(folder, args))
    return 0


def _parser() -> Parser:
    parser = Parser('timm-spinal verify', __doc__)
    parser.add_argument('name', metavar='OWNER/NAME[@REVISION]', help='repository on the Hub, or folder of a dry run')
    parser.add_argument('--data-dir', default='', help='folder with the data of the recipe')
    parser.add_argument('--dataset', default='', help="source of the data, where it is not the recipe's")
    parser.add_argument('--dataset-download', action='store_true', help='allow the source to download')
    parser.add_argument('--batch-size', type=number(), default=128, help='images per step')
    parser.add_argument('--workers', type=number(low=0), default=4, help='loader processes')
    return parser


def fetch(name: str, cache: Path, say: Say) -> Path:
    """All files of a publication, of one commit; returns the folder that holds them.

    Raises:
        UserError: The repository cannot be had, or a file came damaged.
    """
    repo, _, revision = name.partition('@')
    check_repo_name(repo, 'verify')
    api = HfApi(library_name='timm_spinal')
    info = with_retries(lambda: api.model_info(repo, revision=revision or None), name, say)
    names = [s.rfilename for s in info.siblings or [] if s.rfilename in FILES]
    if CARD not in names:
        raise UserError(f'{name}: has no {CARD}, so timm-spinal publish did not write it')
    folder = download(repo, str(info.sha), names, cache, say)
    for file in names:
        if is_damaged(folder / file):
            raise UserError(f'{name}: {file} was damaged in the download (its checksum is not that of the '
                            f'Hub); try again')
    return folder


def check_accuracy(folder: Path, args: argparse.Namespace) -> str:
    """Measure the accuracy that a card names again; returns a line on it.

    Raises:
        UserError: The card names none, the data cannot be had, or the accuracy is another one.
    """
    if not (folder / HPARAMS).is_file():
        raise UserError(f'{args.name}: has no {HPARAMS}, so its data options are not known; leave out --data-dir')
    recipe = TrainConfig(**load_yaml(folder / HPARAMS))
    config, split = evaluation(recipe, folder, args)
    stated = stated_accuracy(check_card((folder / CARD).read_text(encoding='utf-8')), split)
    if stated is None:
        raise UserError(f'{args.name}: its card names no accuracy of {split}; leave out --data-dir')
    name, expected = stated
    row = validate(config)[0]
    found, allowed = row.get(name, math.nan), tolerance(row['images'])
    if not abs(found - expected) <= allowed:
        raise UserError(f'{args.name}: {TITLES[name]} on {split} is {found:.2f} %, the card says {expected:.2f} %, and '
                        f'hardware explains {allowed:.2f} at most; are these the data of the recipe?')
    return f'{args.name}: {TITLES[name]} on {split} is {found:.2f} %, as the card says ({expected:.2f} %)'


if __name__ == '__main__':
    from timm_spinal.cli import guard
    sys.exit(guard(main, sys.argv[1:]))
