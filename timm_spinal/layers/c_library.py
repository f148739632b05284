"""The library of the C files in this folder, where it was built when the package was installed."""

import ctypes
import functools
import importlib.util
from typing import Any, List, Optional

import torch


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


def declare(**arguments: List[Any]) -> Optional[ctypes.CDLL]:
    """The library, its functions of these names with these types of arguments.

    Returns:
        None where there is no library, or it lacks one of them: for another processor, or built from other sources.
    """
    library = load()
    if library is None or not all(hasattr(library, name) for name in arguments):
        return None
    for name, types in arguments.items():
        getattr(library, name).argtypes = types
    return library


def are_floats(*tensors: torch.Tensor) -> bool:
    """Whether tensors are float32 and on the CPU, as C code reads them."""
    return all(t.dtype == torch.float32 and t.device.type == 'cpu' for t in tensors)


@functools.cache
def run_parallel() -> Optional[int]:
    """Address of GOMP_parallel in the OpenMP that torch has loaded; None where it has another, such as on macOS."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except AttributeError:
        return None
