"""Training of detectors: their data, model, task and metrics, for the loop of `timm_spinal.training.train`."""
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from accelerate import Accelerator
from timm.models import safe_model_name
from torch.utils.data import DataLoader

from timm_spinal.training.distributed import used_precision
from timm_spinal.training.results import common_result, environment
from timm_spinal.training.run import Problem, Run
from timm_spinal.training.task import Task
from timm_spinal.training.train import train

from .coco_metrics import check_installed
from .data import create_data, open_splits
from .detector import PRETRAINED_LAYERS, create_detector
from .evaluate import evaluate
from .options import METRICS, DetectionConfig
from .plot import draw_boxes
from .saved import save_detector

OUTPUT = 'output/detection'


def train_detector(config: DetectionConfig) -> dict[str, Any]:
    """Train a detector as a config says, and write its run folder.

    Every process of a launch calls it. The folder is that of any run here (``args.yaml``, ``summary.csv``,
    ``curves.png``, ``result.json``, ``last/``, ``model.safetensors``, ``config.json``) and has ``boxes.png``, what the
    best weights find on some images.

    Args:
        config: The run's config.

    Returns:
        The content of ``result.json``: AP in percent of the best epoch, and the counts of the data.

    Raises:
        UserError: Anything a user can mend; one line.
        StopRequested: SIGINT or SIGTERM; a checkpoint has been written.
    """
    check_installed()
    return train(config, problem=Detection)


class DetectionTask(Task):
    """The losses of a torchvision detector and their sum, as its authors weigh them.

    Args:
        model: Made by `create_detector`, on its device.
        device: Where it is.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        super().__init__(device=device, verbose=False)
        self.trainable_module = model

    def forward(self, images: Any, targets: Any) -> dict[str, torch.Tensor]:  # type: ignore[override]
        """Images (3, H, W) and targets, a list each, to the sum ``loss`` and the losses by name."""
        losses = self.trainable_module(images, targets)
        return dict(loss=sum(losses.values()), **losses)


class Detection(Problem[DetectionConfig]):
    """Images and boxes, in the format of COCO or of Pascal VOC.

    Raises:
        UserError: Data that cannot be used.
    """
    metrics = METRICS
    same_shapes = False

    def __init__(self, config: DetectionConfig, accelerator: Accelerator):
        self.config = config = replace(
            config, output=config.output or OUTPUT, mixed_precision=used_precision(config, accelerator))
        with accelerator.main_process_first():
            self.splits = open_splits(config)
        self.data = create_data(
            config, self.splits, accelerator.num_processes, accelerator.gradient_accumulation_steps)
        self.name = safe_model_name(f'{config.model}-{config.backbone.rpartition("/")[2]}')
        self.metric = config.eval_metric

    def build_model(self, config: DetectionConfig) -> Any:
        return create_detector(
            config.model,
            backbone=config.backbone,
            num_classes=self.data.num_classes,
            pretrained_backbone=config.backbone_path or config.pretrained_backbone,
            trainable_layers=config.trainable_layers,
            frozen_bn=config.frozen_bn,
            min_size=config.min_size,
            max_size=config.max_size,
            fpn_channels=config.fpn_channels,
            anchor_scale=config.anchor_scale,
            backbone_kwargs=config.backbone_kwargs,
            **config.detector_kwargs,
        )

    def without_weights(self) -> dict[str, Any]:
        config = self.config
        if not (config.pretrained_backbone or config.backbone_path):
            return {}
        layers = PRETRAINED_LAYERS if config.trainable_layers is None else config.trainable_layers
        return dict(pretrained_backbone=False, backbone_path=None, trainable_layers=layers,
                    frozen_bn=config.frozen_bn is not False)

    def create_data(self, model: Any, accelerator: Accelerator) -> None:
        """There already; say what it is."""
        for split in self.splits.values():
            accelerator.print(split.describe())
        if not (self.config.pretrained_backbone or self.config.backbone_path) and model.options['frozen_bn']:
            accelerator.print('warning: --frozen-bn: the backbone has no pretrained weights, so its BatchNorm keeps '
                              'its untrained state')

    def create_task(self, model: Any, accelerator: Accelerator, resuming: bool) -> DetectionTask:
        return DetectionTask(model, accelerator.device)

    def evaluate(self, run: Run[DetectionConfig], model: nn.Module, loader: DataLoader, split: str) -> dict[str, Any]:
        """AP in percent, and the ``detections``."""
        images = self.splits['test' if split == 'test' else 'eval'].images
        return evaluate(run.accelerator, model, loader, images, self.data.num_classes - 1, split)

    def save_best(
            self,
            folder: Path,
            model: Any,
            state_dict: dict[str, torch.Tensor],
            metrics: dict[str, Any],
    ) -> None:
        """Weights, and pictures of what they find."""
        split = self.splits['eval']
        dataset: Any = self.data.eval_loader.dataset
        save_detector(folder, model, state_dict, split.class_names)
        draw_boxes(folder / 'boxes.png', split.images, metrics['detections'], split.class_names, dataset.decode)

    def result(self, run: Run[DetectionConfig]) -> dict[str, Any]:
        """``result.json``: AP in percent of the best epoch, the counts of the data, speed, origin."""
        return dict(
            model=self.config.model,
            backbone=self.config.backbone,
            **common_result(run),
            dataset=self.config.data_dir,
            annotations={name: asdict(split.counts) for name, split in self.splits.items()},
            **environment(run),
        )

    def how_to_load(self, run: Run[DetectionConfig]) -> str:
        return f'from timm_spinal.detection import load_detector; model = load_detector({str(run.folder)!r})'
