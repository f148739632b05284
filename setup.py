"""The kernels in C, an optional extension; everything else stands in pyproject.toml.

It is no Python module but a library that ``timm_spinal.layers.c_library`` loads. Where it cannot be built, the
package installs without it and the same results come from torch.
"""
import sys

from setuptools import Extension, setup

kernels = Extension(
    'timm_spinal.layers._kernels',
    sources=[f'timm_spinal/layers/{name}.c' for name in ('xnor', 'shared_basis', 'dropout', 'sparse_product')],
    depends=['timm_spinal/layers/xnor.h', 'timm_spinal/layers/vectors.h'],
    extra_compile_args=['-O3', '-Wno-psabi', '-fvisibility=hidden'],
    libraries=['m'],
    optional=True,
)

setup(ext_modules=[] if sys.platform == 'win32' else [kernels])  # GCC or Clang
