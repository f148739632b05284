"""One way to read a file of weights, whatever it was saved as.

A file is opened by its content, not by its suffix: safetensors, and what ``torch.save`` writes, with
``weights_only=True``. Containers (``state_dict``, ``model``, ...) are opened and the prefixes of wrappers removed.
"""

import argparse
import contextlib
import os
import pathlib
import pickle
import warnings
from typing import Any, Dict, List, Mapping, Optional, Union

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from timm_spinal.errors import UserError

EMA_KEYS = ('state_dict_ema', 'model_ema', 'ema_state_dict', 'params_ema')
PLAIN_KEYS = (
    'state_dict', 'model', 'net_state_dict', 'model_state_dict', 'model_state', 'net', 'network', 'weights', 'params',
    'module',
)
WRAPPERS = ('_orig_mod.', '_fsdp_wrapped_module.', '_checkpoint_wrapped_module.')  # anywhere in a name
PREFIXES = ('module.', 'model.', 'student.')  # in front of every name
STUDENT = 'student.'  # checkpoints of distillation also hold other weights

_FIRST = 3  # names that a message shows
_FOREIGN = (  # first bytes of files that are often mistaken for weights
    (b'version https://git-lfs', 'is a pointer of Git LFS, not the weights; fetch them with git lfs pull'),
    (b'<', 'is a web page, not weights; download the file itself'),
    (b'\x89HDF', 'is an HDF5 file, which torch does not read'),
    (b'\x93NUMPY', 'is a NumPy array, not weights'),
)


class WeightsError(UserError, RuntimeError):
    """A file that is no weights, or not those of the model: one line with the reason.

    It is a RuntimeError as well, which torch and timm raise for weights that do not fit.
    """


class MisfitError(WeightsError):
    """Weights of another model."""


def read_weights(path: Union[str, os.PathLike], use_ema: Optional[bool] = None) -> Dict[str, torch.Tensor]:
    """The state dict in a file, on the CPU.

    Args:
        path: safetensors, or a file of ``torch.save`` with a state dict or a container of one.
        use_ema: True for the moving average, False for the other weights where there are any, None for the average
            where there is one.

    Raises:
        WeightsError: No such file, damaged, no weights in it, no moving average, or a pickle that would run code.
    """
    checkpoint = _open(str(path))
    state_dict = unwrap(checkpoint, use_ema)
    if state_dict is None:
        keys = first_names([str(key) for key in checkpoint]) if isinstance(checkpoint, Mapping) and checkpoint else ''
        found = f'its keys are {keys}' if keys else f'it is a {type(checkpoint).__name__}'
        what = 'no moving average' if use_ema else 'no weights'
        raise WeightsError(f'{path}: it has {what} ({found}); save model.state_dict()')
    return state_dict


def first_names(names: List[str]) -> str:
    """The first of some names, and how many more there are."""
    more = f' and {len(names) - _FIRST} more' if len(names) > _FIRST else ''
    return ', '.join(names[:_FIRST]) + more


def unwrap(checkpoint: Any, use_ema: Optional[bool] = None) -> Optional[Dict[str, torch.Tensor]]:
    """The state dict in a container, without prefixes of wrappers; None where there is none.

    Args:
        checkpoint: What was loaded from a file.
        use_ema: As in :func:`read_weights`.
    """
    keys = PLAIN_KEYS + EMA_KEYS if use_ema is False else EMA_KEYS + PLAIN_KEYS
    averaged = False
    while isinstance(checkpoint, Mapping):
        inside = next((key for key in keys if isinstance(checkpoint.get(key), Mapping)), None)
        if inside is None:
            break
        averaged |= inside in EMA_KEYS
        checkpoint = checkpoint[inside]
    if not isinstance(checkpoint, Mapping) or (use_ema and not averaged):
        return None
    state_dict = {name: _as_tensor(value) for name, value in checkpoint.items() if isinstance(name, str)}
    return _without_prefixes({name: value for name, value in state_dict.items() if value is not None}) or None


def _as_tensor(value: Any) -> Optional[torch.Tensor]:
    if isinstance(value, np.ndarray) and value.dtype.kind in 'fiub':
        return torch.from_numpy(value.copy())
    return value.detach() if isinstance(value, torch.Tensor) else None


def _without_prefixes(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    for wrapper in WRAPPERS:
        state_dict = {name.replace(wrapper, ''): value for name, value in state_dict.items()}
    while True:
        # a checkpoint of averaged weights also has a counter, without the prefix
        names = [name for name, value in state_dict.items() if value.numel() > 1]
        prefix = next((p for p in PREFIXES if names and all(name.startswith(p) for name in names)), None)
        if prefix is None and any(name.startswith(STUDENT) for name in names):
            state_dict = {name: value for name, value in state_dict.items() if name.startswith(STUDENT)}
        elif prefix is None:
            return state_dict
        else:
            state_dict = {name.removeprefix(prefix): value for name, value in state_dict.items()}


def _open(path: str) -> Any:
    """What is in a file, as it was saved."""
    if os.path.isdir(path):
        raise WeightsError(f'{path}: is a folder; give the file of weights in it')
    try:
        size = os.path.getsize(path)
        with open(path, 'rb') as f:
            head = f.read(64)
    except OSError as e:
        reason = 'no such file' if isinstance(e, FileNotFoundError) else e.strerror
        raise WeightsError(f'{path}: {reason}') from e
    if not size:
        raise WeightsError(f'{path}: is empty; copy or download it again')
    if head[8:9] == b'{' and int.from_bytes(head[:8], 'little') < 1 << 32:
        try:
            return load_file(path)
        except (SafetensorError, OSError) as e:
            raise WeightsError(f'{path}: is damaged or incomplete ({_line(e)}); copy or download it again') from e
    for start, reason in _FOREIGN:
        if head.lstrip().startswith(start):
            raise WeightsError(f'{path}: {reason}')
    if head.startswith(b'PK') and b'.npy' in head:
        raise WeightsError(f'{path}: is a NumPy archive (.npz), not weights of torch')
    return _torch_load(path)


def _torch_load(path: str) -> Any:
    try:
        # torch takes any path that ends with .safetensors for that format
        with open(path, 'rb') as f, _plain_data(), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return torch.load(f, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as e:
        if needed := _needed_globals(path, str(e)):
            raise WeightsError(
                f'{path}: its pickle needs {needed}, which may run code, so it is not opened; where you trust it, load '
                'it with torch.load(..., weights_only=False) and save model.state_dict()') from e
        raise WeightsError(f'{path}: is not a file of weights that torch or safetensors can read; give a '
                           'checkpoint') from e
    except Exception as e:  # damaged bytes make torch's readers raise any error
        if 'TorchScript' in str(e):
            raise WeightsError(f'{path}: is a TorchScript program; save the state_dict() of the model in it') from e
        reason = f' ({_line(e)})' if isinstance(e, (RuntimeError, OSError)) else ''
        raise WeightsError(f'{path}: is damaged, incomplete or not a file of weights{reason}; copy or download it '
                           'again') from e


def _needed_globals(path: str, message: str) -> str:
    try:
        return first_names(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)))
    except Exception:  # torch 2.4 does not tell, and of its old format no version does
        _, found, rest = message.partition('GLOBAL ')
        return rest.split()[0] if found else ''


def _plain_data() -> Any:
    """Allows classes of plain data that are often saved with weights: options, paths, NumPy's numbers."""
    if not hasattr(torch.serialization, 'safe_globals'):
        return contextlib.nullcontext()
    numpy: List[Any] = [np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in '?bBhHiIlLqQefd')]
    functions: List[Any] = [np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]]
    named = functions
    if tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 6):
        # NumPy 1 and 2 call their module differently
        named = [(function, f'numpy.{where}.multiarray.{function.__name__}')
                 for function in functions for where in ('core', '_core')]
    paths: List[Any] = [pathlib.PosixPath, pathlib.PurePosixPath]
    return torch.serialization.safe_globals([argparse.Namespace, *paths, *numpy, *named])


def _line(error: object) -> str:
    """The first sentence of an error."""
    return ' '.join(str(error).split()).split('. ')[0][:150]
