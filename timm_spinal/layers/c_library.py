"""The library of C code, xnor.c, shared_basis.c and dropout.c, where it was built when the package was installed."""

import ctypes
import functools
import importlib.util
from typing import Optional


@functools.cache
def load() -> Optional[ctypes.CDLL]:
    """The library; None where it was not built, or for another system."""
    spec = importlib.util.find_spec(f'{__package__}._kernels')
    if spec is None or spec.origin is None:
        return None
    try:
        return ctypes.CDLL(spec.origin)
    except OSError:
        return None


@functools.cache
def run_parallel() -> Optional[int]:
    """Address of GOMP_parallel in the OpenMP that torch has loaded; None where it has another, such as on macOS."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except AttributeError:
        return None
