"""The papers' mathematics as plain modules."""

from .classifier_head import ClassifierHead as ClassifierHead
from .control_heads import LinearHead as LinearHead
from .control_heads import MlpHead as MlpHead
from .control_heads import MlpLayers as MlpLayers
from .control_heads import equal_size_mlp_width as equal_size_mlp_width
from .create_head import HEAD_PRESETS as HEAD_PRESETS
from .create_head import HEADS as HEADS
from .create_head import create_head as create_head
from .create_head import head_options as head_options
from .progressive_spinal_head import ProgressiveLayers as ProgressiveLayers
from .progressive_spinal_head import ProgressiveSpinalHead as ProgressiveSpinalHead
from .spinal_head import SpinalHead as SpinalHead
from .spinal_head import SpinalLayers as SpinalLayers
