"""What a run leaves: its best weights as timm reads them back, and ``result.json``.

``timm.create_model('local-dir:RUN', pretrained=True)`` loads the weights.
"""
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file
from timm.utils import unwrap_model

from timm_spinal.files import write_atomically
from timm_spinal.models._timm import save_config_for_hf
from timm_spinal.models.attach_head import HEAD_NAME

from . import report
from .distributed import on_main_process
from .sharded import is_sharded, load_whole

if TYPE_CHECKING:
    from .run import Run

WEIGHTS, CONFIG = 'model.safetensors', 'config.json'
# keys of config.json that are read, and their types
_PRETRAINED_CFG_TYPES: dict[str, Any] = {
    'input_size': list[int], 'test_input_size': list[int] | None, 'min_input_size': list[int] | None,
    'mean': list[float], 'std': list[float], 'num_classes': int, 'crop_pct': float | None,
    'test_crop_pct': float | None, 'interpolation': str | None, 'crop_mode': str | None,
    'label_names': list[str] | dict[str, str] | None,
}
CONFIG_TYPES: dict[str, Any] = {'architecture': str, 'num_classes': int, 'pretrained_cfg': _PRETRAINED_CFG_TYPES,
                                'model_args': dict[str, Any]}
# entries of pretrained_cfg that tell of the weights a model started from, or of the default ones of its name
_OF_OTHER_WEIGHTS = ('tag', 'origin_url', 'description', 'notes')


def export_model(
        folder: Path,
        model: nn.Module,
        state_dict: dict[str, torch.Tensor],
        class_names: list[str] | None,
        data_config: dict[str, Any],
) -> None:
    """Write ``model.safetensors`` and ``config.json``, each replaced in one step.

    Args:
        folder: Existing folder.
        model: Unwrapped timm model, for its name, options and input.
        state_dict: The weights; every key is written, also where tensors share memory.
        class_names: Written as ``label_names``.
        data_config: Input size, mean, std, interpolation and crop that the model was evaluated with.

    Raises:
        UserError: The disk is full; the files that were there are kept.
    """
    model_config = dict(label_names=class_names) if class_names else {}
    write_weights(folder, state_dict)

    def write_config(path: Path) -> None:
        save_config_for_hf(model, str(path), model_config=model_config, data_config=data_config)
        config = own_config(json.loads(path.read_text(encoding='utf-8')), model)
        path.write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')

    write_atomically(folder / CONFIG, write_config)


def own_config(config: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """What timm writes to config.json, without what is not this model's own.

    That is what it says of other weights, the number of classes as an argument, which stands on top already and which
    transformers would pass on twice, and the pooling of a backbone in front of a head that averages the map itself.

    Args:
        config: Content of the config.json that timm saved; not changed.
        model: The model that was saved.
    """
    args = {k: v for k, v in config.get('model_args', {}).items() if k != 'num_classes'}
    head = getattr(model, HEAD_NAME, None)
    if head is not None and head.needs_feature_map and not model.unpooled and args.get('global_pool') == '':
        del args['global_pool']
    cfg = {k: v for k, v in config['pretrained_cfg'].items() if k not in _OF_OTHER_WEIGHTS}
    return {**config, 'model_args': args, 'pretrained_cfg': cfg}


def write_weights(folder: Path, state_dict: dict[str, torch.Tensor]) -> None:
    """Write ``model.safetensors``; every key is written, also where tensors share memory."""
    tensors = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
               for name, value in state_dict.items()}
    # readers other than timm look for the format entry
    write_atomically(folder / WEIGHTS, lambda p: save_file(tensors, p, metadata={'format': 'pt'}))


def whole_weights(run: 'Run', weights: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The unwrapped model that is evaluated, or its average (``ema``), and its state dict. Every process calls it."""
    wrapped = run.task.evaluated(ema=weights == 'ema')
    module = unwrap_model(wrapped)
    if is_sharded(run.accelerator):
        return module, run.accelerator.get_state_dict(wrapped)  # empty but on the main process
    return module, module.state_dict()


# ---- result.json ------------------------------------------------------------------------------------------------


def write_result(run: 'Run') -> dict[str, Any]:
    """Evaluate the test split when there is one, write curves.png and result.json and print the last lines."""
    result = run.problem.result(run)
    if run.data.test_loader is not None and run.progress.best:
        result.update(evaluate_test(run))
    on_main_process(run.accelerator, lambda: report.write_last_files(run, result))
    pictures = on_main_process(run.accelerator, lambda: run.problem.write_pictures(run))
    report.log_pictures(run, pictures)
    return result


def common_result(run: 'Run') -> dict[str, Any]:
    """What ``result.json`` says of any run: its best epoch, and what it counted. Every process calls it."""
    progress, best = run.progress, run.progress.best
    module: Any = unwrap_model(run.task.evaluated())
    skipped = torch.tensor(run.data.skipped(), device=run.accelerator.device)
    return dict(
        **{name: best.get(name) for name in run.problem.metrics},
        epochs=progress.epoch,
        best_epoch=best.get('epoch'),
        best_metric=best.get('metric'),
        best_weights=best.get('weights'),
        keep=run.config.keep,
        same_answer=best.get('same_answer'),
        seconds=progress.seconds,
        images_per_second=progress.images_per_second,
        updates=progress.updates,
        params=sum(p.numel() for p in module.parameters()),
        trained_params=sum(p.numel() for p in module.parameters() if p.requires_grad),
        num_classes=run.data.num_classes,
        train_size=run.data.train_size,
        eval_size=run.data.eval_size,
        skipped=int(run.accelerator.reduce(skipped)),
        stopped_early=progress.stopped_early,
        weights=None if module.loaded_weights is None else module.loaded_weights.as_dict(),
    )


def environment(run: 'Run') -> dict[str, Any]:
    """What any result depends on beside config and data."""
    return dict(
        seed=run.config.seed,
        processes=run.accelerator.num_processes,
        mixed_precision=run.accelerator.mixed_precision,
        hardware=report.hardware(run.accelerator.device, run.accelerator.num_processes),
        versions=report.versions(),
    )


def evaluate_test(run: 'Run') -> dict[str, Any]:
    """The test split, once, with the best weights."""
    model = run.task.evaluated()
    best = load_file(run.folder / WEIGHTS)
    if is_sharded(run.accelerator):
        load_whole(model, best)
    else:
        unwrap_model(model).load_state_dict(best)
    loader = run.accelerator.prepare(run.data.test_loader)
    metrics = run.problem.evaluate(run, model, loader, 'test')
    return {f'test_{k}': metrics[k] for k in (*run.problem.metrics, 'images')}
