"""Measure loss, top-1 and top-5 of models on a data set.

    accelerate launch -m timm_spinal.validate --model local-dir:output/train/RUN --data-dir my/images
    accelerate launch -m timm_spinal.validate --checkpoint output/train/RUN --config output/train/RUN/args.yaml
    accelerate launch -m timm_spinal.validate --checkpoint 'output/train/*' --data-dir my/images --results-file all.csv
    accelerate launch -m timm_spinal.validate --model 'resnet*' --pretrained --data-dir imagenet

``--model`` takes a name, ``hf-hub:org/name``, ``local-dir:FOLDER`` or a wildcard; ``--checkpoint`` a run folder, one of
its ``last/step-*`` folders, a weights file for ``--model``, or a wildcard of those. Every image counts once, whatever
the number of processes. Weights whose classifier does not fit the model are an error.
"""
import glob
import json
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from accelerate import Accelerator

from timm_spinal.cli import guard
from timm_spinal.errors import UserError, dead_workers_named
from timm_spinal.evaluation.evaluate import evaluate
from timm_spinal.evaluation.judgement import check_report, named_classes, write_report
from timm_spinal.evaluation.metrics import TITLES, accuracies, same_answer_warning
from timm_spinal.evaluation.predictions import Predictions
from timm_spinal.layers import xnor_implementation
from timm_spinal.models.load_weights import load_exactly
from timm_spinal.models.weight_files import WeightsError
from timm_spinal.training import report
from timm_spinal.training.checkpoint import EMA, STATE, damage, find_checkpoints, read_state
from timm_spinal.training.config import ModelOptions, ValidateConfig
from timm_spinal.training.data import count_skipped, create_eval_loader
from timm_spinal.training.distributed import new_accelerator, on_main_process
from timm_spinal.training.model import check_classifier, create_model
from timm_spinal.training.parser import RESULTS, check_output_file, parse_config
from timm_spinal.training.results import CONFIG, WEIGHTS
from timm_spinal.training.splits import create_datasets, passed_over_lines


@dataclass
class Candidate:
    """A model to evaluate: its name in the table, its config, and a file of weights where the config names none."""
    name: str
    config: ValidateConfig
    file: Path | None = None


def validate(config: ValidateConfig) -> list[dict[str, Any]]:
    """Evaluate every model that a config names, print a line for each and write ``results_file`` after each.

    Returns:
        One row per model: ``model``, ``top1``, ``top1_err``, ``top5``, ``top5_err`` (percent; for images with two
        classes those of `metrics.PairEvaluator`, each with its ``_err``), ``loss`` (nats), ``param_count`` (millions),
        ``img_size``, ``crop_pct``, ``crops``, ``tta``, ``interpolation``, ``images``, ``skipped``, ``nonfinite``,
        ``same_answer`` (`metrics.SameAnswer`), ``images_per_second``, and for a model with xnorized layers ``xnor``,
        what computed them (`layers.xnor_implementation`); or ``model`` and ``error`` for one of several that could not
        be evaluated.

    Raises:
        UserError: Nothing that could be evaluated, or, with a single model, whatever is wrong with it.
    """
    if config.results_file:
        check_output_file(config.results_file, 'results_file', RESULTS)
    if config.report:
        check_report(config.report)
    accelerator = new_accelerator(config.mixed_precision)
    names = find_models(config)
    if config.report and len(names) > 1:
        raise UserError(f'--report {config.report}: is for a single model, and {len(names)} match; name one')
    rows: list[dict[str, Any]] = []
    printed: set[str] = set()
    for name in names:
        try:
            rows.append(validate_one(accelerator, open_candidate(config, name), printed))
            line = _line(rows[-1])
        except UserError as e:
            if len(names) == 1:
                raise
            rows.append(dict(model=name, error=str(e)))
            line = f'{name}: error: {e}'
        if accelerator.is_main_process:
            print(line, flush=True)
            if config.results_file:
                _write(Path(config.results_file), rows)
    return rows


def find_models(config: ValidateConfig) -> list[str]:
    """The names or paths that ``--checkpoint`` or ``--model`` stand for.

    Raises:
        UserError: A wildcard that matches nothing.
    """
    if config.checkpoint:
        paths = sorted(glob.glob(config.checkpoint)) if glob.has_magic(config.checkpoint) else [config.checkpoint]
        if not paths:
            raise UserError(f'checkpoint {config.checkpoint}: no file or folder matches it; check the path')
        return paths
    if not glob.has_magic(config.model):
        return [config.model]
    names = timm.list_models(config.model, pretrained=config.pretrained)
    if not names:
        raise UserError(f"model {config.model!r}: no {'pretrained ' if config.pretrained else ''}model matches")
    return names


def open_candidate(config: ValidateConfig, name: str) -> Candidate:
    """Where the weights of a name or path are, and which model they belong to.

    Raises:
        UserError: A path that is none of the kinds that can be evaluated, or a damaged checkpoint.
    """
    if not config.checkpoint:
        # who names a published model means its weights, without which timm would start with new ones
        published = name.startswith(('hf-hub:', 'local-dir:'))
        return Candidate(name, replace(config, model=name, pretrained=config.pretrained or published))
    path = Path(name)
    if (path / STATE).is_file():
        return _open_checkpoint(config, path)
    if (path / CONFIG).is_file() and (path / WEIGHTS).is_file() and not config.use_ema:
        return Candidate(name, replace(config, model=f'local-dir:{path}', pretrained=True))
    if path.is_dir():
        inside = find_checkpoints(path / 'last')
        if not inside:
            raise UserError(f'checkpoint {path}: neither a run folder nor a checkpoint; give RUN, RUN/last/step-* or a '
                            'weights file')
        return _open_checkpoint(config, inside[0])
    if not path.is_file():
        raise UserError(f'checkpoint {path}: no such file or folder')
    if config.pretrained_path or config.initial_checkpoint:
        raise UserError('--checkpoint: names the weights already; leave out --pretrained-path and --initial-checkpoint')
    return Candidate(name, replace(config, pretrained=False), path)


def _open_checkpoint(config: ValidateConfig, path: Path) -> Candidate:
    """The state of a run, with the model options that the run had."""
    if (reason := damage(path)) is not None:
        raise UserError(f'checkpoint {path} is damaged: {reason}; evaluate another one')
    if config.use_ema and not (path / EMA).is_file():
        raise UserError(f'checkpoint {path}: the run kept no moving average; leave out --use-ema')
    if not (path / (EMA if config.use_ema else WEIGHTS)).is_file():
        raise UserError(f'checkpoint {path}: its weights are in shards; give {path.parent.parent}, where the best ones '
                        'are whole, or join them with accelerate merge-weights')
    saved = read_state(path)['config']
    names = {f.name for f in fields(ModelOptions)} & saved.keys()
    of_run = {name: saved[name] for name in names}
    of_run.update(pretrained=False, pretrained_path=None, initial_checkpoint='')
    return Candidate(str(path), replace(config, **of_run), path / (EMA if config.use_ema else WEIGHTS))


def validate_one(accelerator: Accelerator, candidate: Candidate, printed: set[str]) -> dict[str, Any]:
    """The row of one model; see `validate`.

    A line about data that are passed over is printed unless it is in ``printed``, and added there.
    """
    config = candidate.config
    with accelerator.main_process_first():
        datasets = create_datasets(config, train=False)
        model: Any = create_model(config, config.num_classes)
    line = passed_over_lines(dict(eval=datasets.eval))
    if line and line not in printed:
        printed.add(line)
        accelerator.print(line, flush=True)
    if candidate.file is not None:
        try:
            # a run keeps its average in a file of its own
            model.loaded_weights = load_exactly(
                model, str(candidate.file), config.use_ema and candidate.file.name != EMA)
        except WeightsError as e:
            raise UserError(f'checkpoint {e}') from e
    if model.loaded_weights is not None:
        check_classifier(model)
        accelerator.print(f'weights {model.loaded_weights}')
    _check_class_names(model, datasets.class_names, candidate.name)
    loader, data_config = create_eval_loader(config, model, datasets, config.crops)
    if config.crops > 1 and data_config['crop_pct'] >= 1.:
        accelerator.print(f'{candidate.name}: crop_pct is 1, so the crops of a square image differ by mirroring only; '
                          'give a smaller --crop-pct')
    model.to(accelerator.device)
    params = sum(p.numel() for p in model.parameters())
    if config.torchcompile:
        model.compile(backend=config.torchcompile, mode=config.torchcompile_mode)
    multi_label = datasets.multi_label
    if config.report and multi_label:
        raise UserError(f'--report {config.report}: the images of {datasets.eval.name} have two classes, of which '
                        'there is no confusion matrix; leave it out')
    kept = Predictions(config.val_split, None if datasets.eval.streamed else datasets.eval.file_name)
    with dead_workers_named(lambda: 'run it again'):
        metrics = evaluate(
            accelerator, model, accelerator.prepare(loader), config.channels_last, candidate.name, multi_label,
            kept.add if config.report else None, flip=config.tta == 'flip')
    measured = {}
    for name in accuracies(multi_label):
        measured.update({name: metrics[name], f'{name}_err': 100 - metrics[name]})
    skipped = accelerator.reduce(torch.tensor(count_skipped(loader), device=accelerator.device))
    row = dict(
        model=candidate.name,
        **measured,
        loss=metrics['loss'],
        param_count=round(params / 1e6, 2),
        img_size=data_config['input_size'][-1],
        crop_pct=data_config['crop_pct'],
        crops=config.crops,
        tta=config.tta,
        interpolation=data_config['interpolation'],
        images=metrics['images'],
        skipped=int(skipped),
        nonfinite=metrics['nonfinite'],
        same_answer=metrics['same_answer'],
        images_per_second=metrics['images'] / metrics['seconds'],
        **xnor_implementation(model),
    )
    if config.report:
        names = named_classes(model.pretrained_cfg.get('label_names') or datasets.class_names, model.num_classes)
        on_main_process(accelerator, lambda: _report(config, row, kept, names, loader, datasets.eval.name))
    return row


def _report(
        config: ValidateConfig,
        row: dict[str, Any],
        kept: Predictions,
        names: list[str],
        loader: Any,
        data: str,
) -> None:
    """Write --report."""
    columns = kept.columns()
    facts = {
        'data': data, 'images': f'{row["images"]:,}' + (f', {row["skipped"]:,} unreadable' if row['skipped'] else ''),
        **{TITLES[name]: f'{row[name]:.2f} %' for name in accuracies(False)}, 'loss': f'{row["loss"]:.4f}',
        'image size': str(row['img_size']), **({'test-time augmentation': config.tta} if config.tta else {}),
        **({'crops': str(config.crops)} if config.crops > 1 else {})}
    files = np.asarray(kept.files(columns['place']))
    write_report(Path(config.report), row['model'], facts, dict(columns, file=files), names,
                 getattr(loader.dataset, 'picture', None))


def _check_class_names(model: Any, class_names: list[str] | None, name: str) -> None:
    """Refuse data whose folders are other classes, or in another order, than the model was trained for."""
    known = model.pretrained_cfg.get('label_names')
    if known and class_names and list(known) != list(class_names) and len(known) == len(class_names):
        wrong = next((a, b) for a, b in zip(known, class_names) if a != b)
        raise UserError(f'classes: {name} was trained for other classes than those of the data (its {wrong[0]!r} '
                        f'is {wrong[1]!r}); use --class-map')


def _line(row: dict[str, Any]) -> str:
    skipped = f', {row["skipped"]} unreadable' if row['skipped'] else ''
    bad = f', NaN or infinite logits for {row["nonfinite"]}' if row['nonfinite'] else ''
    xnor = f', binary layers by {row["xnor"]}' if 'xnor' in row else ''
    line = (f'{row["model"]}: {report.accuracy_text(row, 3)}, loss {row["loss"]:.4f}, '
            f'{row["images"]} images{skipped}{bad}, {row["images_per_second"]:.0f} images/s{xnor}')
    return '\n'.join([line, *same_answer_warning(row['model'], row['same_answer'], None)])


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == '.json':
        report.write_text(path, json.dumps(rows, indent=2) + '\n')
        return
    report.write_table(path, rows)


def run(argv: list[str]) -> int:
    """Evaluate as the arguments say; returns the exit code."""
    rows = validate(parse_config(argv, ValidateConfig, 'timm-spinal validate', __doc__))
    return 0 if all('error' not in row for row in rows) else 2


if __name__ == '__main__':
    sys.exit(guard(run, sys.argv[1:]))
