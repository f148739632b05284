"""What a run makes of itself: best weights, reports after each epoch, and the result at the end."""
import time
from typing import Any

import torch
import torch.nn as nn
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from timm.utils import unwrap_model

from timm_spinal.layers import xnor_implementation

from . import report
from .agree import agree
from .config import TrainConfig
from .export import WEIGHTS, export_model
from .loop import Run, eval_model
from .metrics import same_answer_warning
from .model import needs_registration
from .signs import changed_percent

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def export_best(run: Run, weights: str) -> None:
    """Write the current weights (``model`` or ``ema``) as the best ones."""
    module, state_dict = whole_weights(run, weights)
    agree(run.accelerator, lambda: export_model(
        run.folder, module, state_dict, run.data.class_names, run.data.data_config))


def whole_weights(run: Run, weights: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The unwrapped model that is evaluated, or its average (``ema``), and its state dict. Every process calls it."""
    wrapped = eval_model(run.task, weights == 'ema')
    module = unwrap_model(wrapped)
    if run.accelerator.distributed_type in SHARDED:
        return module, run.accelerator.get_state_dict(wrapped)
    return module, module.state_dict()


def write_reports(run: Run) -> None:
    """Rewrite summary.csv and, now and then, curves.png; print the line of the epoch and feed the trackers."""
    history = run.progress.history
    row = history[-1]
    run.accelerator.log({k: v for k, v in row.items() if k != 'epoch'}, step=run.progress.updates)

    def write() -> None:
        report.write_table(run.folder / 'summary.csv', history)
        if time.monotonic() - run.drawn_at > 30:  # drawing takes as long as some epochs
            report.write_curves(run.folder / 'curves.png', history)
            run.drawn_at = time.monotonic()
        print(report.epoch_line(row, run.last_epoch), flush=True)

    agree(run.accelerator, write)


def finish(run: Run[TrainConfig]) -> dict[str, Any]:
    """Evaluate the test split when there is one, write curves.png and result.json and print the last lines."""
    result = summarise(run)
    if run.data.test_loader is not None and run.progress.best:
        result.update(evaluate_test(run))
    name = unwrap_model(eval_model(run.task)).pretrained_cfg['architecture']
    lines = report.final_lines(result, run.folder, name if needs_registration(name) else '')
    warning = same_answer_warning('the model', result['same_answer'], run.data.class_names)
    write_outcome(run, result, [*lines[:-1], *warning, *lines[-1:]])
    return result


def write_outcome(run: Run, result: dict[str, Any], lines: list[str]) -> None:
    """Write curves.png and result.json, and print the last lines of a run."""
    def write() -> None:
        report.write_curves(run.folder / 'curves.png', run.progress.history)
        report.write_result(run.folder / 'result.json', result)
        for line in lines:
            print(line, flush=True)

    agree(run.accelerator, write)


def summarise(run: Run[TrainConfig]) -> dict[str, Any]:
    """``result.json``: accuracies in percent and losses in nats of the best epoch, counts, speed, origin.

    The accuracies are ``top1`` and ``top5``, or those of `metrics.PairEvaluator` where images have two classes.
    ``epochs`` is the number of epochs done, ``best_epoch`` counts from 0 as summary.csv does; ``seconds`` and
    ``images_per_second`` are of training and evaluation, and of training alone. ``same_answer`` holds the classes of
    the only answer that the model has for all evaluation images; None, as it should be, where it has several.
    ``teacher_top1`` is what --kd-check found. ``weights`` says what became of the weights that the model started from
    (source, tensors loaded, names left out and new), None without any. ``sign_flips`` is the part of the binary weights
    (XnODR), in percent, whose sign is another after the last update than before the first; None without any. ``xnor``,
    for models with xnorized layers only, says what computed them; see `layers.xnor_implementation`.
    """
    config, module = run.config, unwrap_model(eval_model(run.task))
    teacher = {}
    if config.kd_model_name:
        teacher = dict(teacher=config.kd_model_name, teacher_top1=run.progress.teacher_top1)
    return dict(
        model=config.model,
        **counts(run),
        **teacher,
        **xnor_implementation(module),
        # a process of a sharded run holds a part of the weights only
        sign_flips=None if run.accelerator.distributed_type in SHARDED else changed_percent(run.signs, module),
        dataset=config.dataset or config.data_dir,
        **origin(run),
    )


def counts(run: Run) -> dict[str, Any]:
    """What `summarise` says of any run: its best epoch, and what it counted. Every process calls it."""
    progress, best = run.progress, run.progress.best
    module = unwrap_model(eval_model(run.task))
    skipped = torch.tensor(run.data.skipped(), device=run.accelerator.device)
    return dict(
        **{name: best.get(name) for name in run.measured},
        epochs=progress.epoch,
        best_epoch=best.get('epoch'),
        best_metric=best.get('metric'),
        best_weights=best.get('weights'),
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
        weights=None if run.weights is None else run.weights.as_dict(),
    )


def origin(run: Run) -> dict[str, Any]:
    """What any result depends on."""
    return dict(
        seed=run.config.seed,
        processes=run.accelerator.num_processes,
        mixed_precision=run.accelerator.mixed_precision,
        hardware=report.hardware(run.accelerator.device, run.accelerator.num_processes),
        versions=report.versions(),
    )


def evaluate_test(run: Run) -> dict[str, Any]:
    """The test split, once, with the best weights."""
    model = eval_model(run.task)
    unwrap_model(model).load_state_dict(load_file(run.folder / WEIGHTS))
    loader = run.accelerator.prepare(run.data.test_loader)
    metrics = run.measure(model, loader, 'test')
    return {f'test_{k}': metrics[k] for k in (*run.measured, 'images')}
