"""Products of signs as bits: one C file, the operators that call it, and their twin in plain torch.

Importing this registers the operators ``torch.ops.timm_spinal.xnodr_routing`` and others.
"""

from . import ops as ops
from .library import can_run as can_run
from .library import xnor_backend as xnor_backend
from .torch_twin import pack_signs as pack_signs
