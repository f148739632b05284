import re

import pytest

from timm_spinal.bench.features import main
from timm_spinal.errors import UserError


def test_prints_rates_and_seconds(capsys):
    assert main(['--backbone', 'test_efficientnet', '--img-size', '32', '-b', '16', '-j', '0', '--images', '40',
                 '--rounds', '1', '--features', '300', '--seeds', '1', '--epochs', '1']) == 0
    out = capsys.readouterr().out
    ratio, ours, bare = map(float, re.search(r': ([\d.]+) \(min.*ours (\d+), bare (\d+)', out).groups())
    assert ratio == pytest.approx(ours / bare, rel=0.1) and ours > 0
    seconds = [float(s) for s in re.findall(r'    \S+: ([\d.]+) s', out)]
    total = float(re.search(r'on 300 features: (\d+) s', out).group(1))
    assert len(seconds) == 4 and sum(seconds) > 0 and total <= sum(seconds) + 1  # side by side


def test_sizes_are_checked():
    with pytest.raises(UserError, match='--images: must be at least 40, got 5'):
        main(['--images', '5'])
