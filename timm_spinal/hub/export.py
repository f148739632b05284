"""Models as files for other runtimes: ONNX and torch.export, with a free batch, checked against eager mode."""
import importlib.util
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import torch
from timm.data import resolve_model_data_config
from torch import nn

from timm_spinal.errors import UserError, quiet
from timm_spinal.files import write_error
from timm_spinal.models.hub_errors import one_line

TOLERANCE = 1e-4  # of the greatest logit, which for capsules at random weights is far below 1
BATCHES = (1, 3)  # the example that is traced has two images
PREPROCESSING = 'preprocessing.json'  # in a torch.export file; ONNX has the same as metadata


class ExportFailed(UserError):
    """A model that cannot be exported, or whose export answers otherwise."""


@dataclass(frozen=True)
class Exported:
    """An export that was checked.

    Attributes:
        file: Where it is.
        difference: Greatest difference from eager mode, as a part of the greatest logit.
        megabytes: Size with all parts, in 10^6 bytes.
    """
    file: Path
    difference: float
    megabytes: float


def preprocessing(model: nn.Module) -> dict[str, Any]:
    """What an image needs before the model: sizes, mean and std per channel, crop, and the names of the classes."""
    cfg: Any = model.pretrained_cfg
    config = {k: list(v) if isinstance(v, tuple) else v for k, v in resolve_model_data_config(model).items()}
    names = cfg.get('label_names')
    return dict(architecture=cfg['architecture'], **config, **(dict(label_names=list(names)) if names else {}))


def export_model(model: nn.Module, kind: str, file: Path, name: str) -> Exported:
    """Export a model and compare the file that was written with eager mode, for several batch sizes.

    Args:
        model: On the CPU; left in eval mode.
        kind: A key of ``FORMATS``.
        file: Written in one step, when the check has passed. Weights of large ONNX models lie beside it.
        name: Of the model, for messages.

    Raises:
        ExportFailed: It does not export, or differs.
        UserError: A package is missing, or the disk refuses.
    """
    exporter = FORMATS[kind]
    missing = [p for p in exporter.packages if importlib.util.find_spec(p) is None]
    if missing:
        raise UserError(f"--format {kind}: {missing[0]} is not installed; pip install 'timm-spinal[onnx]'")
    model.eval()
    facts = preprocessing(model)
    size = facts['input_size']
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix='.export_') as temp, quiet(), torch.no_grad():
            draft = Path(temp) / file.name
            try:
                exporter.write(model, _images(2, size), draft, facts)
                run = exporter.open(draft)
                difference = max(_difference(model, run, _images(b, size), name) for b in BATCHES)
            except (UserError, OSError):
                raise
            except Exception as e:  # the exporters' own types, of which there are many
                raise ExportFailed(f'{name}: does not export to {kind} ({type(e).__name__}: {one_line(e)})') from e
            megabytes = sum(p.stat().st_size for p in Path(temp).iterdir()) / 1e6
            for part in sorted(Path(temp).iterdir(), reverse=True):
                part.replace(file.parent / part.name)
    except OSError as e:
        raise UserError(f'{file}: cannot be written ({write_error(e)}); choose another --output') from e
    return Exported(file, difference, megabytes)


def _images(batch: int, size: list[int]) -> torch.Tensor:
    return torch.randn(batch, *size, generator=torch.Generator().manual_seed(batch))


def _difference(model: nn.Module, run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, name: str) -> float:
    """Greatest difference as a part of the greatest logit; ``ExportFailed`` beyond the tolerance."""
    expected, found = model(x), run(x)
    if found.shape != expected.shape:
        raise ExportFailed(f'{name}: gives {tuple(found.shape)} for {len(x)} images, not {tuple(expected.shape)}')
    scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    difference = ((found - expected).abs().max() / scale).item()
    if not difference <= TOLERANCE:  # nor when it is not a number
        raise ExportFailed(f'{name}: differs from eager mode by {difference:.1e} of the greatest logit for {len(x)} '
                           'images')
    return difference


# ---- formats ----------------------------------------------------------------------------------------------------


def _dynamic(batch: Any) -> tuple[dict[int, Any], ...]:
    return ({0: batch},)


def _write_onnx(model: nn.Module, x: torch.Tensor, file: Path, facts: dict[str, Any]) -> None:
    program = torch.onnx.export(
        model, (x,), dynamo=True, dynamic_shapes=_dynamic(torch.export.Dim.DYNAMIC), input_names=['image'],
        output_names=['logits'], verbose=False)
    assert program is not None
    program.model.metadata_props.update({k: json.dumps(v) for k, v in facts.items()})
    program.save(str(file))


def _open_onnx(file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    import onnxruntime
    session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def _write_torch_export(model: nn.Module, x: torch.Tensor, file: Path, facts: dict[str, Any]) -> None:
    program = torch.export.export(model, (x,), dynamic_shapes=_dynamic(torch.export.Dim.DYNAMIC))
    torch.export.save(program, file, extra_files={PREPROCESSING: json.dumps(facts)})


def _open_torch_export(file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    return torch.export.load(file).module()


@dataclass(frozen=True)
class Format:
    """How a format is written and run."""
    suffix: str
    packages: tuple[str, ...]
    write: Callable[[nn.Module, torch.Tensor, Path, dict[str, Any]], None]
    open: Callable[[Path], Callable[[torch.Tensor], torch.Tensor]]


FORMATS = {
    'onnx': Format('.onnx', ('onnx', 'onnxscript', 'onnxruntime'), _write_onnx, _open_onnx),
    'torch-export': Format('.pt2', (), _write_torch_export, _open_torch_export),
}
