"""Turn a trained XnODR or XnIDR model into its form for inference, with bits in place of floats.

    timm-spinal pack output/train/RUN --output packed
    timm-spinal pack hf-hub:org/name --output packed

The output folder has ``model.safetensors`` and ``config.json``; timm loads it as ``local-dir:packed``, and
``timm-spinal validate --checkpoint packed`` measures it. Both forms are run on the same noise images, and the
largest difference of scores and the predictions that are the same are printed.
"""
import copy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from timm.data import resolve_data_config
from timm.models import parse_model_name

from timm_spinal.arguments import Parser
from timm_spinal.cli import guard
from timm_spinal.errors import UserError

IMAGES = 16


def run(argv: list[str]) -> int:
    """``timm-spinal pack``: returns 1 where a prediction changed."""
    parser = Parser('timm-spinal pack', __doc__)
    parser.add_argument('model', help='run folder, hf-hub:org/name, local-dir:FOLDER, or a model name (untrained)')
    parser.add_argument('-o', '--output', required=True, help='new folder')
    args = parser.parse_args(argv)
    output = Path(args.output)
    if output.exists():
        raise UserError(f'--output {output} exists already; name a new folder')
    model = _load(args.model)
    packed = _pack(model, args.model)
    same, difference, constant = compare(model, packed)
    _write(output, packed)
    for name, part in (('model', lambda m: m), ('capsule layer', lambda m: m.get_classifier())):
        before, after = tensor_bytes(part(model)), tensor_bytes(part(packed))
        print(f'{name}: {before:,} bytes float, {after:,} packed: {before / after:.2f} times smaller')
    print(f'{same} of {IMAGES} predictions on noise are the same, scores differ by {difference:.1e} at most')
    if constant:
        print(f'warning: {args.model} gives the same answer for all {IMAGES} noise images, so equal predictions say '
              f'little; timm-spinal validate --checkpoint {output} says whether it does so for real images too')
    print(f'written to {output}; load it with timm.create_model("local-dir:{output}", pretrained=True)')
    return int(same != IMAGES)


def tensor_bytes(module: nn.Module) -> int:
    """Size of all parameters and buffers, in memory as in a safetensors file."""
    return sum(t.nbytes for t in module.state_dict().values())


@torch.inference_mode()
def compare(model: nn.Module, packed: nn.Module) -> tuple[int, float, bool]:
    """Equal predictions of ``IMAGES`` noise images, the largest difference of a score, and whether all are the same."""
    from timm_spinal.evaluation.metrics import SameAnswer
    size = resolve_data_config({}, model=model)['input_size']
    images = torch.randn(IMAGES, *size, generator=torch.Generator().manual_seed(0))
    a, b = model.eval()(images), packed.eval()(images)
    answers = SameAnswer()
    answers.update(a, torch.arange(IMAGES))
    return int((a.argmax(1) == b.argmax(1)).sum()), float((a - b).abs().max()), answers.compute() is not None


def _load(name: str) -> Any:
    from timm_spinal.training.config import ValidateConfig
    from timm_spinal.training.model import create_model
    from timm_spinal.training.results import CONFIG, WEIGHTS
    folder = Path(name)
    if folder.is_dir():
        missing = [file for file in (CONFIG, WEIGHTS) if not (folder / file).is_file()]
        if missing:
            raise UserError(f'{folder} has no {missing[0]}; give the folder of a finished run, or one that pack or '
                            'timm wrote')
        name = f'local-dir:{folder}'
    trained = bool(parse_model_name(name)[0])
    if not trained:
        print(f'{name}: a model name without weights; its head is untrained', file=sys.stderr)
    return create_model(ValidateConfig(model=name, pretrained=trained), None)


def _pack(model: nn.Module, name: str) -> Any:
    import timm_spinal
    try:
        return timm_spinal.pack_xnodr(copy.deepcopy(model))
    except ValueError as e:
        raise UserError(f'{name}: {e}') from e


def _write(folder: Path, model: Any) -> None:
    from timm_spinal.training.results import export_model
    try:
        folder.mkdir(parents=True)
    except OSError as e:
        raise UserError(f'--output {folder}: {e.strerror}') from e
    export_model(folder, model, model.state_dict(), model.pretrained_cfg.get('label_names'), {})


if __name__ == '__main__':
    sys.exit(guard(run, sys.argv[1:]))
