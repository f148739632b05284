"""What is published, read from a run folder or taken from a model: weights, config, recipe, results, files."""
import json
import tempfile
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from timm_spinal.compare.runs import read_result
from timm_spinal.errors import UserError
from timm_spinal.evaluation.judgement import CONFUSION, WORST
from timm_spinal.files import read_json
from timm_spinal.models._timm import save_config_for_hf
from timm_spinal.models.weight_files import read_weights
from timm_spinal.training.checkpoint import find_checkpoints, read_state
from timm_spinal.training.config import TrainConfig, ValidateConfig
from timm_spinal.training.model import check_model_name
from timm_spinal.training.parser import load_yaml
from timm_spinal.training.results import CONFIG, CONFIG_TYPES, WEIGHTS
from timm_spinal.validate import open_candidate

from .scores import Score, accuracies_in, scores_of, validation_split


@dataclass
class Publication:
    """Weights to publish, and what is known of how they were made.

    Attributes:
        state_dict: Weights as trained.
        config: Content of timm's config.json.
        args: The run's config; None for a model without a run.
        result: Content of result.json; empty without a run.
        scores: Accuracies of exactly these weights.
        files: Further files by their name in the repository.
        folder: The run folder, if there is one.
        model: The model in memory that they are from, if there is one.
        before: Accuracies before the weights were rounded to float16, where those after it are not known.
    """
    state_dict: dict[str, torch.Tensor]
    config: dict[str, Any]
    args: TrainConfig | None = None
    result: dict[str, Any] = field(default_factory=dict)
    scores: list[Score] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)
    folder: Path | None = None
    model: nn.Module | None = None
    before: list[Score] = field(default_factory=list)

    @property
    def architecture(self) -> str:
        return self.config['architecture']

    @property
    def input_size(self) -> tuple[int, int, int]:
        return tuple(self.config['pretrained_cfg']['input_size'])  # type: ignore[return-value]


def open_model(model: nn.Module, class_names: list[str] | None = None) -> Publication:
    """A model in memory, made by ``timm.create_model`` or ``attach_head``.

    Raises:
        UserError: It is no timm model, or an option of it cannot be written to config.json.
    """
    if not getattr(model, 'pretrained_cfg', {}).get('architecture'):
        raise UserError(f'{type(model).__name__}: timm.create_model did not make this model, so nothing could load it; '
                        'publish one that it made')
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CONFIG
        try:
            save_config_for_hf(model, str(path), model_config=dict(label_names=class_names) if class_names else None)
        except ValueError as e:
            raise UserError(f'{model.pretrained_cfg["architecture"]}: {e}') from e  # type: ignore[index]
        config = json.loads(path.read_text())
    check_model_name(config['architecture'])
    return Publication(dict(model.state_dict()), config, model=model)


def open_run(folder: Path, weights: str = 'best', result: dict[str, Any] | None = None) -> Publication:
    """A run folder of the trainer, or a folder of weights without their run, as `timm-spinal pack` and timm write it.

    Args:
        folder: The folder.
        weights: 'best', or 'raw' or 'ema' of the last checkpoint.
        result: What result.json will hold, of a run that still goes on.

    Raises:
        UserError: It is no run folder, the run has no best weights or has not ended, or a file is damaged.
    """
    if not (folder / 'args.yaml').is_file():
        return _open_weights(folder, weights)
    args = _read_args(folder)
    if not (folder / WEIGHTS).is_file() or not (folder / CONFIG).is_file():
        raise UserError(f'{folder}: it contains no best checkpoint ({WEIGHTS} with {CONFIG}); the run has had no '
                        'finite evaluation yet: continue with --resume')
    config = _read_config(folder)
    if result is None:
        result = read_result(folder)
        if result is None:
            raise UserError(f'{folder}: the run has not ended (no result.json); continue with --resume')
        if result.get('train_size') is None or result.get('params') is None:
            raise UserError(f'{folder / "result.json"}: it has no results of the training; restore it, or train again')
    of_best = (CONFUSION, WORST) if weights == 'best' else ()  # which these are drawn of
    names = ('summary.csv', 'curves.png', *of_best)
    files = {name: folder / name for name in names if (folder / name).is_file()}
    if weights == 'best':
        scores = scores_of(args, result)
        return Publication(_read_weights(folder / WEIGHTS), config, args, result, scores, files, folder)
    state_dict, scores = _last_checkpoint(folder, args, weights == 'ema', result)
    return Publication(state_dict, config, args, result, scores, files, folder)


def _open_weights(folder: Path, weights: str) -> Publication:
    """Weights without a run: nothing is known of how they were made."""
    of_a_run = any((folder / name).exists() for name in ('result.json', 'summary.csv', 'last'))
    if of_a_run or not (folder / WEIGHTS).is_file() or not (folder / CONFIG).is_file():
        raise UserError(f'{folder}: it is not a run folder (no args.yaml in it); give the folder that the trainer '
                        'printed')
    if weights != 'best':
        raise UserError(f'--weights {weights}: {folder} is not a run folder (no args.yaml in it) and has only one set '
                        'of weights; leave --weights out')
    return Publication(_read_weights(folder / WEIGHTS), _read_config(folder), folder=folder)


def _read_args(folder: Path) -> TrainConfig:
    known = {f.name for f in fields(TrainConfig)}
    return replace(TrainConfig(), **{k: v for k, v in load_yaml(folder / 'args.yaml').items() if k in known})


def _read_config(folder: Path) -> dict[str, Any]:
    fix = 'train again, or restore the file'
    config = read_json(folder / CONFIG, CONFIG_TYPES, fix)
    if 'architecture' not in config:
        raise UserError(f'{folder / CONFIG}: names no architecture; {fix}')
    check_model_name(config['architecture'])
    if not config.get('pretrained_cfg', {}).get('input_size'):
        raise UserError(f'{folder / CONFIG}: names no size of images (input_size of pretrained_cfg); {fix}')
    return config


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as e:
        raise UserError(f'{path}: is damaged ({" ".join(str(e).split())[:100]}); restore it, or train again') from e


def _last_checkpoint(
        folder: Path,
        args: TrainConfig,
        ema: bool,
        result: dict[str, Any],
) -> tuple[dict[str, torch.Tensor], list[Score]]:
    """The state dict of the newest checkpoint, and its accuracy if it was written at the end of an epoch."""
    found = find_checkpoints(folder / 'last')
    if not found:
        raise UserError(f'{folder}: it has no checkpoint under last/; publish the best weights with --weights best')
    candidate = open_candidate(ValidateConfig(checkpoint=str(found[0]), use_ema=ema), str(found[0]))
    assert candidate.file is not None
    progress = read_state(found[0])['progress']
    row = progress['history'][-1] if progress['history'] and not progress['batch'] else {}
    accuracies = accuracies_in(row, 'ema_' if ema else 'eval_')
    score = Score(validation_split(args), accuracies, result.get('eval_size'), chosen_on=False)
    return read_weights(candidate.file), [score] if accuracies else []
