"""The bit kernels, an optional C extension; everything else stands in pyproject.toml.

It is no Python module but a library that ``timm_spinal.layers.xnor_kernel`` loads. Where it cannot be built, the
package installs without it and the same results come from torch.
"""
import sys

from setuptools import Extension, setup

xnor = Extension(
    'timm_spinal.layers._xnor',
    sources=['timm_spinal/layers/xnor.c'],
    depends=['timm_spinal/layers/xnor.h'],
    extra_compile_args=['-O3', '-Wno-psabi', '-fvisibility=hidden'],
    libraries=['m'],
    optional=True,
)

setup(ext_modules=[] if sys.platform == 'win32' else [xnor])  # GCC or Clang
