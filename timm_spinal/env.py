"""Versions and what this machine computes with, for a bug report.

    timm-spinal env
"""
import importlib.metadata
import os
import platform

from timm_spinal.arguments import Parser

PACKAGES = ('timm-spinal', 'timm', 'torch', 'torchvision', 'accelerate', 'huggingface-hub', 'safetensors', 'numpy')
KERNELS = {
    'avx2': 'C code with AVX2',
    'neon': 'C code with NEON',
    'portable': 'portable C code',
    'torch': 'torch; the C code was not built, or TIMM_SPINAL_XNOR=torch',
}


def version(package: str) -> str:
    """Version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return 'not installed'


def run(argv: list[str]) -> int:
    """``timm-spinal env``."""
    Parser('timm-spinal env', __doc__).parse_args(argv)
    import torch

    import timm_spinal
    from timm_spinal.errors import UserError
    try:
        kernel = timm_spinal.xnor_backend()
    except ValueError as e:
        raise UserError(str(e)) from e
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows = {
        **{name: version(name) for name in PACKAGES},
        'python': platform.python_version(),
        'platform': platform.platform(),
        'cpu': f'{os.cpu_count()} cores, {torch.get_num_threads()} torch threads',
        'gpu': ', '.join(devices) or 'none',
        'xnor kernel': f'{kernel} ({KERNELS[kernel]})',
    }
    print('\n'.join(f'{name:16}{value}' for name, value in rows.items()))
    return 0
