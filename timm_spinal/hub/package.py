"""The folder of a publication: what is sent to the Hub, made from a source and checked before it goes."""
import json
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from timm_spinal.cost import cost_of
from timm_spinal.errors import UserError
from timm_spinal.evaluation.judgement import CONFUSION, WORST
from timm_spinal.files import write_error
from timm_spinal.models.head_only import is_in_head, save_head
from timm_spinal.training.config import ValidateConfig
from timm_spinal.training.model import create_model
from timm_spinal.training.results import CONFIG, WEIGHTS, own_config

from .card import make_card, resolve_licence
from .card_check import check_card
from .frozen_backbone import frozen_backbone
from .golden import GOLDEN, compare_golden, golden_tensors
from .licences import Licence
from .measure import measure
from .options import PublishOptions
from .publication import Publication
from .recipe import hparams_yaml
from .retry import Say
from .weights import check_not_tied, published_weights

CARD, HPARAMS = 'README.md', 'train_hparams.yaml'
# what a publication may hold; of these, files that are on the Hub and not in a new publication are removed there
FILES = (WEIGHTS, CONFIG, CARD, HPARAMS, 'summary.csv', 'curves.png', CONFUSION, WORST, GOLDEN)


class Package(NamedTuple):
    """What is published.

    Attributes:
        folder: Holds it.
        card: README.md, by the name that ``timm.create_model`` takes.
    """
    folder: Path
    card: Callable[[str], str]

    def address(self, load_name: str) -> None:
        """Let the card load the model by this name."""
        (self.folder / CARD).write_text(self.card(load_name), encoding='utf-8')


@contextmanager
def built(publication: Publication, options: PublishOptions, say: Say = print) -> Iterator[Package]:
    """A checked package in a temporary folder, which is gone afterwards.

    Raises:
        UserError: Weights that cannot be published, a card that the Hub would not take, a full disk.
    """
    with tempfile.TemporaryDirectory(prefix='timm_spinal_hub_') as temp:
        folder = Path(temp) / 'package'
        yield build_package(publication, options, folder, options.repo, hub_name(options.repo, options.branch), say)


def hub_name(repo: str, revision: str = '') -> str:
    """What ``timm.create_model`` takes for a revision of a repository, '' for its main branch."""
    return f'hf-hub:{repo}' if revision in ('', 'main') else f'hf-hub:{repo}@{revision}'


def build_package(
        publication: Publication,
        options: PublishOptions,
        folder: Path,
        name: str,
        load_name: str,
        say: Say = print,
) -> Package:
    """Write a package into a new folder and check that it loads with the weights and answers that it should have.

    Args:
        publication: What is published.
        options: In which form.
        folder: Created; must not exist.
        name: Title of the card.
        load_name: What ``timm.create_model`` will take.
        say: Gets a line on what takes long.

    Raises:
        UserError: As in `built`.
    """
    if not options.pictures:
        publication = replace(publication, files={
            file: path for file, path in publication.files.items() if file not in (CONFUSION, WORST)})
    weights = published_weights(publication.state_dict, options.dtype, publication.architecture)
    backbone = frozen_backbone(publication) if options.head_only else None
    if backbone is not None:
        weights = {name: value for name, value in weights.items() if is_in_head(name)}
    licence = resolve_licence(publication, options)
    config = _config(publication.config, licence, options)
    if publication.model is not None:
        check_not_tied(publication.model, publication.architecture)
    try:
        (folder / GOLDEN).parent.mkdir(parents=True)
        if backbone is None:
            save_file(weights, folder / WEIGHTS, metadata={'format': 'pt'})
        else:
            save_head(weights, folder / WEIGHTS, backbone)
        _write_config(folder, config)
        model = load_package(folder, publication.architecture)
        _write_config(folder, own_config(config, model))
        check_same_weights(model, weights, publication.architecture)
        golden = golden_tensors(model, publication.input_size)
        save_file(golden, folder / GOLDEN, metadata={'format': 'pt'})
        publication = _with_true_scores(publication, options, folder, say)
        cost = cost_of(model, publication.input_size)
        package = Package(folder, partial(make_card, publication, options, cost, name))
        package.address(load_name)
        _copy_licence(publication, licence, folder)
        if publication.args is not None:
            (folder / HPARAMS).write_text(hparams_yaml(publication.args), encoding='utf-8')
        for file, path in publication.files.items():
            shutil.copyfile(path, folder / file)
    except Exception as e:
        if isinstance(e, UserError) or (reason := write_error(e)) is None:
            raise
        raise UserError(f'cannot write {folder}: {reason}; make room, or set TMPDIR to another disk') from e
    check_package(folder, name)
    return package


def _with_true_scores(publication: Publication, options: PublishOptions, folder: Path, say: Say) -> Publication:
    """The source with accuracies of the weights as they are published, or with none."""
    if options.dtype == 'fp32' or not publication.scores:
        return publication
    say(f'{publication.architecture}: measuring the float16 weights')
    try:
        return replace(publication, scores=measure(publication, folder, options.data_dir))
    except UserError as e:
        say(f'{publication.architecture}: the card has no accuracy of the float16 weights, because they could not be '
            f'measured ({e}); give the data with --data-dir')
        return replace(publication, scores=[], before=publication.scores)


def _copy_licence(publication: Publication, licence: Licence, folder: Path) -> None:
    """Take along the file with the licence's text, where the link names one."""
    if not licence.file:
        return
    text = (publication.folder or Path()) / licence.file
    if not text.is_file():
        raise UserError(f'--license-link {licence.file}: {text} is not a file; put the text of the licence there, or '
                        'give its address')
    shutil.copyfile(text, folder / licence.file)


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
    """A loaded model must hold the weights of the file, to the bit; of a head alone, its head must.

    Raises:
        UserError: It does not; its options were not all recorded.
    """
    loaded = model.state_dict()
    if all(map(is_in_head, weights)):
        loaded = {key: value for key, value in loaded.items() if is_in_head(key)}
    other = sorted(loaded.keys() ^ weights.keys())
    other = other or [k for k in weights if not torch.equal(loaded[k], weights[k].to(loaded[k].dtype))]
    if other:
        raise UserError(f'{name}: does not load back as it was ({other[0]} differs); a model must come from '
                        'timm.create_model, which records its options')


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')


def _config(config: dict[str, Any], licence: Licence, options: PublishOptions) -> dict[str, Any]:
    """The config with the licence where timm looks for it; a model that starts from these weights inherits it."""
    # float16 is the format of the file; timm computes in float32, and transformers does so where it is told
    dtype = dict(torch_dtype='float32') if options.dtype == 'fp16' else {}
    return {**config, 'pretrained_cfg': dict(config['pretrained_cfg'], license=licence.spoken), **dtype}


def keep(folder: Path, output: Path) -> None:
    """Move a package to where the user wants it, in the place of an older one.

    Raises:
        UserError: There is something else, or the disk refuses.
    """
    if output.exists() and not (output.is_dir() and (not any(output.iterdir()) or (output / CARD).is_file())):
        raise UserError(f'--output {output}: it exists, and timm-spinal publish did not write it; choose another '
                        'folder')
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
