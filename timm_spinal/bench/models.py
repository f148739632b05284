"""Models of timm as sides of a comparison, in the forms in which models are used."""
import re
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Callable, Sequence

import timm
import torch
import torch.nn.functional as F
from timm.models import is_model
from torch import nn

from timm_spinal.cost import count_macs, count_params
from timm_spinal.errors import UserError, quiet
from timm_spinal.layers import HEADS
from timm_spinal.models import ensure_registered, fold_bases, fold_batchnorm, merge_bases, pack_xnodr

from .runner import Call, Pair, Setting, Side

# what the name of a model with shared bases has more than that of the plain one
_SHARED = re.compile(r'_sb(pp)?(_s\d+u\d+d?)?')


def pairs_of(what: str, against: str, forms: Sequence[str]) -> list[Pair]:
    """A model against another one, once in each form."""
    return [
        Pair(Side(what, model_call, (what, form)), Side(against, model_call, (against, form)), form,
             partial(sizes, what, against))
        for form in forms
    ]


def plain_model(name: str) -> str:
    """The timm model without the head, the collisions or the shared bases that a name asks for.

    Raises:
        UserError: The name is no such model.
    """
    backbone, _, head = name.rpartition('_')
    plain = backbone if head in HEADS else name.removeprefix('ic') if name.startswith('ic') else _SHARED.sub('', name)
    if plain == name or not is_model(plain):
        raise UserError(f'{name}: there is no plain model to compare it with; name a second model: timm-spinal bench '
                        f'{name} OTHER')
    return plain


def sizes(what: str, against: str, setting: Setting) -> str:
    """Parameters and multiply-accumulates of both for an image, as torch.utils.flop_counter counts them."""
    counts = []
    for name in (what, against):
        model = _create(name, device='meta').eval()
        image = torch.empty(1, 3, setting.img_size, setting.img_size, device='meta')
        counts.append(f'{count_params(model) / 1e6:.3f} M parameters, {count_macs(model, image) / 1e9:.3f} GMACs')
    return f'{what}: {counts[0]}; {against}: {counts[1]}'


def model_call(setting: Setting, name: str, form: str) -> Call:
    """A call of a new model in a form of `FORMS`, with weights and images that do not depend on the side."""
    torch.manual_seed(0)
    model = _create(name).to(setting.device).to(memory_format=torch.channels_last)
    images = torch.randn(setting.batch_size, 3, setting.img_size, setting.img_size, device=setting.device)
    call = FORMS[form](model, images.contiguous(memory_format=torch.channels_last))
    if not setting.device.startswith('cuda'):
        return call

    def until_done() -> None:
        call()
        torch.cuda.synchronize()

    return until_done


def _create(name: str, **kwargs: Any) -> nn.Module:
    ensure_registered(name)
    return timm.create_model(name, **kwargs)


def inference(model: nn.Module, images: torch.Tensor) -> Call:
    """A forward in evaluation mode, without gradients."""
    model.eval()
    return torch.inference_mode()(lambda: model(images))


def compiled(model: nn.Module, images: torch.Tensor) -> Call:
    """The same by ``torch.compile``."""
    return inference(torch.compile(model.eval()), images)  # type: ignore[arg-type]


def folded(model: nn.Module, images: torch.Tensor) -> Call:
    """Norms folded into convolutions, of shared bases as well."""
    model.eval()
    if hasattr(model, 'shared_stages'):
        model = fold_bases(model)
    return inference(fold_batchnorm(model).to(memory_format=torch.channels_last), images)


def merged(model: nn.Module, images: torch.Tensor) -> Call:
    """Shared bases multiplied out to plain convolutions; other models as they are."""
    model.eval()
    if hasattr(model, 'shared_stages'):
        model = merge_bases(model).to(memory_format=torch.channels_last)
    return inference(model, images)


def packed(model: nn.Module, images: torch.Tensor) -> Call:
    """Capsule heads that compute with bits; other models as they are."""
    model.eval()
    return inference(pack_xnodr(model) if hasattr(getattr(model, 'attached_head', None), 'pack') else model, images)


def training(model: Any, images: torch.Tensor) -> Call:
    """Forward, backward and an SGD step with momentum."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    target = torch.arange(len(images), device=images.device) % model.num_classes

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), target).backward()
        optimizer.step()

    return step


def compiled_training(model: nn.Module, images: torch.Tensor) -> Call:
    """The same by ``torch.compile``."""
    model.compile()
    return training(model, images)


def onnxruntime_call(model: nn.Module, images: torch.Tensor, int8: bool = False) -> Call:
    """The model's ONNX file in onnxruntime, on the CPU.

    Args:
        model: The model.
        images: The batch; the file is made for its size.
        int8: Weights and activations in 8 bits, by onnxruntime's static quantization on these images.

    Raises:
        UserError: onnxruntime or the exporter are not installed.
    """
    try:
        import onnxruntime
        from onnxruntime.quantization import CalibrationDataReader, quantize_static
    except ImportError as e:
        raise UserError(f'--forms: onnxruntime needs {e.name}; pip install onnx onnxscript onnxruntime') from e
    images = images.contiguous()

    class Batch(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter([dict(image=images.numpy())])

        def get_next(self) -> Any:
            return next(self.batches, None)

    with tempfile.TemporaryDirectory() as folder, quiet():
        file = Path(folder) / 'model.onnx'
        _export(model.eval(), images, file)
        if int8:
            quantize_static(file, file.with_name('int8.onnx'), Batch(), per_channel=True)
            file = file.with_name('int8.onnx')
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(file), options, providers=['CPUExecutionProvider'])
    batch = images.numpy()
    return lambda: session.run(None, dict(image=batch))[0]




def _export(model: nn.Module, images: torch.Tensor, file: Path) -> None:
    program = torch.onnx.export(model, (images,), dynamo=True, input_names=['image'], verbose=False)
    assert program is not None
    program.save(str(file))


FORMS: dict[str, Callable[[nn.Module, torch.Tensor], Call]] = {
    'eager': inference,
    'compiled': compiled,
    'folded': folded,
    'merged': merged,
    'packed': packed,
    'training': training,
    'compiled training': compiled_training,
    'onnxruntime': onnxruntime_call,
    'int8': partial(onnxruntime_call, int8=True),
}
