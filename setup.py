"""The kernels in C, an optional extension, and the folder of configs; everything else stands in pyproject.toml.

The extension is no Python module but a library that ``timm_spinal.layers.c_library`` loads. Where it cannot be built,
the package installs without it and the same results come from torch.
"""
import sys

from setuptools import Extension, find_namespace_packages, setup

kernels = Extension(
    'timm_spinal.layers._kernels',
    sources=[f'timm_spinal/layers/{name}.c' for name in ('xnor', 'shared_basis')],
    depends=['timm_spinal/layers/xnor.h', 'timm_spinal/layers/vectors.h'],
    extra_compile_args=['-O3', '-Wno-psabi', '-fvisibility=hidden'],
    libraries=['m'],
    optional=True,
)

setup(
    ext_modules=[] if sys.platform == 'win32' else [kernels],  # GCC or Clang
    # configs/ travels in the package too, for `--config NAME`
    packages=[
        *find_namespace_packages(include=['timm_spinal', 'timm_spinal.*']),
        'timm_spinal.configs',
        *(f'timm_spinal.configs.{name}' for name in find_namespace_packages('configs')),
    ],
    package_dir={'timm_spinal.configs': 'configs'},
)
