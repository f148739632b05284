"""The folder of a publication: what is sent to the Hub, made from a source and checked before it goes."""
import json
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from timm_spinal.errors import UserError
from timm_spinal.training.config import ValidateConfig
from timm_spinal.training.export import CONFIG, WEIGHTS
from timm_spinal.training.files import write_error
from timm_spinal.training.model import create_model

from .card import make_card, resolve_licence
from .card_check import check_card
from .cost import cost_of
from .golden import GOLDEN, compare_golden, golden_tensors
from .options import PublishOptions
from .recipe import hparams_yaml
from .source import Source
from .weights import check_not_tied, published_weights

CARD, HPARAMS = 'README.md', 'train_hparams.yaml'
# what a publication may hold; of these, files that are on the Hub and not in a new publication are removed there
FILES = (WEIGHTS, CONFIG, CARD, HPARAMS, 'summary.csv', 'curves.png', GOLDEN)


@contextmanager
def built(source: Source, options: PublishOptions) -> Iterator[Path]:
    """A checked package in a temporary folder, which is gone afterwards.

    Raises:
        UserError: Weights that cannot be published, a card that the Hub would not take, a full disk.
    """
    with tempfile.TemporaryDirectory(prefix='timm_spinal_hub_') as temp:
        folder = Path(temp) / 'package'
        build_package(source, options, folder, options.repo, f'hf-hub:{options.repo}')
        yield folder


def build_package(
        source: Source,
        options: PublishOptions,
        folder: Path,
        name: str,
        load_name: str,
) -> None:
    """Write a package into a new folder and check that it loads with the weights and answers that it should have.

    Args:
        source: What is published.
        options: In which form.
        folder: Created; must not exist.
        name: Title of the card.
        load_name: What ``timm.create_model`` will take.

    Raises:
        UserError: As in `built`.
    """
    weights = published_weights(source.state_dict, options.dtype, source.architecture)
    config = _with_licence(source.config, resolve_licence(source, options.licence))
    if source.model is not None:
        check_not_tied(source.model, source.architecture)
    try:
        (folder / GOLDEN).parent.mkdir(parents=True)
        save_file(weights, folder / WEIGHTS, metadata={'format': 'pt'})
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
        model = load_package(folder, source.architecture)
        check_same_weights(model, weights, source.architecture)
        golden = golden_tensors(model, source.input_size)
        save_file(golden, folder / GOLDEN, metadata={'format': 'pt'})
        card = make_card(source, options, cost_of(model, source.input_size), name, load_name)
        (folder / CARD).write_text(card, encoding='utf-8')
        if source.args is not None:
            (folder / HPARAMS).write_text(hparams_yaml(source.args), encoding='utf-8')
        for file, path in source.files.items():
            shutil.copyfile(path, folder / file)
    except Exception as e:
        if isinstance(e, UserError) or (reason := write_error(e)) is None:
            raise
        raise UserError(f'cannot write {folder}: {reason}; make room, or set TMPDIR to another disk') from e
    check_package(folder, name)


def check_package(folder: Path, name: str) -> float:
    """Check a package on the disk: its card, and that its weights load and answer as its golden tensors say.

    Returns:
        The greatest difference from the golden tensors, as `compare_golden` gives it.

    Raises:
        UserError: Something is missing or does not fit.
    """
    missing = [file for file in (WEIGHTS, CONFIG, CARD, GOLDEN) if not (folder / file).is_file()]
    if missing:
        raise UserError(f'{name}: has no {missing[0]}; publish it with timm-spinal publish')
    check_card((folder / CARD).read_text(encoding='utf-8'))
    return compare_golden(load_package(folder, name), load_file(folder / GOLDEN), name)


def load_package(folder: Path, name: str) -> nn.Module:
    """The model of a package, in eval mode.

    Raises:
        UserError: It does not load.
    """
    try:
        model = create_model(ValidateConfig(model=f'local-dir:{folder}', pretrained=True), None).eval()
    except UserError as e:
        reason = str(e).partition(f'{folder}: ')[2] or str(e)
        raise UserError(f'{name}: its weights do not load into what {CONFIG} names ({reason}); a model must come from '
                        'timm.create_model, which records its options') from e
    check_not_tied(model, name)
    return model


def check_same_weights(model: nn.Module, weights: dict[str, torch.Tensor], name: str) -> None:
    """A loaded model must hold the weights of the file, to the bit.

    Raises:
        UserError: It does not; its options were not all recorded.
    """
    loaded = model.state_dict()
    other = sorted(loaded.keys() ^ weights.keys())
    other = other or [k for k in weights if not torch.equal(loaded[k], weights[k].to(loaded[k].dtype))]
    if other:
        raise UserError(f'{name}: does not load back as it was ({other[0]} differs); a model must come from '
                        'timm.create_model, which records its options')


def _with_licence(config: dict[str, Any], licence: str) -> dict[str, Any]:
    """The config with the licence where timm looks for it; a model that starts from these weights inherits it."""
    return dict(config, pretrained_cfg=dict(config['pretrained_cfg'], license=licence))


def keep(folder: Path, output: Path) -> None:
    """Move a package to where the user wants it, in the place of an older one.

    Raises:
        UserError: There is something else, or the disk refuses.
    """
    if output.exists() and not (output.is_dir() and (not any(output.iterdir()) or (output / CARD).is_file())):
        raise UserError(f'--output {output}: exists and is no publication; choose another folder')
    temp = output.with_name(f'.{output.name}.tmp')
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temp, ignore_errors=True)
        shutil.copytree(folder, temp)
        if output.exists():
            shutil.rmtree(output)
        temp.rename(output)
    except OSError as e:
        shutil.rmtree(temp, ignore_errors=True)
        raise UserError(f'--output {output}: cannot be written ({e.strerror or e})') from e
