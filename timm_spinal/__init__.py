"""Heads and convolutions of five papers as timm models. Importing this package registers them with timm."""

from .layers import HEAD_PRESETS as HEAD_PRESETS
from .layers import HEADS as HEADS
from .layers import head_options as head_options
from .layers import xnor_backend as xnor_backend
from .models import CONVOLUTIONS as CONVOLUTIONS
from .models import Convolution as Convolution
from .models import attach_head as attach_head
from .models import convert as convert
from .models import convert_to_ic as convert_to_ic
from .models import ensure_registered as ensure_registered
from .models import fold_bases as fold_bases
from .models import fold_batchnorm as fold_batchnorm
from .models import ic_active_share as ic_active_share
from .models import ic_warm_start as ic_warm_start
from .models import list_models as list_models
from .models import merge_bases as merge_bases
from .models import pack_xnodr as pack_xnodr
from .models import recalibrate_bn as recalibrate_bn
from .models import register_convolution_variant as register_convolution_variant
from .models import register_head_variant as register_head_variant
from .models import register_ic_variant as register_ic_variant
from .version import __version__ as __version__
