"""What a model gets wrong, as files: pictures of a run, and the report of an evaluation."""
import base64
import importlib.util
import io
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

import jinja2
import numpy as np
from PIL import Image

from timm_spinal.errors import UserError
from timm_spinal.files import safe_cell, write_atomically, writing

from .figures import draw_confusion, draw_reliability, draw_sheet, shorten
from .mistakes import MOST_IN_MATRIX, Confusion, per_class, worst

CONFUSION, WORST = 'confusion.png', 'worst.png'
MOST_WORST, MOST_PAIRS = 16, 25
THUMBNAIL = 256  # pixels of the longer side in the report
PAGE = Path(__file__).with_name('report.html')
ReadImage = Callable[[int], Image.Image]  # the image at a place of the split


def named_classes(names: Sequence[str] | None, count: int) -> list[str]:
    """A name for each of so many classes; numbers where there are none."""
    names = list(names or ())
    return [names[i] if i < len(names) else str(i) for i in range(count)]


def draw_mistakes(
        folder: Path,
        kept: Mapping[str, np.ndarray],
        names: Sequence[str],
        read: ReadImage | None,
) -> list[Path]:
    """Draw ``confusion.png`` and, where the images can be read again, ``worst.png``; returns what was drawn.

    Args:
        folder: Where to.
        kept: Columns as `predictions.read_predictions` gives them.
        names: Of all classes.
        read: Reads the image at a place; None where that cannot be done.
    """
    draw_confusion(folder / CONFUSION, Confusion(kept['prediction'], kept['target'], len(names)), names)
    rows = worst_rows(kept, names, read)
    if not rows:
        return [folder / CONFUSION]
    draw_sheet(folder / WORST, [row['image'] for row in rows], [
        f'is {row["target"]}\nsaid {row["prediction"]} {row["confidence"]}\nloss {row["loss"]}  {row["file"]}'
        for row in rows], f'greatest loss of {len(kept["target"]):,} images')
    return [folder / CONFUSION, folder / WORST]


def worst_rows(
        kept: Mapping[str, np.ndarray],
        names: Sequence[str],
        read: ReadImage | None,
) -> list[dict[str, Any]]:
    """The images of greatest loss: ``image``, ``target``, ``prediction``, ``confidence``, ``loss`` and ``file``."""
    rows: list[dict[str, Any]] = []
    if read is None:
        return rows
    for i in worst(kept['loss'], MOST_WORST):
        try:
            image = read(int(kept['place'][i])).convert('RGB')
        except (OSError, ValueError, SyntaxError):  # gone since it was evaluated
            continue
        image.thumbnail((600, 600))
        rows.append(dict(
            image=image, target=names[kept['target'][i]], prediction=names[kept['prediction'][i]],
            confidence=f'{100 * kept["confidence"][i]:.0f} %', loss=f'{kept["loss"][i]:.2f}',
            file=shorten(str(kept['file'][i]), 200)))
    return rows


# ---- report -----------------------------------------------------------------------------------------------------


def check_report(folder: str) -> None:
    """Refuse a report that could not be written, before anything is measured.

    Raises:
        UserError: A file of that name, no folder to make it in, or scikit-learn is missing.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise UserError(f'--report {folder}: is a file; name a folder')
    if not path.absolute().parent.is_dir():
        raise UserError(f'--report {folder}: there is no folder {path.parent}; make it first')
    if importlib.util.find_spec('sklearn') is None:
        raise UserError("--report: scikit-learn is not installed; pip install 'timm-spinal[report]'")


def write_report(
        folder: Path,
        title: str,
        facts: Mapping[str, str],
        kept: Mapping[str, np.ndarray],
        names: Sequence[str],
        read: ReadImage | None,
) -> None:
    """Write pictures, tables and ``report.html``, which holds all of them and needs no other file.

    Args:
        folder: Made where it is not there; files of an earlier report in it are replaced.
        title: Of the page.
        facts: What stands at its top, by name.
        kept: Columns as `predictions.read_predictions` gives them.
        names: Of all classes.
        read: Reads the image at a place; None where that cannot be done.

    Raises:
        UserError: The disk refuses.
    """
    try:
        folder.mkdir(exist_ok=True)
    except OSError as e:
        raise UserError(f'--report {folder}: {e.strerror}') from e
    confusion = Confusion(kept['prediction'], kept['target'], len(names))
    classes = per_class(kept['prediction'], kept['target'], names)
    right = kept['prediction'] == kept['target']
    drawn = draw_mistakes(folder, kept, names, read)
    error, = draw_reliability(folder / 'calibration.png', {'': (kept['confidence'], right)}, 'calibration').values()
    _write_csv(folder / 'per_class.csv', classes)
    _write_csv(folder / 'confusion.csv', confusion.rows(names))
    _write_csv(folder / 'predictions.csv', [
        dict(file=str(file), target=names[t], prediction=names[p], confidence=float(c), loss=float(loss))
        for file, t, p, c, loss in zip(
            kept['file'], kept['target'], kept['prediction'], kept['confidence'], kept['loss'])])
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = page.from_string(PAGE.read_text(encoding='utf-8')).render(
        title=title,
        facts={**facts, 'expected calibration error': f'{error:.2f} %'},
        confusion=_embedded(Image.open(drawn[0]), 'PNG'),
        is_matrix=len(names) <= MOST_IN_MATRIX,
        calibration=_embedded(Image.open(folder / 'calibration.png'), 'PNG'),
        pairs=[dict(pair._asdict(), target=names[pair.target], prediction=names[pair.prediction])
               for pair in confusion.pairs()[:MOST_PAIRS]],
        worst=[{**row, 'image': _embedded(_small(row['image']), 'JPEG')} for row in worst_rows(kept, names, read)],
        classes=classes,
    )
    write_atomically(folder / 'report.html', lambda temp: temp.write_text(
        text, encoding='utf-8', errors='backslashreplace'))


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    import csv
    with writing(path) as file:
        table = csv.writer(file)
        table.writerow([safe_cell(key) for key in rows[0]])
        table.writerows([['' if value is None else safe_cell(value) for value in row.values()] for row in rows])


def _small(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image


def _embedded(image: Image.Image, kind: str) -> str:
    """An image as the address that an <img> of a page can have."""
    data = io.BytesIO()
    image.save(data, format=kind, **(dict(quality=85) if kind == 'JPEG' else {}))
    return f'data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode()}'
