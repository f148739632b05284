"""What a model says to pictures.

    timm-spinal predict output/train/RUN photo.jpg more/*.png folder/
    timm-spinal predict hf-hub:org/name folder/ --csv out.csv --montage out.png
    timm-spinal predict model.onnx folder/ --json > out.jsonl
    find folder -name '*.jpg' | timm-spinal predict resnet50 -
    accelerate launch -m timm_spinal.see.predict output/train/RUN folder/ --csv out.csv

The model is a run folder, hf-hub:OWNER/NAME, a name of timm, a folder that pack wrote, or an .onnx file of export.
Folders are searched with all folders below them; - takes the paths from standard input. A detector's run finds boxes.
Images that cannot be read are named and counted, the others are answered, and the exit code is 1.
"""
import argparse
import csv
import json
import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import torch
from accelerate import Accelerator
from tqdm import tqdm

from timm_spinal.arguments import Parser, number
from timm_spinal.cli import guard
from timm_spinal.errors import UserError, dead_workers_named
from timm_spinal.evaluation.figures import draw_boxes, draw_sheet
from timm_spinal.files import safe_cell, writing
from timm_spinal.training.config import ValidateConfig
from timm_spinal.training.distributed import new_accelerator, on_main_process
from timm_spinal.training.image_files import shown
from timm_spinal.training.parser import check_output_file
from timm_spinal.training.pixels import UNREADABLE, open_image

from .opened import Opened, open_any, why_unreadable
from .pictures import STDIN, find_pictures, picture_loader

TOPK, THRESHOLD = 5, 0.5
MOST_SHOWN = 36  # pictures of a montage


@dataclass
class Answer:
    """What a model says to a picture.

    Attributes:
        path: The picture.
        classes: Names, the likeliest first; of a detector, of its boxes.
        scores: Probability of each in [0, 1].
        boxes: Of a detector: (x1, y1, x2, y2) in pixels.
        error: Why it cannot be read, else ''.
    """
    path: str
    classes: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    boxes: list[list[float]] | None = None
    error: str = ''


def predict(
        accelerator: Accelerator,
        opened: Opened,
        paths: Sequence[str],
        options: ValidateConfig,
        topk: int = TOPK,
        threshold: float = THRESHOLD,
) -> Iterator[Answer]:
    """Answers to pictures in their order, as they come; all of them on every process.

    Args:
        accelerator: Its processes share the pictures out.
        opened: The model.
        paths: The pictures.
        options: Batch size, workers, memory format.
        topk: Classes of an answer.
        threshold: Least score of a detector's box.
    """
    model = opened.model.to(accelerator.device)
    if options.channels_last:
        model.to(memory_format=torch.channels_last)
    loader = accelerator.prepare(picture_loader(opened, paths, options))
    rows_of = _boxes if opened.detector else _top_classes
    place = 0
    with tqdm(total=len(paths), desc='predict', leave=False, unit=' images',
              disable=None if accelerator.is_main_process else True) as bar:
        for images, places in loader:
            if options.channels_last and not opened.detector:
                images = images.contiguous(memory_format=torch.channels_last)
            with torch.inference_mode(), accelerator.autocast():
                output = model(images)
            rows = [None if int(index) < 0 else row
                    for index, row in zip(places, rows_of(output, topk, threshold))]
            rows = accelerator.gather_for_metrics(rows, use_gather_object=True)
            for row in rows:
                yield _answer(opened, paths[place], row)
                place += 1
            bar.update(len(rows))


def _top_classes(output: Any, topk: int, threshold: float) -> list[tuple]:
    output = output[0] if isinstance(output, (tuple, list)) else output
    top = output.float().softmax(dim=-1).topk(min(topk, output.shape[-1]), dim=-1)
    return list(zip(top.indices.tolist(), top.values.tolist()))


def _boxes(output: Any, topk: int, threshold: float) -> list[tuple]:
    rows = []
    for found in output:
        kept = found['scores'] >= threshold
        rows.append(((found['labels'][kept] - 1).tolist(), found['scores'][kept].tolist(),
                     found['boxes'][kept].tolist()))
    return rows


def _answer(opened: Opened, path: str, row: tuple | None) -> Answer:
    if row is None:
        try:  # once more, for the reason, which a loader's worker does not pass on
            if not os.path.isfile(path):
                raise OSError('there is no such file')
            opened.decode(open_image(path), lambda: shown(path))
        except UNREADABLE as e:
            return Answer(path, error=why_unreadable(e))
        return Answer(path, error='could not be read a moment ago')
    classes, scores, *boxes = row
    return Answer(path, [opened.label(i) for i in classes], scores, *boxes)


# ---- what is written ----------------------------------------------------------------------------------------------


def as_line(answer: Answer, width: int) -> str:
    """A row of the table on the terminal."""
    named = [f'{shown(name)} {100 * score:.1f} %' for name, score in zip(answer.classes, answer.scores)]
    return f'{shown(answer.path):{width}}  {", ".join(named) or "nothing found"}'


def as_json(answer: Answer) -> str:
    """A line of JSON: ``path``, and ``predictions`` (``class``, ``score``, and ``box`` of a detector) or ``error``."""
    if answer.error:
        return json.dumps(dict(path=answer.path, error=answer.error))
    rows = [{'class': name, 'score': score} for name, score in zip(answer.classes, answer.scores)]
    for row, box in zip(rows, answer.boxes or ()):
        row['box'] = box
    return json.dumps(dict(path=answer.path, predictions=rows))


def csv_writer(file: Any, detector: bool, topk: int) -> Callable[[Answer], None]:
    """Write the header; what it returns adds an answer.

    Of a classifier an image is a row: ``path``, ``class_1``, ``score_1``, ``class_2`` ... ``error``. Of a detector a
    box is: ``path``, ``class``, ``score``, ``x1``, ``y1``, ``x2``, ``y2``, ``error``; an image without one has a row.
    """
    table = csv.writer(file)
    names = ['class', 'score', 'x1', 'y1', 'x2', 'y2'] if detector else [
        f'{name}_{i + 1}' for i in range(topk) for name in ('class', 'score')]
    table.writerow(['path', *names, 'error'])

    def add(answer: Answer) -> None:
        pairs = [[safe_cell(name), score] for name, score in zip(answer.classes, answer.scores)]
        if detector:
            rows = [[*pair, *box] for pair, box in zip(pairs, answer.boxes or ())] or [[]]
        else:
            rows = [[cell for pair in pairs for cell in pair]]
        for row in rows:
            empty = [''] * (len(names) - len(row))
            table.writerow([safe_cell(answer.path), *row, *empty, safe_cell(answer.error)])

    return add


class Sheet:
    """Keeps the first answers and draws their pictures at the end."""

    def __init__(self, file: Path, opened: Opened, total: int):
        self.file, self.opened, self.total = file, opened, total
        self.answers: list[Answer] = []

    def add(self, answer: Answer) -> None:
        if not answer.error and len(self.answers) < MOST_SHOWN:
            self.answers.append(answer)

    def draw(self) -> None:
        images, captions = [], []
        for answer in self.answers:
            image = self.opened.read(answer.path)
            named = [f'{shown(name)} {100 * score:.0f} %' for name, score in zip(answer.classes, answer.scores)]
            if answer.boxes is not None:
                image, named = draw_boxes(image, answer.boxes, named), []
            image.thumbnail((800, 800))  # many of them are kept until the end
            images.append(image)
            captions.append('\n'.join([os.path.basename(answer.path), *named[:2]]))
        first = f'the first {len(images)} of {self.total:,} images' if len(images) < self.total else ''
        draw_sheet(self.file, images, captions, first)


# ---- command line -------------------------------------------------------------------------------------------------


def run(argv: list[str]) -> int:
    """``timm-spinal predict``; returns 1 where an image could not be read."""
    args = _parser().parse_args(argv)
    for file, flag, suffix in ((args.csv, '--csv', '.csv'), (args.montage, '--montage', '.png')):
        if file:
            check_output_file(file, flag, (suffix,))
    options = ValidateConfig(
        batch_size=args.batch_size, workers=args.workers, img_size=args.img_size, exif_transpose=args.exif_transpose,
        channels_last=args.channels_last)
    accelerator = accelerator_on(args.device)
    paths, passed_over = on_main_process(accelerator, lambda: _find(args))
    with accelerator.main_process_first():
        opened = open_any(args.model, options)
    _check_fits(args, opened)
    if passed_over:
        _say(accelerator, f'skipped {passed_over}')
    with dead_workers_named(lambda: 'run it again'):
        answers = predict(accelerator, opened, paths, options, args.topk or TOPK, args.threshold or THRESHOLD)
        if not accelerator.is_main_process:
            unreadable = sum(bool(answer.error) for answer in answers)
            return int(unreadable > 0)
        unreadable = _write(args, opened, paths, answers)
    if unreadable:
        _say(accelerator, f'{unreadable:,} of {len(paths):,} images could not be read')
    return int(unreadable > 0)


def _write(args: argparse.Namespace, opened: Opened, paths: list[str], answers: Iterator[Answer]) -> int:
    """Pass answers on to everything that was asked for; returns how many images could not be read."""
    sheet = Sheet(Path(args.montage), opened, len(paths)) if args.montage else None
    width = min(max(len(shown(path)) for path in paths), 60)
    unreadable: list[Answer] = []
    readable = 0
    with ExitStack() as files:
        add = None
        if args.csv:
            topk = min(args.topk or TOPK, max(len(opened.labels), 1))
            add = csv_writer(files.enter_context(writing(Path(args.csv))), opened.detector, topk)

        def put(answer: Answer) -> None:
            if add:
                add(answer)
            if answer.error:
                tqdm.write(f'warning: {shown(answer.path)} cannot be read ({answer.error})', file=sys.stderr)
            if args.json:
                tqdm.write(as_json(answer), file=sys.stdout)
            elif not answer.error:
                tqdm.write(as_line(answer, width), file=sys.stdout)

        count = 0
        for answer in answers:
            count += bool(answer.error)
            if answer.error and not readable:  # nothing is written before an image could be read
                unreadable.append(answer)
                continue
            if not readable:
                for earlier in unreadable:
                    put(earlier)
            readable += not answer.error
            if sheet:
                sheet.add(answer)
            put(answer)
        if not readable:
            first = unreadable[0]
            raise UserError(f'image {shown(first.path)}: cannot be read ({first.error})' + (
                f', nor can the {len(paths) - 1:,} others' if len(paths) > 1 else '') + '; give images')
    if sheet:
        sheet.draw()
    sys.stdout.flush()
    return count


def _find(args: argparse.Namespace) -> tuple[list[str], str]:
    paths, passed_over = find_pictures(args.images)
    for file, flag in ((args.csv, '--csv'), (args.montage, '--montage')):
        if file and any(os.path.realpath(path) == os.path.realpath(file) for path in paths):
            raise UserError(f'{flag} {file}: is one of the images; name another file')
    return paths, passed_over


def _check_fits(args: argparse.Namespace, opened: Opened) -> None:
    if opened.detector and args.topk is not None:
        raise UserError(f'--topk {args.topk}: {opened.name} is a detector, which finds boxes; use --threshold')
    if not opened.detector and args.threshold is not None:
        raise UserError(f'--threshold {args.threshold:g}: {opened.name} is no detector; leave it out')


def _say(accelerator: Accelerator, text: str) -> None:
    if accelerator.is_main_process:
        print(text, file=sys.stderr, flush=True)


def accelerator_on(device: str) -> Accelerator:
    """An accelerator on a device, '' for the one that Accelerate chooses.

    Raises:
        UserError: torch does not know the device, or the machine does not have it.
    """
    if not device:
        return new_accelerator(None)
    try:
        torch.zeros(1, device=device)
        if torch.device(device).type == 'meta':
            raise RuntimeError('nothing is computed on it')
    except Exception as e:  # torch has several types, of which one is AssertionError
        raise UserError(f'--device {device}: cannot be used ({" ".join(str(e).split())[:100]}); use cpu, cuda, cuda:1 '
                        'or mps') from e
    before = os.environ.get('ACCELERATE_TORCH_DEVICE')
    os.environ['ACCELERATE_TORCH_DEVICE'] = device
    try:
        return new_accelerator(None, cpu=torch.device(device).type == 'cpu')
    finally:
        os.environ.pop('ACCELERATE_TORCH_DEVICE') if before is None else os.environ.update(
            ACCELERATE_TORCH_DEVICE=before)


def _parser() -> Parser:
    parser = Parser('timm-spinal predict', __doc__)
    parser.add_argument('model', metavar='MODEL', help='run folder, hf-hub:OWNER/NAME, local-dir:FOLDER, a name of '
                        'timm, or an .onnx file')
    parser.add_argument('images', nargs='+', metavar='IMAGE', help=f'files, folders, wildcards, or {STDIN} for paths '
                        'on standard input')
    parser.add_argument('--topk', type=number(), metavar='N', help=f'classes of an answer (default: {TOPK})')
    parser.add_argument('--threshold', type=number(float, 0., 1.), metavar='X',
                        help=f'least score of a box, of a detector (default: {THRESHOLD})')
    parser.add_argument('--csv', default='', metavar='FILE', help='write the answers to this .csv file')
    parser.add_argument('--json', action='store_true', help='print a line of JSON for each image, and no table')
    parser.add_argument('--montage', default='', metavar='FILE',
                        help=f'draw the images with their answers, {MOST_SHOWN} at most, to this .png file')
    parser.add_argument('--batch-size', '-b', type=number(), default=128, metavar='N',
                        help='images per process and step (default: 128)')
    parser.add_argument('--workers', '-j', type=number(low=0), default=4, metavar='N',
                        help='data loader workers of each process (default: 4)')
    parser.add_argument('--device', default='', help='cpu, cuda, cuda:1, mps, ...; not given: the fastest there is')
    parser.add_argument('--img-size', type=number(low=8), metavar='N', help="image side in pixels; not given: the "
                        "model's")
    parser.add_argument('--channels-last', action='store_true', help='channels-last memory layout')
    parser.add_argument('--exif-transpose', action='store_true', help='rotate images upright by their EXIF '
                        'orientation, as a run that was trained so does by itself')
    return parser


if __name__ == '__main__':
    sys.exit(guard(run, sys.argv[1:]))
