import pytest
import timm
import torch

import timm_spinal
from timm_spinal import env
from timm_spinal.cli import main


def test_env_tells_versions_and_kernel(capsys, monkeypatch):
    assert main(['env']) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if not line.startswith('xnor'))
    assert rows['timm'] == timm.__version__ and rows['torch'] == torch.__version__.split('+')[0]
    assert rows['accelerate'][0].isdigit() and rows['python'][0] == '3'
    monkeypatch.setenv('TIMM_SPINAL_XNOR', 'torch')
    assert main(['env']) == 0
    assert 'xnor kernel     torch (torch; the C code was not built' in capsys.readouterr().out


def test_every_backend_has_a_description():
    assert timm_spinal.xnor_backend() in env.KERNELS
    assert env.version('no-such-package') == 'not installed'


@pytest.mark.parametrize('argv, text', [(['env'], "error: TIMM_SPINAL_XNOR='fast' is unknown; use auto, ")])
def test_bad_variable(argv, text, capsys, monkeypatch):
    monkeypatch.setenv('TIMM_SPINAL_XNOR', 'fast')
    assert main(argv) == 2
    assert capsys.readouterr().err.startswith(text)
