"""Answers of a frozen model on the disk: shards and a manifest of what they were made from.

    FOLDER/manifest.json                   `identity` of data, weights, transforms, versions
    FOLDER/SPLIT-PASS-NUMBER.safetensors   one row per image; of `compare` pooled (n, F) float32, labels (n,), map
                                           (n, C, H, W) where asked for; of --kd-cache logits (n, K) float32

A shard is written in one step and carries a hash of the manifest, so that what an interrupted run leaves is either
whole and of this manifest or not taken.
"""
import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from timm_spinal.errors import UserError
from timm_spinal.files import read_json, write_atomically, write_json

SHARD_SIZE = 2048  # images; what an interruption can lose of each process
_SHARD = re.compile(r'[a-z]+-\d+-\d{5}\.safetensors')
_WORDS = {
    'weights': 'other weights', 'data': 'other data', 'transform': 'another transform', 'model': 'another model',
    'timm': 'another timm version', 'maps': 'other kinds of features',
}


@dataclass(frozen=True)
class Wording:
    """What messages call a cache, and what they advise about another identity, a damaged shard and a full disk."""
    name: str
    other: str
    damaged: str
    space: str


def shard_path(folder: Path, split: str, number: int, index: int) -> Path:
    """Path of shard `index` of pass `number` over a split."""
    return folder / f'{split}-{number}-{index:05d}.safetensors'


def shard_count(images: int) -> int:
    """Shards of one pass over so many images."""
    return -(-images // SHARD_SIZE)


def hash_weights(model: nn.Module) -> str:
    """Hash of names and values of a model's state dict."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def open_cache(folder: Path, identity: dict[str, Any], words: Wording, rebuild: bool = False) -> str:
    """Make a folder ready for answers of an identity; shards of the same identity stay.

    Args:
        folder: The folder, made where it is not there.
        identity: What the answers depend on: keys to plain values.
        words: For messages.
        rebuild: Remove the answers of another identity.

    Returns:
        The hash that every shard carries.

    Raises:
        UserError: The folder holds answers of another identity, or shards without manifest, and `rebuild` is not set.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f'{words.name} {folder}: {e.strerror}; choose another folder') from e
    found = read_json(folder / 'manifest.json')
    shards = [p for p in folder.iterdir() if _SHARD.fullmatch(p.name)]
    if (found is None and shards) or (found is not None and found != identity) or rebuild:
        if not rebuild:
            raise UserError(f'{words.name} {folder}: were made from {_changes(found, identity)}; {words.other}')
        (folder / 'manifest.json').unlink(missing_ok=True)
        for path in shards:
            path.unlink()
        found = None
    if found is None:
        write_json(folder / 'manifest.json', identity)
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _changes(found: dict[str, Any] | None, identity: dict[str, Any]) -> str:
    if found is None:
        return 'something unknown (no manifest.json)'
    keys = [k for k in {**identity, **found} if found.get(k) != identity.get(k)]
    parts = []
    for key in keys:
        old, new = found.get(key), identity.get(key)
        plain = isinstance(old, (str, int)) and isinstance(new, (str, int)) and len(f'{old}{new}') < 60
        if isinstance(old, dict) and isinstance(new, dict):
            inner = [k for k in {**old, **new} if old.get(k) != new.get(k)]
            parts.append(f'{_WORDS.get(key, f"another {key}")} ({", ".join(inner)})')
        else:
            parts.append(_WORDS.get(key, f'another {key}') + (f' ({old}, now {new})' if plain else ''))
    return ', '.join(parts)


def check_space(folder: Path, needed: int, words: Wording) -> None:
    """Refuse when the disk has not so many bytes free.

    Raises:
        UserError: Says what is needed and what is there.
    """
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(f'{words.name} {folder}: need {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; '
                        f'{words.space}')


def write_shard(path: Path, tensors: dict[str, torch.Tensor], mark: str) -> None:
    """Write one shard in one step."""
    write_atomically(path, lambda p: save_file(tensors, p, metadata={'identity': mark}))


def has_shard(path: Path, mark: str) -> bool:
    """Whether a whole shard of this identity is there."""
    try:
        with safe_open(path, framework='pt') as f:
            return (f.metadata() or {}).get('identity') == mark
    except (OSError, RuntimeError, ValueError):  # absent or damaged
        return False
    except Exception as e:
        if type(e).__name__ == 'SafetensorError':
            return False
        raise


def read_shards(
        folder: Path,
        split: str,
        number: int,
        images: int,
        mark: str,
        words: Wording,
) -> dict[str, torch.Tensor]:
    """All shards of a pass over a split, joined.

    Raises:
        UserError: A shard is missing, damaged or of another identity.
    """
    parts: dict[str, list[torch.Tensor]] = {}
    for index in range(shard_count(images)):
        path = shard_path(folder, split, number, index)
        if not has_shard(path, mark):
            raise UserError(f'{words.name} {path}: it is missing, damaged or from another run; {words.damaged}')
        with safe_open(path, framework='pt') as f:
            for name in f.keys():  # noqa: SIM118 (not a dict)
                parts.setdefault(name, []).append(f.get_tensor(name))
    return {name: torch.cat(tensors) for name, tensors in parts.items()}
