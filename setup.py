"""The kernel in C, an optional extension, and the folder of configs; everything else stands in pyproject.toml.

The extension is no Python module but a library that ``timm_spinal.layers.xnor.library`` loads. Where it cannot be
built, the package installs without it and the same results come from torch.
"""
import sys

from setuptools import Extension, find_namespace_packages, setup

xnor = Extension(
    'timm_spinal.layers.xnor._xnor',
    sources=['timm_spinal/layers/xnor/xnor.c'],
    extra_compile_args=['-O3', '-Wno-psabi', '-fvisibility=hidden'],
    libraries=['m'],
    py_limited_api=True,
    optional=True,
)

setup(
    options={'bdist_wheel': {'py_limited_api': 'cp310'}},  # nothing of Python's API is used: one wheel for all versions
    ext_modules=[] if sys.platform == 'win32' else [xnor],  # GCC or Clang
    # configs/ travels in the package too, for `--config NAME`
    packages=[
        *find_namespace_packages(include=['timm_spinal', 'timm_spinal.*']),
        'timm_spinal.configs',
        *(f'timm_spinal.configs.{name}' for name in find_namespace_packages('configs')),
    ],
    package_dir={'timm_spinal.configs': 'configs'},
)
