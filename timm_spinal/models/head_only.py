"""Weights of a head alone: the backbone that they belong to, which is fetched by name and checked by its hash.

Such a file is safetensors with the head's tensors. Its metadata have the name of the backbone's weights, as
``timm.create_model`` takes it, and a SHA-256 of these weights.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Dict, Mapping, NamedTuple, Optional, Union

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from timm.models import load_model_config_from_hf, parse_model_name

from .attach_head import HEAD_NAME
from .hub_checksums import weight_files
from .hub_errors import explain
from .weight_files import WeightsError

_NAME, _HASH = 'backbone', 'backbone_sha256'


class Backbone(NamedTuple):
    """The weights that a head was trained on.

    Attributes:
        name: What ``timm.create_model(..., pretrained=True)`` takes.
        sha256: `hash_tensors` of them.
    """

    name: str
    sha256: str


def is_in_head(name: str) -> bool:
    """Whether a tensor of a model with an attached head is the head's."""
    return name.startswith(f'{HEAD_NAME}.')


def hash_tensors(state_dict: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, types, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name, value in sorted(state_dict.items()):
        digest.update(f'{name} {value.dtype} {tuple(value.shape)} '.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_head(head: Dict[str, torch.Tensor], path: Union[str, Path], backbone: Backbone) -> None:
    """Write a file of a head alone; the same head gives the same bytes.

    Args:
        head: Tensors of the head under the names of the whole model.
        path: The file.
        backbone: What they belong to.
    """
    data = save(head, metadata={'format': 'pt', _NAME: backbone.name, _HASH: backbone.sha256})
    size = int.from_bytes(data[:8], 'little')
    header = json.dumps(json.loads(data[8:8 + size]), sort_keys=True).encode()  # safetensors writes any order
    header += b' ' * (-len(header) % 8)
    Path(path).write_bytes(len(header).to_bytes(8, 'little') + header + data[8 + size:])


def read_backbone(path: Union[str, Path]) -> Optional[Backbone]:
    """What a file of weights says of its backbone; None where it says nothing."""
    try:
        with safe_open(path, 'pt') as f:
            found = f.metadata() or {}
    except (SafetensorError, OSError):
        return None
    return Backbone(found[_NAME], found[_HASH]) if _NAME in found and _HASH in found else None


def backbone_weights(name: str, cache_dir: Any = None) -> Dict[str, torch.Tensor]:
    """The weights of a name without those of a head or classifier, under the names of timm's model.

    Args:
        name: What ``timm.create_model`` takes: a name of timm with its tag, or 'hf-hub:' with a repository.
        cache_dir: As in ``timm.create_model``.

    Raises:
        WeightsError: They cannot be had.
    """
    from . import ensure_registered  # the package, which imports this module
    try:
        source, where = parse_model_name(name)
        architecture = load_model_config_from_hf(where, cache_dir)[1] if source == 'hf-hub' else where
        ensure_registered(architecture)
        with torch.random.fork_rng(devices=[]):
            model = timm.create_model(name, pretrained=True, num_classes=0, cache_dir=cache_dir)
    except Exception as e:  # of the Hub, the network or timm
        if isinstance(e, WeightsError):
            raise
        reason = explain(e) or ' '.join(str(e).split())[:200] or type(e).__name__
        raise WeightsError(f'{name}: its weights cannot be had ({reason})') from e
    return {key: value for key, value in model.state_dict().items() if not is_in_head(key)}


def fetch_backbone(cfg: Dict[str, Any], cache_dir: Any = None) -> Dict[str, torch.Tensor]:
    """The weights of the backbone that a head alone belongs to.

    Args:
        cfg: A pretrained cfg whose weights are those of a head alone.
        cache_dir: As in ``timm.create_model``.

    Raises:
        WeightsError: The file names none, they cannot be had, or they are not those that the head was trained on.
    """
    files = weight_files(cfg, cache_dir)
    what = cfg.get('hf_hub_id') or (files[-1] if files else 'the weights')
    backbone = read_backbone(files[-1]) if files else None
    if backbone is None:
        raise WeightsError(f'{what}: holds a head only, nothing of the backbone')
    try:
        weights = backbone_weights(backbone.name, cache_dir)
    except WeightsError as e:
        raise WeightsError(f'{what}: holds a head alone, and its backbone is not there: {e}') from e
    sha256 = hash_tensors(weights)
    if sha256 != backbone.sha256:
        raise WeightsError(f'{what}: holds a head alone, which was trained on other weights than {backbone.name} has '
                           f'now (SHA-256 {backbone.sha256[:12]}, now {sha256[:12]}); use a publication of the whole '
                           'model, or one of the head on these weights')
    return weights
