"""Pictures of an evaluation: confusion matrix, calibration, and sheets of images with captions."""
import math
from functools import lru_cache
from pathlib import Path
from typing import Any, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from timm_spinal.files import write_atomically

from .mistakes import MOST_IN_MATRIX, Confusion
from .predictions import calibration

MOST_PAIRS = 25
SIDE, MARGIN, LINE = 220, 10, 15  # pixels of a sheet: an image, around it, a line of its caption
COLOURS = ('#1f77b4', '#d62728', '#2ca02c', '#9467bd', '#ff7f0e', '#17becf')


def new_figure(width: float, height: float, layout: Any = 'constrained') -> Any:
    """A matplotlib figure of so many inches that needs no display.

    Args:
        width: In inches.
        height: In inches.
        layout: matplotlib's layout engine; with 'none' the caller places the axes, which halves the time of drawing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path, dpi: int = 110) -> None:
    """Write a figure as PNG in one step."""
    import warnings

    def write(temp: Path) -> None:
        with warnings.catch_warnings():  # a character that the font lacks is drawn as a box
            warnings.filterwarnings('ignore', message='Glyph .* missing from')
            figure.savefig(temp, format='png', dpi=dpi)

    write_atomically(path, write)


def shorten(text: str, most: int) -> str:
    """A text of printable characters, so many at most."""
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= most else text[:most - 3] + '...'


# ---- confusion --------------------------------------------------------------------------------------------------


def draw_confusion(path: Path, confusion: Confusion, names: Sequence[str]) -> None:
    """The confusion matrix, or, of more than `MOST_IN_MATRIX` classes, the pairs that are confused most.

    Args:
        path: PNG file.
        confusion: What was counted.
        names: Of the classes.
    """
    if confusion.num_classes > MOST_IN_MATRIX:
        _draw_pairs(path, confusion, names)
        return
    counts, n = confusion.matrix(), confusion.num_classes
    percent = 100 * counts / counts.sum(1, keepdims=True).clip(1)
    few = n <= 20
    side = max(n * (0.62 if few else 0.26), 2.4)
    figure = new_figure(side + 3.2, side + 2)
    axes = figure.subplots()
    image = axes.imshow(percent, cmap='Blues', vmin=0, vmax=100)
    figure.colorbar(image, ax=axes, label='% of the row', shrink=0.7)
    size = 9 if n <= 12 else 7.5 if few else 6
    for row, column in zip(*np.nonzero(counts)):
        text = f'{counts[row, column]:,}' + (f'\n{percent[row, column]:.0f} %' if few else '')
        axes.text(column, row, text, ha='center', va='center', fontsize=size - (1.5 if counts.max() > 999 else 0),
                  color='white' if percent[row, column] > 55 else 'black')
    label = dict(fontsize=10 if few else 7, parse_math=False)
    short = [shorten(name, 24) for name in names]
    axes.set_xticks(range(n), short, rotation=90 if n > 3 or max(map(len, short)) > 8 else 0, **label)
    axes.set_yticks(range(n), short, **label)
    axes.set(xlabel='prediction', ylabel='class', title='images, and percent of the row' if few else 'images')
    save_figure(figure, path)


def _draw_pairs(path: Path, confusion: Confusion, names: Sequence[str]) -> None:
    pairs = confusion.pairs()[:MOST_PAIRS]
    figure = new_figure(9, 1.2 + 0.26 * max(len(pairs), 1))
    axes = figure.subplots()
    bars = axes.barh(range(len(pairs)), [pair.images for pair in pairs])
    axes.bar_label(bars, [f'{pair.images:,} of {pair.of:,}' for pair in pairs], padding=3, fontsize=8)
    axes.set_yticks(range(len(pairs)), [
        f'{shorten(names[pair.target], 30)}, called {shorten(names[pair.prediction], 30)}' for pair in pairs],
        fontsize=8, parse_math=False)
    axes.margins(x=0.15)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.invert_yaxis()
    axes.set(xlabel='images', title=f'most confused of {confusion.num_classes:,} classes' if pairs else 'no mistakes')
    save_figure(figure, path)


# ---- calibration ------------------------------------------------------------------------------------------------


def draw_reliability(path: Path, curves: dict[str, tuple[np.ndarray, np.ndarray]], title: str) -> dict[str, float]:
    """Reliability diagrams in one picture; returns the expected calibration errors in percent.

    Args:
        path: PNG file.
        curves: By name, confidence (N,) and whether it was right (N,).
        title: Above it.
    """
    figure = new_figure(6, 6)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color='grey', linewidth=1)
    errors = {}
    for name, (confidence, correct) in curves.items():
        sure, right, error = calibration(confidence, correct)
        errors[name] = 100. * error
        axes.plot(sure, right, marker='.', label=f'{name}: ECE {100 * error:.2f} %'.removeprefix(': '))
    axes.set(xlabel='confidence', ylabel='accuracy', title=title, xlim=(0, 1), ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)
    return errors


# ---- sheets of images -------------------------------------------------------------------------------------------


def draw_sheet(path: Path, images: Sequence[Image.Image], captions: Sequence[str], title: str = '') -> None:
    """Images in rows, each with lines of text below it, as PNG.

    Args:
        path: Where to.
        images: In any mode and size.
        captions: Of each.
        title: A line above all of them.
    """
    columns = max(1, min(6, math.ceil(math.sqrt(len(images)))))
    rows = math.ceil(len(images) / columns)
    lines = max((caption.count('\n') + 1 for caption in captions), default=0)
    top = LINE + MARGIN if title else 0
    width, height = SIDE + MARGIN, SIDE + LINE * lines + 2 * MARGIN
    sheet = Image.new('RGB', (width * columns + MARGIN, top + height * rows + MARGIN), 'white')
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, 'black', _font(12))
    for i, (image, caption) in enumerate(zip(images, captions)):
        x, y = MARGIN + width * (i % columns), top + MARGIN + height * (i // columns)
        small = _fitted(image)
        sheet.paste(small, (x + (SIDE - small.width) // 2, y + (SIDE - small.height) // 2))
        for number, line in enumerate(caption.split('\n')):
            draw.text((x, y + SIDE + 4 + LINE * number), _cut(draw, line), 'black', _font(11))
    write_atomically(path, lambda temp: sheet.save(temp, format='PNG', optimize=True))


def _fitted(image: Image.Image) -> Image.Image:
    """An image as large as its place has room."""
    image = image.convert('RGB')
    scale = SIDE / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)


def _cut(draw: ImageDraw.ImageDraw, line: str) -> str:
    text = shorten(line, 100)
    while text and draw.textlength(text, _font(11)) > SIDE:
        text = text.removesuffix('...')[:-1] + '...'
    return text


@lru_cache
def _font(size: int) -> Any:
    """The font of matplotlib, which has more alphabets than that of Pillow."""
    import matplotlib
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / 'fonts' / 'ttf' / 'DejaVuSans.ttf'), size)


def draw_boxes(image: Image.Image, boxes: Sequence[Sequence[float]], names: Sequence[str]) -> Image.Image:
    """A copy of an image, made larger where it is small, with boxes (x1, y1, x2, y2) in its pixels and their names."""
    image = image.convert('RGB')
    scale = max(1., 2 * SIDE / max(image.size))
    image = image.resize((round(image.width * scale), round(image.height * scale)))
    size = max(11, round(max(image.size) / 45))
    draw = ImageDraw.Draw(image)
    for i, (box, name) in enumerate(zip(boxes, names)):
        x1, y1, x2, y2 = (scale * edge for edge in box)
        colour = COLOURS[i % len(COLOURS)]
        draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour, width=max(2, size // 6))
        place = (x1, max(0, y1 - size - 4))
        draw.rectangle(draw.textbbox(place, name, _font(size)), fill=colour)
        draw.text(place, name, 'white', _font(size))
    return image
