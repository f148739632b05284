"""Faster R-CNN and RetinaNet of torchvision over timm's backbones.

Faster R-CNN: Ren et al. 2015, https://arxiv.org/abs/1506.01497. RetinaNet: Lin et al. 2017,
https://arxiv.org/abs/1708.02002. With ``resnet50`` they have the parameters of torchvision's
``fasterrcnn_resnet50_fpn`` and ``retinanet_resnet50_fpn``, under the same names.
"""
import difflib
import inspect
from dataclasses import dataclass
from typing import Any, Callable, Sequence

import torch.nn as nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from timm_spinal.errors import UserError

from .backbone import TimmPyramid, architecture, create_body, freeze_layers

RATIOS = (0.5, 1., 2.)
PRETRAINED_LAYERS = 3  # that train when the backbone has weights


def _fasterrcnn(pyramid: TimmPyramid, num_classes: int, scale: float, **kwargs: Any) -> FasterRCNN:
    strides = [*pyramid.strides, 2 * pyramid.strides[-1]]
    anchors = AnchorGenerator(tuple((scale * stride,) for stride in strides), (RATIOS,) * len(strides))
    names = [str(i) for i in range(len(pyramid.strides))]
    pool = MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2)
    return FasterRCNN(pyramid, num_classes, rpn_anchor_generator=anchors, box_roi_pool=pool, **kwargs)


def _retinanet(pyramid: TimmPyramid, num_classes: int, scale: float, **kwargs: Any) -> RetinaNet:
    last = pyramid.strides[-1]
    strides = [*pyramid.strides, 2 * last, 4 * last]
    # whole pixels, as torchvision's
    sizes = tuple(tuple(int(scale * stride * 2 ** (i / 3)) for i in range(3)) for stride in strides)
    anchors = AnchorGenerator(sizes, (RATIOS,) * len(strides))
    return RetinaNet(pyramid, num_classes, anchor_generator=anchors, **kwargs)


@dataclass(frozen=True)
class Detector:
    """How a detector is built: strides of the backbone's features, side of the anchors in strides, further levels."""
    cls: type[nn.Module]
    build: Callable[..., nn.Module]
    strides: tuple[int, ...]
    anchor_scale: float
    extra_blocks: Callable[[int], ExtraFPNBlock]


DETECTORS = {
    'fasterrcnn': Detector(FasterRCNN, _fasterrcnn, (4, 8, 16, 32), 8., lambda channels: LastLevelMaxPool()),
    'retinanet': Detector(RetinaNet, _retinanet, (8, 16, 32), 4., lambda channels: LastLevelP6P7(channels, channels)),
}


def create_detector(
        name: str,
        backbone: str = 'resnet50',
        num_classes: int = 91,
        pretrained_backbone: bool | str = False,
        trainable_layers: int | None = None,
        frozen_bn: bool | None = None,
        min_size: int | Sequence[int] = 800,
        max_size: int = 1333,
        fpn_channels: int = 256,
        anchor_scale: float | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
) -> Any:
    """A detector: RGB images (3, H, W) in [0, 1], of any sizes, to boxes in pixels, as torchvision's.

    In train mode it takes images and targets and returns the losses by name; in eval mode it takes images and returns
    ``boxes`` (N, 4) as x1, y1, x2, y2, ``labels`` (N,) from 1 on, and ``scores`` (N,) for each.

    Args:
        name: One of `DETECTORS`.
        backbone: Any model of timm or timm_spinal with ``features_only``.
        num_classes: Classes and background, which is class 0: 81 for the 80 classes of COCO, 91 for its own numbering.
        pretrained_backbone: Load the backbone's weights, or those of this file.
        trainable_layers: How many of the backbone's layers train, counted from the last (a ResNet has five); None: 3 of
            a backbone with weights, else all.
        frozen_bn: The backbone's BatchNorm does not train and counts no statistics; None: where it has weights.
        min_size: Pixels that the shorter side is scaled to; of several, one is drawn for each training image.
        max_size: Most pixels of the longer side.
        fpn_channels: Channels of the pyramid.
        anchor_scale: Side of the anchors in strides of their level; None: the detector's own, 8 and 4.
        backbone_kwargs: Further arguments of the backbone.
        kwargs: Further arguments of torchvision's ``FasterRCNN`` or ``RetinaNet``, such as ``box_score_thresh``.

    Raises:
        UserError: Unknown detector, backbone or option; a backbone that gives no features; weights that do not fit.
    """
    _check_options(name, num_classes, kwargs)
    kind = DETECTORS[name]
    arch, saved_kwargs = architecture(backbone)
    body = create_body(backbone, pretrained_backbone, backbone_kwargs or {})
    trained = bool(pretrained_backbone)
    frozen_bn = trained if frozen_bn is None else frozen_bn
    if trainable_layers is None and trained:
        trainable_layers = PRETRAINED_LAYERS
    if trainable_layers is not None:
        freeze_layers(body, trainable_layers)
    pyramid = TimmPyramid(body, kind.strides, fpn_channels, kind.extra_blocks(fpn_channels), frozen_bn)
    cfg = body.pretrained_cfg
    sizes = dict(min_size=min_size, max_size=max_size)
    try:
        detector: Any = kind.build(
            pyramid, num_classes, anchor_scale or kind.anchor_scale, image_mean=list(cfg['mean']),
            image_std=list(cfg['std']), **sizes, **kwargs)
    except (TypeError, ValueError) as e:
        raise UserError(f'detector {name}: {" ".join(str(e).split())}; check its options') from e
    # what `saved` writes and makes it of again
    detector.loaded_weights = body.loaded_weights
    detector.options = dict(
        name=name, backbone=arch, num_classes=num_classes, trainable_layers=trainable_layers, frozen_bn=frozen_bn,
        **sizes, fpn_channels=fpn_channels, anchor_scale=anchor_scale,
        backbone_kwargs={**saved_kwargs, **(backbone_kwargs or {})}, **kwargs)
    return detector


def _check_options(name: str, num_classes: int, kwargs: dict[str, Any]) -> None:
    if name not in DETECTORS:
        raise UserError(f'unknown detector {name!r}; known are {", ".join(DETECTORS)}')
    if num_classes < 2:
        raise UserError(f'num_classes {num_classes}: background is one, so give 2 or more')
    # torchvision takes any keyword and passes over those that it does not know
    classes = DETECTORS[name].cls, GeneralizedRCNNTransform
    known = {key for cls in classes for key in inspect.signature(cls).parameters} - {'kwargs'}
    if unknown := sorted(kwargs.keys() - known):
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f'did you mean {near[0]}?' if near else f"see torchvision's {DETECTORS[name].cls.__name__}"
        raise UserError(f'detector {name}: unknown option {unknown[0]!r}; {hint}')
