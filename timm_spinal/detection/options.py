"""Every option of ``timm-spinal train-detection``; what the loop takes has the names that it has everywhere.

The defaults are the standard schedule "1x" of COCO (Detectron, mmdetection): 12 epochs of 16 images per update,
learning rate 0.02, a tenth of it after 8 and again after 11 epochs.
"""
from dataclasses import dataclass
from typing import Any

from timm_spinal.training.config import LoopConfig
from timm_spinal.training.options import SCHEDULERS, option

METRICS = ('ap', 'ap50', 'ap75', 'ap_small', 'ap_medium', 'ap_large')


@dataclass
class DetectionDataOptions:
    """Data set"""
    data_dir: str = option('', 'folder in the format of COCO or of Pascal VOC')
    data_format: str = option('', 'coco or voc; not given: what the folder looks like', choices=('', 'coco', 'voc'))
    train_split: str = option('train', 'name of the training split, for instance train2017')
    val_split: str = option('validation', 'name of the evaluation split, which chooses the best epoch')
    test_split: str = option('', 'split that is evaluated once, at the end, with the best weights; never for choosing')
    keep_empty: bool = option(False, 'train on images without any box too')
    exif_transpose: bool = option(
        False, 'turn images upright by their EXIF orientation; where the annotated width and height fit the image one '
        'way only, as stored or upright, it is used that way, with or without this flag')
    hflip: float = option(0.5, 'probability of a horizontal flip', low=0., high=1.)
    min_size: list[int] = option([800], 'pixels of the shorter side; of several, one is drawn per image', low=1)
    max_size: int = option(1333, 'most pixels of the longer side', low=1)


@dataclass
class DetectorOptions:
    """Detector"""
    model: str = option('fasterrcnn', 'detector', choices=('fasterrcnn', 'retinanet'))
    backbone: str = option('resnet50', 'any model of timm or timm_spinal with features_only')
    pretrained_backbone: bool = option(False, "start from the backbone's pretrained weights")
    backbone_path: str | None = option(None, "start from this file of the backbone's weights, as a training run leaves")
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
class DetectionConfig(LoopConfig, DetectorOptions, DetectionDataOptions):
    """Everything that the training of a detector depends on."""
    batch_size: int = option(2, 'training images per process and step', low=1, flags=('-b',))
    weight_decay: float = option(1e-4, 'weight decay', low=0.)
    sched: str = option('multistep', 'schedule', choices=SCHEDULERS)
    sched_on_updates: bool = option(True, 'step the schedule at every update instead of every epoch')
    lr_base: float = option(0.02, 'learning rate of a batch of lr_base_size images', low=0.)
    lr_base_size: int = option(16, 'batch size that lr_base is for', low=1)
    warmup_lr: float = option(2e-5, 'learning rate at the start of the warm-up', low=0.)
    warmup_epochs: float = option(0.068, 'epochs of warm-up: 500 of 7330 updates of COCO', low=0.)  # type: ignore
    epochs: int = option(12, 'epochs', low=1)
    decay_milestones: list[int] = option([8, 11], 'epochs at which multistep decays')
    eval_metric: str = option('ap', 'metric of the best epoch', choices=METRICS[:3])
    output: str = option('', 'folder for runs; not given: output/detection')


# what another value of would make another model, other data or another kind of optimizer state
FIXED = (
    'model', 'backbone', 'trainable_layers', 'frozen_bn', 'fpn_channels', 'anchor_scale', 'backbone_kwargs',
    'detector_kwargs', 'data_dir', 'train_split', 'val_split', 'keep_empty', 'batch_size', 'grad_accum_steps', 'seed',
    'opt', 'layer_decay', 'model_ema',
)
