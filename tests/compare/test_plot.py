import json

import pytest
from PIL import Image

from timm_spinal.cli import main as cli
from timm_spinal.compare.plot import main, read_curves, table
from timm_spinal.compare.runs import Comparison, write_comparison
from timm_spinal.errors import UserError
from timm_spinal.training.report import write_table


def write_run(folder, tops, test=None, step=10., **columns):
    """A run folder: an evaluation after each epoch, ``step`` seconds apart; None is an epoch without one."""
    folder.mkdir(parents=True)
    rows = [dict(epoch=i, train_loss=1., **(dict(seconds=step * (i + 1)) if step else {}),
                 **({} if top is None else dict(eval_top1=top))) for i, top in enumerate(tops)]
    for name, values in columns.items():
        for row, value in zip(rows, values):
            row[name] = value
    write_table(folder / 'summary.csv', rows)
    if test is not None:
        (folder / 'result.json').write_text(json.dumps(dict(test_top1=test)))
    return folder


def cells(text):
    return [[c.strip() for c in line.strip('|').split('|')] for line in text.splitlines() if line.startswith('|')]


def test_two_runs(tmp_path, capsys):
    slow = write_run(tmp_path / 'slow', [50., 60., 70.], test=69.)
    fast = write_run(tmp_path / 'fast', [55., 71., 72.], test=70., step=12.)
    png = tmp_path / 'out.png'
    assert main([str(slow), str(fast), '--to-accuracy', '60', '--to-accuracy', '71', '--output', str(png)]) == 0
    head, _, one, two = cells(capsys.readouterr().out)
    assert head == ['run', 'n', 'best top-1', 'test top-1', 'epochs to 60.00 %', 'seconds to 60.00 %',
                    'epochs to 71.00 %', 'seconds to 71.00 %']
    assert one == ['slow', '1', '70.00', '69.00', '2.0', '20.0', 'not reached', 'not reached']
    assert two == ['fast', '1', '72.00', '70.00', '2.0', '24.0', '2.0', '24.0']
    assert Image.open(png).size == (1320, 495)


def test_the_first_curve_sets_the_accuracy(tmp_path, capsys):
    runs = [write_run(tmp_path / 'a', [50., 64.]), write_run(tmp_path / 'b', [65., 66.])]
    assert cli(['plot', *map(str, runs), '--output', str(tmp_path / 'p.png')]) == 0
    found = cells(capsys.readouterr().out)
    assert found[0][4] == 'epochs to 64.00 %' and found[2][4] == '2.0' and found[3][4] == '1.0'


def test_seeds_of_a_comparison(tmp_path, capsys):
    out = tmp_path / 'sweep'
    for seed, (plain, wld) in enumerate([([50., 60., 70.], [60., 70., 71.]), ([52., 61., 66.], [61., 64., 72.]),
                                         ([50., 62., 68.], [60., 69., 68.])]):
        write_run(out / 'runs' / 'plain' / f'seed-{seed}', plain, test=plain[-1])
        write_run(out / 'runs' / 'wld' / f'seed-{seed}', wld, test=wld[-1])
    write_comparison(out, Comparison('sweep', '', ['wld', 'plain', 'missing'], 'plain', [0, 1, 2]))
    curves = read_curves([out])
    assert list(curves) == ['wld', 'plain'] and [len(c) for c in curves.values()] == [3, 3]
    _, _, wld, plain = cells(table(curves, [68.]))
    assert plain == ['plain', '3', '68.00 +- 2.00', '68.00 +- 2.00', '3.0 +- 0.0 (2 of 3)', '30.0 +- 0.0 (2 of 3)']
    assert wld == ['wld', '3', '70.67 +- 1.53', '70.33 +- 2.08', '2.3 +- 0.6', '23.3 +- 5.8']
    assert main([str(out), '--output', str(tmp_path / 'p.png')]) == 0
    assert list(read_curves([out / 'runs' / 'plain'])) == ['plain']


def test_average_counts_where_it_is_better_and_epochs_without_evaluation_are_passed_over(tmp_path):
    run = write_run(tmp_path / 'a', [None, 50., None, 60.], ema_top1=[None, 55., None, 58.])
    course, = read_curves([run])['a']
    assert course.epochs.tolist() == [1, 3] and course.accuracy.tolist() == [55., 60.]
    assert course.reaches(54.) == (2., 20.) and course.reaches(55.5) == (4., 40.) and course.reaches(61.) is None


def test_images_with_two_classes_count_as_exact_pairs(tmp_path, capsys):
    pairs = write_run(tmp_path / 'pairs', [None, None], eval_exact=[60., 80.], eval_digit=[80., 90.], seconds=[9., 18.])
    (pairs / 'result.json').write_text(json.dumps(dict(test_exact=79., test_digit=89.)))
    assert main([str(pairs), '--to-accuracy', '70', '--output', str(tmp_path / 'p.png')]) == 0
    head, _, row = cells(capsys.readouterr().out)
    assert head[2:4] == ['best exact pairs', 'test exact pairs'] and row[2:] == ['80.00', '79.00', '2.0', '18.0']
    single = write_run(tmp_path / 'single', [50.])
    with pytest.raises(UserError, match='pairs has exact pairs and single has top-1; plot them separately'):
        read_curves([pairs, single])


def test_runs_of_older_versions_have_no_seconds(tmp_path, capsys):
    run = write_run(tmp_path / 'a', [50., 60.], step=None)
    assert main([str(run), '--to-accuracy', '55', '--output', str(tmp_path / 'p.png')]) == 0
    assert cells(capsys.readouterr().out)[2][4:] == ['2.0', '-']


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    runs = [write_run(tmp_path / name / 'run', [50.]) for name in ('x', 'y')]
    assert list(read_curves(runs)) == ['run', 'y/run']
    with pytest.raises(UserError, match='it is given twice; remove one'):
        read_curves([runs[0], runs[0]])


@pytest.mark.parametrize('argv, text', [
    (['nowhere'], 'nowhere: it contains no run'),
    (['empty'], 'empty: no epoch was evaluated yet'),
    (['good', '--to-accuracy', '0.9'], '--to-accuracy 0.9: give percent, above 1 and up to 100'),
    (['good', '--to-accuracy', '101'], '--to-accuracy 101: give percent'),
    (['good', '--to-accuracy', 'nan'], '--to-accuracy nan: give percent'),
    (['good', '--to-accuracy', 'high'], "invalid float value: 'high'"),
    (['good', '--output', 'plot.pdf'], '--output plot.pdf: unknown format; name a .png file'),
    ([], 'the following arguments are required: RUN'),
])
def test_errors(tmp_path, monkeypatch, capsys, argv, text):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / 'good', [50.])
    write_run(tmp_path / 'empty', [None])
    assert cli(['plot', *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith('error: ') and text in err and err.count('\n') == 1
    assert not list(tmp_path.glob('*.png'))
