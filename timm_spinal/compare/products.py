"""Which library computes float32 matrix products on the CPU while heads train."""
from contextlib import contextmanager
from typing import Iterator

import torch

LARGEST_ERROR = 1e-5  # of the greatest number; bfloat16 errs by 1e-3, float32 by 1e-6


def _product_error() -> float:
    """Greatest error of a product, relative to the greatest number in it."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 512, generator=generator) for _ in range(2))
    exact = a.double() @ b.double().t()
    return float(((a @ b.t()).double() - exact).abs().max() / exact.abs().max())


@contextmanager
def fast_float32_products() -> Iterator[None]:
    """oneDNN's products in place of torch's usual ones on the CPU, where they are float32 as well.

    torch takes oneDNN where bfloat16 is allowed ('medium'), and oneDNN computes in float32 all the same on a processor
    without units for bfloat16 matrices. Whether it does is measured; if not, and where the user has chosen a precision
    other than torch's 'highest', nothing changes.
    """
    before = torch.get_float32_matmul_precision()
    try:
        if before == 'highest':
            torch.set_float32_matmul_precision('medium')
            if _product_error() > LARGEST_ERROR:
                torch.set_float32_matmul_precision(before)
        yield
    finally:
        torch.set_float32_matmul_precision(before)
