"""Put a run's weights and card into the source tree, from where they travel inside the package."""
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.models import get_pretrained_cfg

from timm_spinal.errors import UserError
from timm_spinal.files import write_atomically
from timm_spinal.models._packaged import packaged_cfg
from timm_spinal.models._variants import TAG_PREFIX
from timm_spinal.training.report import write_text
from timm_spinal.training.results import CONFIG, WEIGHTS

from .golden import GOLDEN, compare_golden
from .options import PublishOptions
from .package import CARD, build_package, check_same_weights
from .publication import Publication
from .recipe import shared_options

ROOT = Path(__file__).resolve().parents[2]
MOST_EACH, MOST_TOGETHER = 2_000_000, 8_000_000  # bytes


def install(publication: Publication, options: PublishOptions, tag: str, root: Path = ROOT) -> str:
    """Write ``timm_spinal/weights/ARCH.TAG.{safetensors,json}`` and ``hub_cards/ARCH.TAG.md``, or the card only.

    Args:
        publication: A run.
        options: Licence, the runs beside it, and whether only the card is wanted.
        tag: What was trained on, usually, such as 'fashion_mnist'.
        root: The source tree.

    Returns:
        The name, ``ARCH.TAG``.

    Raises:
        UserError: No source tree, files that are too large, weights that the name alone would not load.
    """
    if not (root / 'pyproject.toml').is_file():
        raise UserError(f'--local: {root} is not a clone of the repository; install one with pip install -e .')
    if not tag.isidentifier() or tag.startswith(TAG_PREFIX):
        raise UserError(f'--local {tag!r}: it is not a valid tag; use letters, digits and _, and not {TAG_PREFIX!r} in '
                        'front, which means weights of a backbone alone')
    if publication.args is None:
        raise UserError('--local: give a run folder of the trainer, because the card needs its recipe')
    name = f'{publication.architecture}.{tag}'
    folder = root / 'timm_spinal' / 'weights'
    if options.card_only and (folder / f'{name}.safetensors').exists():
        raise UserError(f'--card-only: the weights of {name} are in the package already; leave --card-only out, or '
                        'choose another tag')
    with tempfile.TemporaryDirectory(prefix='timm_spinal_hub_') as temp:
        package = Path(temp) / 'package'
        build_package(publication, options, package, name, 'local-dir:RUN' if options.card_only else name)
        if options.card_only:
            _write_card(package, root, name)
            return name
        _check_size(package / WEIGHTS, folder, name)
        config = json.loads((package / CONFIG).read_text(encoding='utf-8'))
        golden = load_file(package / GOLDEN)
        check_loads_by_name(package / WEIGHTS, config, golden, name)
        info = dict(config=config, recipe=shared_options(publication.args), logits=golden['logits'].tolist())
        folder.mkdir(exist_ok=True)
        _write_card(package, root, name)
        write_text(folder / f'{name}.json', json.dumps(info) + '\n')
        _copy(package / WEIGHTS, folder / f'{name}.safetensors')
    return name


def _write_card(package: Path, root: Path, name: str) -> None:
    (root / 'hub_cards').mkdir(exist_ok=True)
    write_text(root / 'hub_cards' / f'{name}.md', (package / CARD).read_text(encoding='utf-8'))


def _copy(source: Path, target: Path) -> None:
    def copy(temp: Path) -> None:
        shutil.copyfile(source, temp)

    write_atomically(target, copy)


def _check_size(weights: Path, folder: Path, name: str) -> None:
    size = weights.stat().st_size
    others = sum(p.stat().st_size for p in folder.glob('*.safetensors') if p.stem != name)
    if size > MOST_EACH or size + others > MOST_TOGETHER:
        raise UserError(f'{name}: {size / 1e6:.1f} MB beside {others / 1e6:.1f} MB of others; the package takes '
                        f'{MOST_EACH / 1e6:.0f} MB each and {MOST_TOGETHER / 1e6:.0f} MB together: try --dtype fp16, '
                        '--repo, or --card-only')


def check_loads_by_name(file: Path, config: dict[str, Any], golden: dict[str, torch.Tensor], name: str) -> None:
    """Packaged weights load by their name alone, so into the architecture as it is without options.

    Raises:
        UserError: They do not.
    """
    base = get_pretrained_cfg(config['architecture'])
    assert base is not None
    try:
        model: Any = timm.create_model(
            config['architecture'], pretrained=True, pretrained_cfg=packaged_cfg(base, config, file))
        if model.loaded_weights.new:  # of a head with other options
            raise RuntimeError(str(model.loaded_weights))
    except RuntimeError as e:
        raise UserError(f'{name}: was trained with options ({config.get("model_args")}) that its name does not say, so '
                        'the name alone would not load it; train it without them, or publish it with --repo') from e
    check_same_weights(model, load_file(file), name)
    compare_golden(model, golden, name)
