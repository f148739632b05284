"""One training run of a detector from a config, through the loop of `timm_spinal.training`."""
import hashlib
from dataclasses import asdict, replace
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.layers import convert_sync_batchnorm
from timm.models import safe_model_name

from timm_spinal.training import outcome
from timm_spinal.training.agree import agree
from timm_spinal.training.data import TrainData
from timm_spinal.training.loop import Run
from timm_spinal.training.report import result_lines
from timm_spinal.training.start import (
    assemble,
    begin,
    carry_out,
    create_with_weights,
    folder_and_checkpoint,
    make_accelerator,
    used_precision,
)

from .annotations import DetectionSet
from .coco_metrics import check_installed
from .data import create_data, open_splits
from .detector import PRETRAINED_LAYERS, create_detector
from .evaluate import Measure
from .options import METRICS, DetectionConfig
from .plot import draw_boxes
from .saved import save_detector
from .task import DetectionTask

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
    accelerator = make_accelerator(config, [])
    splits: dict[str, DetectionSet] = {}
    return carry_out(
        accelerator, lambda: prepare(config, accelerator, splits), lambda run: finish(run, splits))


def prepare(config: DetectionConfig, accelerator: Accelerator, splits: dict[str, DetectionSet]) -> Run[DetectionConfig]:
    """Make everything that the loop needs, put a checkpoint back when resuming, and write the first files.

    Args:
        config: The run's config.
        accelerator: Its accelerator.
        splits: Filled with the splits of the data.
    """
    config = replace(
        config, output=config.output or OUTPUT, mixed_precision=used_precision(config, accelerator))
    with accelerator.main_process_first():
        splits.update(open_splits(config))
    data = create_data(config, splits, accelerator.num_processes, accelerator.gradient_accumulation_steps)
    set_seed(config.seed)
    with accelerator.main_process_first():
        model = create_with_weights(
            lambda config: create_model(config, data.num_classes), config, accelerator,
            **without_weights(config))
    for split in splits.values():
        accelerator.print(split.describe())
    if not (config.pretrained_backbone or config.backbone_path) and model.options['frozen_bn']:
        accelerator.print('warning: --frozen-bn: the BatchNorm of a backbone without weights stays as it was drawn')
    name = safe_model_name(f'{config.model}-{config.backbone.rpartition("/")[2]}')
    description = describe(config, data)
    folder, checkpoint = folder_and_checkpoint(accelerator, config, name, description)
    if config.sync_bn and accelerator.num_processes > 1:
        model = convert_sync_batchnorm(model)
    model.to(accelerator.device)
    images = {name: split.images for name, split in splits.items()}
    dataset: Any = data.eval_loader.dataset
    measure = Measure(accelerator, dict(images, ema=images['eval']), data.num_classes - 1)

    def on_best(run: Run, weights: str) -> None:
        module, state_dict = outcome.whole_weights(run, weights)
        found = measure.found['ema' if weights == 'ema' else 'eval']
        names = splits['eval'].class_names

        def write() -> None:
            save_detector(run.folder, module, state_dict, names)
            draw_boxes(run.folder / 'boxes.png', images['eval'], found, names, dataset.decode)

        agree(accelerator, write)

    run = assemble(
        config, accelerator, folder, DetectionTask(model, accelerator.device), data, metric=config.eval_metric,
        measured=METRICS, measure=measure, description=description, on_best=on_best,
        on_epoch=outcome.write_reports, weights=model.loaded_weights)
    begin(run, checkpoint)
    return run


def create_model(config: DetectionConfig, num_classes: int) -> Any:
    """The detector that a config names, on the CPU."""
    return create_detector(
        config.model,
        backbone=config.backbone,
        num_classes=num_classes,
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


def without_weights(config: DetectionConfig) -> dict[str, Any]:
    """Options that make the detector of a config without the weights of its backbone."""
    if not (config.pretrained_backbone or config.backbone_path):
        return {}
    layers = PRETRAINED_LAYERS if config.trainable_layers is None else config.trainable_layers
    return dict(pretrained_backbone=False, backbone_path=None, trainable_layers=layers,
                frozen_bn=config.frozen_bn is not False)


def describe(config: DetectionConfig, data: TrainData) -> dict[str, Any]:
    """What a checkpoint remembers of config and data, to refuse a resumption with others."""
    names = hashlib.sha256(repr(data.class_names).encode()).hexdigest()[:12]
    found = dict(train_size=data.train_size, eval_size=data.eval_size, num_classes=data.num_classes, class_names=names)
    return dict(config=asdict(config), data=found)


def finish(run: Run[DetectionConfig], splits: dict[str, DetectionSet]) -> dict[str, Any]:
    """Evaluate the test split when there is one, write curves.png and result.json and print the last lines."""
    config = run.config
    result = dict(
        model=config.model, backbone=config.backbone, **outcome.counts(run), dataset=config.data_dir,
        annotations={name: asdict(split.counts) for name, split in splits.items()}, **outcome.origin(run))
    if run.data.test_loader is not None and run.progress.best:
        result.update(outcome.evaluate_test(run))
    load = f'from timm_spinal.detection import load_detector; model = load_detector({str(run.folder)!r})'
    outcome.write_outcome(run, result, result_lines(result, run.folder, load))
    return result
