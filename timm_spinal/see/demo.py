"""A page in the browser: give it a picture, see the answer, and where the model looked.

    timm-spinal demo output/train/RUN                                on http://127.0.0.1:7860, for this machine alone
    timm-spinal demo output/train/RUN --beside resnet50              with a second model
    timm-spinal demo output/train/RUN --space out/space              a folder for a Space of the Hugging Face Hub
    timm-spinal publish output/train/RUN --repo me/x --space me/x-demo       model and Space in one go

The page needs no network. Pictures that are uploaded are kept in a folder of their own, deleted after some minutes and
when the page is closed. It shows pictures of the run's validation split to try, where they still are.
"""
import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any, Iterator, Sequence

import numpy as np
import torch
from PIL import Image

from timm_spinal.arguments import Parser, number
from timm_spinal.cli import guard
from timm_spinal.errors import UserError
from timm_spinal.evaluation.figures import draw_boxes
from timm_spinal.hub.space import write_space
from timm_spinal.training.config import ValidateConfig
from timm_spinal.training.image_files import shown
from timm_spinal.training.parser import load_yaml
from timm_spinal.training.pixels import UNREADABLE
from timm_spinal.training.splits import create_datasets

from .explain import explain
from .opened import OnnxModel, Opened, open_any
from .pictures import find_pictures
from .predict import THRESHOLD, TOPK, accelerator_on

LOOPBACK = '127.0.0.1'
MOST_BYTES, MOST_PIXELS = 20_000_000, 50_000_000  # of an upload
EVERY, KEPT = 60, 300  # seconds: how often uploads are looked through, and after how many they are deleted
EXAMPLES = 8


def check_installed() -> None:
    """Refuse to go on without Gradio.

    Raises:
        UserError: Says how to install it.
    """
    if importlib.util.find_spec('gradio') is None:
        raise UserError("demo: the package gradio is not installed; pip install 'timm-spinal[demo]'")


# ---- answers --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def answer(opened: Opened, path: str) -> tuple[dict[str, float], Image.Image | None]:
    """Probabilities of the likeliest classes by name, and the picture with a heat map, or with boxes of a detector.

    There is no heat map for a model that has no feature map, or without the package grad-cam.

    Raises:
        UserError: The picture cannot be read, or has too many bytes or pixels.
    """
    _check_size(path)
    image = opened.read(path)
    device = next(opened.model.parameters(), torch.zeros(0)).device
    x = opened.transform(image).to(device)
    if opened.detector:
        found = opened.model([x])[0]
        kept = found['scores'] >= THRESHOLD
        names = [opened.label(int(label) - 1) for label in found['labels'][kept]]
        scores = found['scores'][kept].tolist()
        named = [f'{name} {100 * score:.0f} %' for name, score in zip(names, scores)]
        best = dict(zip(reversed(names), reversed(scores)))  # of boxes of one name the best counts
        return best, draw_boxes(image, found['boxes'][kept].tolist(), named)
    output = opened.model(x.unsqueeze(0))
    output = output[0] if isinstance(output, (tuple, list)) else output
    top = output[0].float().softmax(0).topk(min(TOPK, len(opened.labels)))
    best = {opened.label(i): score for i, score in zip(top.indices.tolist(), top.values.tolist())}
    if isinstance(opened.model, OnnxModel):
        return best, None
    try:
        with torch.inference_mode(False):
            return best, _enlarged(explain(opened, image, int(top.indices[0])).overlay())
    except UserError:
        return best, None


def _enlarged(image: Image.Image, side: int = 320) -> Image.Image:
    scale = max(1., side / max(image.size))
    return image.resize((round(scale * image.width), round(scale * image.height)), Image.Resampling.BICUBIC)


def _check_size(path: str) -> None:
    if os.path.getsize(path) > MOST_BYTES:
        raise UserError(f'the picture has more than {MOST_BYTES // 1_000_000} MB')
    try:
        with Image.open(path) as image:
            if image.width * image.height > MOST_PIXELS:
                raise UserError(f'the picture has {image.width} x {image.height} pixels, more than '
                                f'{MOST_PIXELS // 1_000_000} million')
    except UserError:
        raise
    except UNREADABLE as e:
        raise UserError('the picture cannot be read, or has too many pixels') from e


# ---- the page -------------------------------------------------------------------------------------------------------


def build(models: Sequence[str], examples: Sequence[str] = (), title: str = '') -> Any:
    """The page as Gradio's Blocks.

    Args:
        models: What `open_any` takes, one or two.
        examples: Paths of pictures to try.
        title: Of the page.

    Raises:
        UserError: A model that cannot be opened, or Gradio is missing.
    """
    return page_of([open_any(name) for name in models], examples, title)


def page_of(opened: Sequence[Opened], examples: Sequence[str] = (), title: str = '') -> Any:
    """As `build`, of models that are open."""
    check_installed()
    os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
    import gradio as gr

    with gr.Blocks(title=title or opened[0].name, analytics_enabled=False, delete_cache=(EVERY, KEPT)) as page:
        gr.Markdown(f'# {_plain(title or opened[0].name)}')
        with gr.Row():
            picture = gr.Image(type='filepath', image_mode=None, sources=['upload', 'clipboard'], label='picture',
                             elem_id='picture', height=320)
            # an upload as its path: the model's own decoder reads it, and not before its size is known
            picture.preprocess = lambda payload: payload and payload.path  # type: ignore
            outputs: list[Any] = []
            for i, model in enumerate(opened):
                with gr.Column():
                    if len(opened) > 1:
                        gr.Markdown(f'**{_plain(model.name)}**')
                    outputs.append(gr.Label(num_top_classes=TOPK, label='answer', elem_id=f'answer-{i}'))
                    outputs.append(gr.Image(
                        label='boxes' if model.detector else 'where the model looked', interactive=False,
                        elem_id=f'heat-{i}', height=320, buttons=['download']))

        def respond(path: str | None) -> list[Any]:
            if path is None:
                return [None] * len(outputs)
            try:
                return [value for model in opened for value in answer(model, path)]
            except UserError as e:
                raise gr.Error(str(e).replace(path, 'it'), print_exception=False) from e

        picture.change(respond, picture, outputs, api_name='predict', show_progress='minimal')
        if examples:
            gr.Examples([[example] for example in examples], [picture], cache_examples=False, label='examples')
    return page


def _plain(text: str) -> str:
    """A text that Markdown shows as it is."""
    return ''.join(f'\\{c}' if c in r'\`*_{}[]()#+-.!<>|~$&' else c for c in shown(text))


def serve(page: Any, host: str | None = None, port: int | None = None, share: bool = False, block: bool = True) -> str:
    """Put a page on the web, and give its address.

    Args:
        page: From `build`.
        host: Address to listen on; None: what GRADIO_SERVER_NAME says, else this machine alone.
        port: None: the first free one from 7860 on.
        share: Make it public by a tunnel of Gradio's.
        block: Return when it is closed.
    """
    import gradio as gr
    theme = gr.themes.Default(font=('system-ui', 'sans-serif'), font_mono=('ui-monospace', 'monospace'))
    _, address, shared = page.launch(
        server_name=host, server_port=port, share=share, quiet=True, prevent_thread_lock=True, theme=theme,
        max_file_size=MOST_BYTES, ssr_mode=False, footer_links=[], show_error=True)
    print(f'open {shared or address} in a browser; Ctrl-C ends it', flush=True)
    if block:
        page.block_thread()
    return address


# ---- pictures to try ------------------------------------------------------------------------------------------------


def examples_of(run: Path, folder: Path, count: int = EXAMPLES) -> list[str]:
    """Copies of some pictures of a run's validation split, of different classes; none where they are not there.

    Args:
        run: The run folder.
        folder: Where the copies go.
        count: How many.
    """
    if not (run / 'args.yaml').is_file():
        return []
    try:
        names = ValidateConfig.__dataclass_fields__.keys()
        args = {k: v for k, v in load_yaml(run / 'args.yaml').items() if k in names}
        split = create_datasets(ValidateConfig(**args), train=False).eval
    except (UserError, TypeError):
        return []
    if split.streamed:
        return []
    order = np.arange(len(split)) if split.labels is None else np.argsort(split.labels, kind='stable')
    paths: list[str] = []
    for i in order[np.linspace(0, len(order) - 1, min(count, len(order))).astype(int)]:
        with contextlib.suppress(*UNREADABLE):
            path = folder / f'{len(paths)}.png'
            split.read(int(i))[0].convert('RGB').save(path)
            paths.append(str(path))
    return paths


# ---- command line -------------------------------------------------------------------------------------------------


def run(argv: list[str]) -> int:
    """``timm-spinal demo``."""
    args = _parser().parse_args(argv)
    if args.space:
        if args.beside:
            raise UserError('--beside: a Space has one model; leave it out')
        open_any(args.model)  # what cannot be opened here cannot be opened there
        examples = find_pictures(args.examples)[0] if args.examples else []
        name = write_space(Path(args.space), args.repo and f'hf-hub:{args.repo}' or args.model, examples)
        print(f'{args.space}: a Space that shows {name}; hf upload OWNER/NAME {args.space} . --repo-type space')
        return 0
    if args.repo:
        raise UserError('--repo: is for --space; leave it out')
    check_installed()
    _check_port(args.host, args.port)
    accelerator = accelerator_on(args.device)
    opened = [open_any(name) for name in (args.model, *([args.beside] if args.beside else []))]
    for model in opened:
        model.model.to(accelerator.device)
    with _private_folder() as folder:
        examples = find_pictures(args.examples)[0][:EXAMPLES] if args.examples else examples_of(
            Path(args.model.removeprefix('local-dir:')), folder)
        page = page_of(opened, examples)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that uploads are deleted then too
        try:
            serve(page, args.host, args.port, args.share)
        except OSError as e:
            raise UserError(f'--host {args.host}: cannot be listened on ({e})') from e
        finally:
            page.close(verbose=False)
    return 0


@contextlib.contextmanager
def _private_folder() -> Iterator[Path]:
    """Where Gradio keeps uploads, and examples lie; gone at the end."""
    folder = Path(tempfile.mkdtemp(prefix='timm_spinal_demo_'))
    before = os.environ.get('GRADIO_TEMP_DIR')
    os.environ['GRADIO_TEMP_DIR'] = str(folder)
    try:
        yield folder
    finally:
        os.environ.pop('GRADIO_TEMP_DIR')
        if before is not None:
            os.environ['GRADIO_TEMP_DIR'] = before
        shutil.rmtree(folder, ignore_errors=True)


def _check_port(host: str, port: int | None) -> None:
    with socket.socket(socket.AF_INET6 if ':' in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port or 0))
        except OSError as e:
            raise UserError(f'--host {host} --port {port or "(any)"}: cannot be listened on '
                            f'({e.strerror or e}); choose another --port') from e


def _parser() -> Parser:
    parser = Parser('timm-spinal demo', __doc__)
    parser.add_argument('model', metavar='MODEL', help='run folder, hf-hub:OWNER/NAME, local-dir:FOLDER, a name of '
                        'timm, or an .onnx file')
    parser.add_argument('--beside', default='', metavar='MODEL', help='a second model, whose answers stand beside')
    parser.add_argument('--examples', nargs='+', default=[], metavar='IMAGE', help='pictures to try; not given: some '
                        "of the run's validation split")
    parser.add_argument('--host', default=LOOPBACK, help=f'address to listen on (default: {LOOPBACK}, this machine '
                        'alone; 0.0.0.0: everybody who reaches it)')
    parser.add_argument('--port', type=number(low=1, high=65535), help='port to listen on; not given: the first free '
                        'one from 7860 on')
    parser.add_argument('--share', action='store_true', help="make a public address by Gradio's servers")
    parser.add_argument('--device', default='', help='cpu, cuda, mps, ...; not given: the fastest there is')
    parser.add_argument('--space', default='', metavar='DIR', help='write a new folder for a Space of the Hub, and '
                        'start nothing')
    parser.add_argument('--repo', default='', metavar='OWNER/NAME', help='with --space: where the model is published; '
                        'not given: the weights are copied into the folder')
    return parser


if __name__ == '__main__':
    sys.exit(guard(run, sys.argv[1:]))
