"""Weights that travel inside the package: a tag for every file in ``timm_spinal/weights``.

``timm.create_model('spinalcnn_a1.fashion_mnist', pretrained=True)`` loads
``weights/spinalcnn_a1.fashion_mnist.safetensors`` with the preprocessing in the ``.json`` beside it.
``timm-spinal publish RUN --local TAG`` puts both there.
"""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Dict, List, Union

import timm.models
from timm.models import DefaultCfg, PretrainedCfg, split_model_name_tag

FOLDER = Path(__file__).resolve().parents[1] / 'weights'
_SOURCE_KEYS = ('url', 'hf_hub_id', 'hf_hub_filename', 'source')
# keys of a saved config that belong to the weights; all others belong to the architecture
_OF_THE_WEIGHTS = (
    'input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode', 'num_classes', 'license',
)


@cache
def packaged_names() -> List[str]:
    """``arch.tag`` of all packaged weights, sorted."""
    return sorted(path.stem for path in FOLDER.glob('*.safetensors') if path.with_suffix('.json').is_file())


def read_info(name: str) -> Dict[str, Any]:
    """The JSON file of packaged weights: ``config`` as timm saves it, ``recipe`` and ``logits``."""
    return json.loads((FOLDER / f'{name}.json').read_text(encoding='utf-8'))


def packaged_cfg(base: PretrainedCfg, config: Dict[str, Any], file: Path) -> PretrainedCfg:
    """The pretrained cfg of weights in a file.

    Args:
        base: Cfg of the architecture.
        config: Content of the config.json that timm saved with the weights.
        file: The weights.
    """
    saved = dict(config['pretrained_cfg'], num_classes=config['num_classes'])
    changes: Dict[str, Any] = dict.fromkeys(_SOURCE_KEYS)
    changes.update({k: tuple(v) if isinstance(v, list) else v for k, v in saved.items() if k in _OF_THE_WEIGHTS})
    changes['file'] = str(file)
    return replace(base, **changes)


def packaged_cfgs(arch: str, base: PretrainedCfg) -> Dict[str, PretrainedCfg]:
    """Cfgs of an architecture's packaged weights by tag; those with the preprocessing of ``base`` come first."""
    cfgs = {}
    for name in packaged_names():
        if split_model_name_tag(name)[0] == arch:
            cfg = packaged_cfg(base, read_info(name)['config'], FOLDER / f'{name}.safetensors')
            cfgs[split_model_name_tag(name)[1]] = cfg
    return dict(sorted(cfgs.items(), key=lambda item: (not same_preprocessing(item[1], base), item[0])))


def same_preprocessing(cfg: PretrainedCfg, other: PretrainedCfg) -> bool:
    """Whether two cfgs have the same mean, standard deviation and input size."""
    return (cfg.mean, cfg.std, cfg.input_size) == (other.mean, other.std, other.input_size)


def generate_default_cfgs(cfgs: Dict[str, Union[Dict[str, Any], PretrainedCfg]]) -> Dict[str, DefaultCfg]:
    """timm's function of this name, with a tag for each of the architectures' packaged weights.

    Packaged weights are the default of a name only where their preprocessing is the architecture's own, so that they do
    not change how a new model of that name is trained.
    """
    out: Dict[str, Any] = {}
    for key, cfg in cfgs.items():
        arch, tag = split_model_name_tag(key)
        base = cfg if isinstance(cfg, PretrainedCfg) else PretrainedCfg(**cfg)
        packaged = {} if tag else packaged_cfgs(arch, base)
        out.update({f'{arch}.{name}': value for name, value in packaged.items()})
        if not any(same_preprocessing(value, base) for value in packaged.values()):
            out[f'{arch}.*' if packaged else key] = base  # timm takes the star for the default
    return timm.models.generate_default_cfgs(out)
