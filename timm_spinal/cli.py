"""The `timm-spinal` command: one verb per capability.

    timm-spinal train --config configs/quickstart.yaml       the same as: accelerate launch -m timm_spinal.train ...
    timm-spinal validate --model local-dir:RUN --data-dir my/images
    timm-spinal list '*pspinal'
    timm-spinal plot output/train/plain output/train/wld --to-accuracy 85
    timm-spinal coverage
    timm-spinal bench resnet50_pspinal

Bad input ends with one line and exit code 2; `--debug` shows the traceback.
"""
import difflib
import importlib
import inspect
import logging
import os
import sys
from typing import Callable, NamedTuple, Sequence

from timm_spinal.arguments import Parser
from timm_spinal.errors import StopRequested, UserError
from timm_spinal.version import __version__


class Verb(NamedTuple):
    """Where a verb lives: a module with a function ``(argv) -> exit code``."""
    module: str
    function: str
    help: str


VERBS = {
    'train': Verb('timm_spinal.train', 'run', 'train a model'),
    'train-detection': Verb('timm_spinal.detection.train', 'run', 'train an object detector'),
    'validate': Verb('timm_spinal.validate', 'run', 'measure loss and accuracy of models'),
    'predict': Verb('timm_spinal.see.predict', 'run', 'say what is on pictures'),
    'explain': Verb('timm_spinal.see.explain', 'run', 'show where a model looked in a picture'),
    'demo': Verb('timm_spinal.see.demo', 'run', 'open a page in the browser that answers to pictures'),
    'pack': Verb('timm_spinal.pack', 'run', 'store the binary head of an XnODR or XnIDR model in bits'),
    'active-share': Verb('timm_spinal.active_share', 'run', 'print how often each collision of an IC model is active'),
    'env': Verb('timm_spinal.env', 'run', 'print versions, and what computes packed heads'),
    'list': Verb('timm_spinal.cli', 'list_models', 'list the models that this package adds to timm'),
    'coverage': Verb('timm_spinal.coverage', 'main', 'list the timm models that can take a head'),
    'compare': Verb('timm_spinal.compare.cli', 'main', 'compare heads, or any other options, on your data'),
    'plot': Verb('timm_spinal.compare.plot', 'main', 'plot curves of runs, and find when each reached an accuracy'),
    'gradflow': Verb('timm_spinal.compare.gradflow', 'main', 'plot how a penalty changes gradients of shared filters'),
    'gram': Verb('timm_spinal.compare.gram', 'main', 'plot how orthonormal the shared filters of trained models are'),
    'publish': Verb('timm_spinal.hub.cli', 'main', 'publish a run on the Hugging Face Hub'),
    'export': Verb('timm_spinal.hub.export_cli', 'main', 'export models to ONNX or torch.export, and check the files'),
    'verify': Verb('timm_spinal.hub.verify', 'main', 'check what is published on the Hub'),
    'bench': Verb('timm_spinal.bench.cli', 'main', 'measure how fast models and layers are, compared with others'),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return guard(_dispatch, argv)


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ('-h', '--help'):
        print(_help(VERBS))
        return 0
    if argv[0] in ('-V', '--version'):
        print(f'timm-spinal {__version__}')
        return 0
    name = argv[0]
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, n=1)
        hint = f'did you mean {near[0]}?' if near else f'known are {", ".join(VERBS)}'
        raise UserError(f'unknown command {name!r}; {hint}')
    verb = VERBS[name]
    return getattr(importlib.import_module(verb.module), verb.function)(argv[1:])


def _help(verbs: dict[str, Verb]) -> str:
    width = max(map(len, verbs)) + 2
    rows = [f'  {name:{width}}{verb.help}' for name, verb in verbs.items()]
    return '\n'.join(['usage: timm-spinal COMMAND [options]', '', *rows, '', 'timm-spinal COMMAND --help shows more'])


def guard(function: Callable[[list[str]], int], argv: list[str]) -> int:
    """Call a verb and turn what a user can mend, and signals, into one line and an exit code.

    Under several processes an error that all of them meet is printed by the main one only.
    """
    first = os.environ.get('RANK', '0') == '0'
    logger = logging.getLogger('timm_spinal')
    level = logger.level
    if not first:  # all processes would warn of the same
        logger.setLevel(logging.ERROR)
    try:
        return function(argv)
    except UserError as e:
        if '--debug' in argv:
            raise
        if first or getattr(e, 'local', False):
            print(f'error: {e}', file=sys.stderr, flush=True)
        return 2
    except StopRequested as e:
        if first:
            print(f'{e}: continue with --resume', file=sys.stderr, flush=True)
        return 128 + e.signum
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output went away, as in `timm-spinal list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    finally:
        logger.setLevel(level)
        _leave_process_group()


def _leave_process_group() -> None:
    """End the threads of the process group: left to the interpreter's exit, they now and then abort the process."""
    if 'torch' in sys.modules:  # verbs that need no torch do not wait for its import
        from torch import distributed
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()


def list_models(argv: list[str]) -> int:
    """Names of the models that this package adds to timm.

        timm-spinal list
        timm-spinal list '*pspinal'
        timm-spinal list --pretrained 'spinalcnn*'
    """
    parser = Parser('timm-spinal list', inspect.getdoc(list_models))
    parser.add_argument('filter', nargs='?', default='', help="wildcard, for instance '*pspinal'")
    parser.add_argument('--pretrained', action='store_true',
                        help='only names with weights, with their tags; those that need no network are marked')
    args = parser.parse_args(argv)
    import timm

    import timm_spinal
    names = timm_spinal.list_models(args.filter, pretrained=args.pretrained)
    if not names:
        raise UserError(f"no model of this package matches {args.filter!r}; put wildcards in quotes, as in '*spinal*'")
    for name in names:
        inside = args.pretrained and timm.get_pretrained_cfg_value(name, 'file')
        print(f'{name}  (in the package, needs no network)' if inside else name)
    return 0


if __name__ == '__main__':
    sys.exit(main())
