"""Every option of ``timm-spinal train-detection``; what the loop takes has the names that it has everywhere.

The defaults are the standard schedule "1x" of COCO (Detectron, mmdetection): 12 epochs of 16 images per update,
learning rate 0.02, a tenth of it after 8 and again after 11 epochs.
"""
from dataclasses import dataclass
from typing import Any

from timm_spinal.training.config import LoopConfig
from timm_spinal.training.options import Options, option, with_default

METRICS = ('ap', 'ap50', 'ap75', 'ap_small', 'ap_medium', 'ap_large')


@dataclass
class DetectionDataOptions(Options, applies_to=('detection',)):
    """Data set"""
    data_dir: str = option('', 'folder in the format of COCO or of Pascal VOC', path=True, on_resume='fixed')
    data_format: str = option('', 'coco or voc; not given: what the folder looks like', choices=('', 'coco', 'voc'))
    train_split: str = option('train', 'name of the training split, for instance train2017', on_resume='fixed')
    val_split: str = option(
        'validation', 'name of the evaluation split, which chooses the best epoch', on_resume='fixed')
    test_split: str = option('', 'split that is evaluated once, at the end, with the best weights; never for choosing')
    keep_empty: bool = option(False, 'train on images without any box too', on_resume='fixed')
    exif_transpose: bool = option(
        False, 'turn images upright by their EXIF orientation; where the annotated width and height fit the image one '
        'way only, as stored or upright, it is used that way, with or without this flag')
    hflip: float = option(0.5, 'probability of a horizontal flip', low=0., high=1.)
    min_size: list[int] = option([800], 'pixels of the shorter side; of several, one is drawn per image', low=1)
    max_size: int = option(1333, 'most pixels of the longer side', low=1)


@dataclass
class DetectorOptions(Options, applies_to=('detection',), on_resume='fixed'):
    """Detector"""
    model: str = option('fasterrcnn', 'detector', choices=('fasterrcnn', 'retinanet'))
    backbone: str = option('resnet50', 'any model of timm or timm_spinal with features_only')
    pretrained_backbone: bool = option(False, "start from the backbone's pretrained weights", on_resume='told')
    backbone_path: str | None = option(
        None, "start from this file of the backbone's weights, as a training run leaves", on_resume='told',
        path=True)
    trainable_layers: int | None = option(
        None, 'layers of the backbone that train, counted from the last (a ResNet has five); not given: 3 where it has '
        'weights, else all', low=0)
    frozen_bn: bool | None = option(
        None, "the backbone's BatchNorm stays as it is, --no-frozen-bn: it trains; not given: it stays where it has "
        'weights')
    fpn_channels: int = option(256, 'channels of the feature pyramid', low=1)
    anchor_scale: float | None = option(
        None, 'side of the anchors in strides of their level; not given: 8 (fasterrcnn), 4 (retinanet)', low=0.1)
    backbone_kwargs: dict[str, Any] = option({}, 'further arguments of the backbone as key=value')
    detector_kwargs: dict[str, Any] = option(
        {}, "further arguments of torchvision's detector as key=value, for instance box_score_thresh=0.1")


@dataclass
class DetectionConfig(LoopConfig, DetectorOptions, DetectionDataOptions, command='detection'):
    """Everything that the training of a detector depends on."""
    batch_size: int = with_default(LoopConfig, 'batch_size', 2)
    weight_decay: float = with_default(LoopConfig, 'weight_decay', 1e-4)
    sched: str = with_default(LoopConfig, 'sched', 'multistep')
    sched_on_updates: bool = with_default(LoopConfig, 'sched_on_updates', True)
    lr_base: float = with_default(LoopConfig, 'lr_base', 0.02)
    lr_base_size: int = with_default(LoopConfig, 'lr_base_size', 16)
    warmup_lr: float = with_default(LoopConfig, 'warmup_lr', 2e-5)
    warmup_epochs: float = with_default(  # type: ignore[assignment]
        LoopConfig, 'warmup_epochs', 0.068, help='epochs of warm-up: 500 of 7330 updates of COCO')
    epochs: int = with_default(LoopConfig, 'epochs', 12)
    decay_milestones: list[int] = with_default(LoopConfig, 'decay_milestones', [8, 11])
    eval_metric: str = with_default(
        LoopConfig, 'eval_metric', 'ap', help='metric of the best epoch', choices=METRICS[:3])
    output: str = with_default(LoopConfig, 'output', '', help='folder for runs; not given: output/detection')
