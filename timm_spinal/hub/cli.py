"""Publish a run on the Hugging Face Hub.

    timm-spinal publish runs/my_run --repo me/resnet50_pspinal.pets              weights, config, card, curves, recipe
    timm-spinal publish runs/my_run --repo me/... --dry-run --output folder      the same on disk, nothing is sent
    timm-spinal publish runs/my_run --repo me/... --beside 'runs/other_*'        with other runs in the card's table
    timm-spinal publish runs/my_run --repo me/... --beside output/compare/mine   with the comparison it belongs to
    timm-spinal publish runs/my_run --repo me/... --branch next                 the card loads hf-hub:me/...@next
    timm-spinal publish runs/my_run --repo me/... --head-only                    the head, and which backbone it is for
    timm-spinal publish runs/my_run --repo me/... --space me/demo               and a Space that shows it
    timm-spinal publish runs/my_run --local fashion_mnist                       into this package's source, if small

It is one commit. Before it, the weights are loaded back and the card is checked; after it, everything is downloaded
into an empty cache and compared byte by byte. Publishing the same run again changes nothing. The token is that of
`hf auth login` or HF_TOKEN. For a licence that has no id on the Hub, give --license other, --license-name and
--license-link. Weights in float16 are measured again on the data of the run, and the card has their accuracy.
"""
import argparse
import sys
from pathlib import Path
from typing import Sequence

from timm_spinal.arguments import Parser
from timm_spinal.errors import UserError

from .options import DTYPES, WEIGHTS, PublishOptions, check_repo_name


def main(argv: Sequence[str] | None = None) -> int:
    """``timm-spinal publish``; returns the exit code.

    Raises:
        UserError: Anything a user can mend; one line.
    """
    args = _parser().parse_args(argv)
    options = _options(args)
    from .package import built, hub_name, keep
    from .publication import open_run
    from .publish import check_account, publish
    from .space import publish_space
    if args.local:
        from .packaged import install
        name = install(open_run(args.run, options.weights), options, args.local)
        print(f'{name}: its card is in hub_cards; the weights are not published yet' if args.card_only else
              f'{name}: in timm_spinal/weights and hub_cards; timm.create_model({name!r}, pretrained=True)')
        return 0
    publication = open_run(args.run, options.weights)
    if not args.dry_run:
        options = check_account(options)
    with built(publication, options) as package:
        if args.dry_run:
            output = args.output or args.run / 'hub'
            keep(package.folder, output)
            print(f'{options.repo}: checked; nothing was sent, and the files are in {output}')
            return 0
        published = publish(package, options, f'{publication.architecture} from timm_spinal')
    print(published.line)
    if args.space:
        address = publish_space(args.space, hub_name(published.repo, published.revision), options.private)
        print(f'published {address}')
    return 0


def _parser() -> Parser:
    parser = Parser('timm-spinal publish', __doc__)
    parser.add_argument('run', type=Path, metavar='RUN',
                        help='run folder of the trainer, or weights without their run, as timm-spinal pack or timm '
                        'writes them')
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument('--repo', default='', metavar='OWNER/NAME', help='repository on the Hub')
    where.add_argument('--local', default='', metavar='TAG',
                       help='write the weights as ARCH.TAG into the source tree of this package')
    parser.add_argument('--card-only', action='store_true',
                        help='with --local: only the card, which says that the weights are not published yet')
    parser.add_argument('--head-only', action='store_true',
                        help='send the head alone, with the name and the hash of the weights of its backbone, which '
                        'must have been frozen')
    parser.add_argument('--dry-run', action='store_true', help='make and check the folder, send nothing')
    parser.add_argument('--output', type=Path, metavar='DIR', help='folder of a dry run; not given: RUN/hub')
    parser.add_argument('--license', default='', metavar='ID', dest='licence',
                        help='licence of the weights, an id of the Hub such as apache-2.0; not given: that of the '
                        'weights which training started from')
    parser.add_argument('--license-name', default='', metavar='NAME', dest='licence_name',
                        help='name of a licence that has no id on the Hub, with --license other')
    parser.add_argument('--license-link', default='', metavar='URL', dest='licence_link',
                        help='address of the text of such a licence, or LICENSE, a file of RUN that is published too')
    parser.add_argument('--private', action='store_true', help='make the repository private')
    parser.add_argument('--branch', default='', help='commit to this branch, which is made from main if needed')
    parser.add_argument('--pull-request', action='store_true', help='open a pull request on main')
    parser.add_argument('--space', default='', metavar='OWNER/NAME',
                        help='also make this Space, a page that shows the published model')
    parser.add_argument('--tag', default='', help='git tag for the commit')
    parser.add_argument('--weights', choices=WEIGHTS, default='best',
                        help='best of the run, or raw or ema (moving average) of its last checkpoint')
    parser.add_argument('--dtype', choices=DTYPES, default='fp32', help='number format of the weights')
    parser.add_argument('--data-dir', default='', metavar='DIR',
                        help='where the data of the run are now; fp16 weights are measured on them for the card')
    parser.add_argument('--dataset-id', default='', metavar='OWNER/NAME',
                        help='name of the data set on the Hub, if the run does not name it')
    parser.add_argument('--dataset-name', default='', metavar='TEXT',
                        help='what the card calls the data set; not given: its source, or the name of its folder')
    parser.add_argument('--no-pictures', action='store_false', dest='pictures',
                        help='leave out confusion.png and worst.png, which shows images of your data')
    parser.add_argument('--beside', nargs='+', default=[], metavar='RUN',
                        help='other runs on the same data for the table of results, such as seeds and controls: '
                             'folders, wildcards, or the folder of timm-spinal compare that contains this run')
    return parser


def _options(args: argparse.Namespace) -> PublishOptions:
    if not args.local:
        check_repo_name(args.repo)
    if args.space and (args.local or args.dry_run):
        raise UserError(f'--space {args.space}: needs a model on the Hub; leave out --local and --dry-run, or write '
                        'the folder of a Space with timm-spinal demo --space')
    if args.space:
        check_repo_name(args.space, '--space')
    if args.dataset_id:
        check_repo_name(args.dataset_id, '--dataset-id')
    if args.card_only and not args.local:
        raise UserError('--card-only: works only with --local; add --local, or use --dry-run, which writes a card '
                        'to the disk')
    if args.head_only and args.local:
        raise UserError('--head-only: works only with --repo; leave it out with --local')
    if args.output and not args.dry_run:
        raise UserError(f'--output {args.output}: only --dry-run uses it; add --dry-run, or leave --output out')
    if args.data_dir and args.dtype != 'fp16':
        raise UserError(f'--data-dir {args.data_dir}: it is used only to measure --dtype fp16 weights; add --dtype '
                        'fp16, or leave --data-dir out')
    names = PublishOptions.__dataclass_fields__
    return PublishOptions(**{**{k: v for k, v in vars(args).items() if k in names}, 'beside': tuple(args.beside)})


if __name__ == '__main__':
    from timm_spinal.cli import guard
    sys.exit(guard(main, sys.argv[1:]))
