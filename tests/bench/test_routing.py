"""What `timm-spinal bench routing` measures."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest

from timm_spinal.bench import routing
from timm_spinal.errors import UserError


@pytest.mark.parametrize('layer', routing.LAYERS)
def test_both_sides_give_the_same(layer):
    assert 0. <= routing.largest_difference(routing.Case(layer, batch=3, capsules=4, classes=300)) < 1e-5


def test_lean_needs_less_memory():
    case = routing.Case('caps', batch=64, capsules=32, classes=400)  # predictions: 50 MiB
    peaks = {}
    for mode in routing.MODES:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool:
            peaks[mode] = pool.submit(routing.peak_memory, case, mode).result()
    assert peaks['whole'][0] > 50. and peaks['whole'][1] > peaks['whole'][0]
    assert all(lean < 0.8 * whole for lean, whole in zip(peaks['lean'], peaks['whole']))


def test_inference_grows_with_coefficients_and_not_with_predictions():
    batches, capsules, classes = (32, 288), 64, 1000  # so far apart that a heap's 60 MiB more or less do not decide
    peaks = []
    for case in (routing.Case('caps', batch, capsules, classes) for batch in batches):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool:
            peaks.append(pool.submit(routing.peak_memory, case, 'lean', train=False))
    small, large = (peak.result()[0] for peak in peaks)
    coefficients = (batches[1] - batches[0]) * capsules * classes * 4 / 2 ** 20
    assert coefficients < large - small < 5 * coefficients  # predictions are 16 times as many


def test_prints_a_line_for_each_number_of_classes(capsys):
    assert routing.main(['--classes', '5', '-b', '2', '--capsules', '3', '--rounds', '1', '--layer', 'xnidr']) == 0
    *_, heading, row = capsys.readouterr().out.splitlines()
    assert heading.split()[0] == 'classes' and len(row.split()) == len(heading.split())
    assert row.split()[0] == '5' and float(row.split()[-1]) < 1e-5


def test_a_network_is_trained_in_a_process_of_its_own(capsys):
    assert routing.main(['--network', 'test_efficientnet_xnodr', '--classes', '3', '-b', '2', '--img-size', '64']) == 0
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith('test_efficientnet_xnodr, 3 classes, batch 2, 64 px: training takes 0.')


@pytest.mark.parametrize('argv, message', [
    (['--classes', '1'], '--classes: must be at least 2, got 1'),
    (['--rounds', '0'], '--rounds: must be at least 1, got 0'),
])
def test_bad_values(argv, message):
    with pytest.raises(UserError, match=message):
        routing.main(argv)
