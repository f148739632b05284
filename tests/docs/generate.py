"""Templates and CSV files to Markdown: see the package's docstring."""
import csv
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Callable, Dict, List, Optional, Set, Tuple

ROOT = Path(__file__).resolve().parents[2]
# What is known about a measurement, beside what was measured; a CSV file has those columns that apply. Where the rows
# of a table differ in it, a short one becomes a column and a long one a numbered note.
SHORT_FACTS = ('images', 'epochs', 'seeds', 'load')
LONG_FACTS = ('measure', 'data', 'uncertainty', 'setting', 'hardware', 'duration', 'command', 'commit', 'note')
CELL = re.compile(r'\{(?:([\w-]+):([^:{}]+):)?(\w+)\}')
TABLE = re.compile(r'<!-- table: ([^\n]+)\n(.*?)\n?-->', re.DOTALL)
BLOCK = re.compile(r'^(?P<lead>#? ?)<!-- begin: (?P<name>[\w.-]+) -->\n(?:.*\n)*?(?P=lead)<!-- end -->$', re.MULTILINE)
Row = Dict[str, str]


class TemplateError(ValueError):
    """A template or a CSV file from which no document can be made."""


class Results:
    """The CSV files of a folder.

    Args:
        folder: ``docs/results``.

    Attributes:
        files: The rows of each file by their name, the column ``row``.
        shown: ``FILE:ROW`` of all rows that a table has shown.
    """

    def __init__(self, folder: Path):
        self.files = {path.stem: self._read(path) for path in sorted(folder.glob('*.csv'))}
        self.shown: Set[str] = set()

    @staticmethod
    def _read(path: Path) -> Dict[str, Row]:
        rows: Dict[str, Row] = {}
        with open(path, newline='', encoding='utf-8') as f:
            for row in csv.DictReader(f, strict=True):
                if None in row or None in row.values() or row['row'] in rows:
                    raise TemplateError(f'{path.name}: row {row["row"]!r} is there twice, or has not a cell a column')
                rows[row['row']] = row
        return rows

    def match(self, pattern: str) -> List[Tuple[str, str, Row]]:
        """The rows that fit ``FILE:ROW``, each with its file and what the pattern's ``*`` stands for."""
        file, _, name = pattern.partition(':')
        before, _, after = name.partition('*')
        found = [(file, row, cells) for row, cells in self.files.get(file, {}).items() if fnmatchcase(row, name)]
        if not found:
            raise TemplateError(f'no row {pattern} in docs/results')
        self.shown.update(f'{file}:{row}' for _, row, _ in found)
        return [(file, row[len(before):len(row) - len(after)], cells) for _, row, cells in found]

    def cell(self, file: str, row: str, column: str) -> str:
        try:
            return self.files[file][row][column]
        except KeyError:
            raise TemplateError(f'no cell {file}:{row}:{column} in docs/results') from None


def fill(text: str, cell: Callable[[re.Match], str]) -> str:
    """Put cells into a text; of a part in brackets the first alternative stays whose cells are all there."""
    def optional(part: re.Match) -> str:
        complete = (text for text in part[1].split('|') if all(cell(found) for found in CELL.finditer(text)))
        return next(complete, '')

    return CELL.sub(cell, re.sub(r'\[((?:[^\[\]]*\{[^\[\]]*)+)\]', optional, text))


def table(results: Results, patterns: str, lines: str) -> str:
    """A Markdown table and the facts of its rows."""
    columns = [line.partition(': ')[::2] for line in lines.splitlines()]
    chosen = next((text.split(', ') for head, text in columns if head == 'facts'), [*SHORT_FACTS, *LONG_FACTS])
    columns = [(head, text) for head, text in columns if head != 'facts']
    rows = [found for pattern in patterns.split() for found in results.match(pattern)]
    others: List[Row] = []  # rows of which the table shows cells beside its own
    body = [[fill(text, cell_of(results, row, others)) for _, text in columns] for row in rows]
    named = {column for _, text in columns for file, _, column in CELL.findall(text) if not file}
    facts = [fact for fact in chosen if fact not in named]
    differ = [fact for fact in facts if len({row.get(fact) for _, _, row in rows}) > 1]
    heads = [head for head, _ in columns] + [fact for fact in differ if fact in SHORT_FACTS]
    for line, (_, _, row) in zip(body, rows):
        line += [row[fact] for fact in differ if fact in SHORT_FACTS]
    shared = {fact: rows[0][2].get(fact, '') for fact in facts if fact not in differ}
    for row in others:
        shared = {fact: value for fact, value in shared.items() if row.get(fact) in (None, '', value)}
    notes = [tell({fact: row.get(fact, '') for fact in differ if fact in LONG_FACTS}) for _, _, row in rows]
    numbers = list(dict.fromkeys(note for note in notes if note))
    if numbers:
        heads.append('note')
        body = [[*line, f'{numbers.index(note) + 1}' if note else ''] for line, note in zip(body, notes)]
    escaped = [[cell.replace('|', '\\|') for cell in line] for line in (heads, *body)]
    escaped.insert(1, ['---'] * len(heads))
    below = [tell(shared), *(f'{i}. {note}' for i, note in enumerate(numbers, 1))]
    return '\n'.join(['| ' + ' | '.join(line) + ' |' for line in escaped] + [f'\n{text}' for text in below if text])


def cell_of(results: Results, own: Tuple[str, str, Row], others: List[Row]) -> Callable[[re.Match], str]:
    """What a placeholder of a table stands for in one of its rows; rows met on the way are added to `others`."""
    file, star, row = own

    def cell(found: re.Match) -> str:
        if found[1] is None:
            return results.cell(file, row['row'], found[3])
        name = found[2].replace('*', star)
        if '*' in found[2] and name not in results.files.get(found[1], {}):
            return ''  # not measured for this row
        value = results.cell(found[1], name, found[3])
        results.shown.add(f'{found[1]}:{name}')
        others.append(results.files[found[1]][name])
        return value

    return cell


def tell(facts: Row) -> str:
    """Facts as sentences of a name and a value."""
    values = {fact: f'`{value}`' if fact == 'command' else value for fact, value in facts.items() if value}
    return ' '.join(f'{fact.capitalize()}: {value.rstrip(".")}.' for fact, value in values.items())


def render(template: str, results: Results) -> str:
    text = TABLE.sub(lambda found: table(results, found[1], found[2]), template)

    def cell(found: re.Match) -> str:
        value = results.cell(found[1], found[2], found[3]) if found[1] else None
        if not value:
            raise TemplateError(f'{found[0]} is empty, or names no file and row')
        return value

    return CELL.sub(cell, text)


def generate(root: Path, results: Optional[Results] = None) -> Dict[Path, str]:
    """What every generated page, and every file with generated blocks, has to hold."""
    results = results or Results(root / 'docs' / 'results')
    templates = {path.stem: path.read_text(encoding='utf-8') for path in (root / 'docs' / 'templates').glob('*.md')}
    made: Dict[Path, str] = {}
    for name, text in sorted(templates.items()):
        if text.startswith('# '):
            origin = f'Made by `python -m tests.docs` from docs/results and docs/templates/{name}.md: change these.'
            made[root / 'docs' / f'{name}.md'] = f'<!-- {origin} -->\n\n{render(text, results)}'

    def block(found: re.Match) -> str:
        if found['name'] not in templates:
            raise TemplateError(f'no docs/templates/{found["name"]}.md for the block of this name')
        first, last = found[0].split('\n')[0], found[0].split('\n')[-1]
        lines = render(templates[found['name']].rstrip('\n'), results).split('\n')
        return '\n'.join([first, *((found['lead'] + line).rstrip() for line in lines), last])

    for path in (root / 'README.md', *(root / 'docs').rglob('*.md'), *(root / 'configs').rglob('*.yaml')):
        if path not in made and path.parent.name != 'templates':
            text = path.read_text(encoding='utf-8')
            if BLOCK.search(text):
                made[path] = BLOCK.sub(block, text)
    return made
