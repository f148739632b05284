"""Where a model looked: a heat map over a picture, for the class that it says or another one.

    timm-spinal explain output/train/RUN photo.jpg --output why.png
    timm-spinal explain output/train/RUN photo.jpg --output why.png --class rose --method layercam

The methods are those of the package grad-cam. The map is that of the last layer which still has places, by timm's
feature_info; --layer names another module. A packed head, which has no gradients, is explained by its float twin.
"""
import contextlib
import copy
import difflib
import importlib.util
import math
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from timm_spinal.arguments import Parser, number
from timm_spinal.cli import guard
from timm_spinal.errors import UserError, quiet
from timm_spinal.evaluation.figures import draw_sheet
from timm_spinal.layers.capsule_head import CapsuleHead
from timm_spinal.training.config import ValidateConfig
from timm_spinal.training.image_files import shown
from timm_spinal.training.parser import check_output_file

from .opened import OnnxModel, Opened, open_any
from .predict import accelerator_on

METHODS = {  # grad-cam's classes; those beside them need several layers, or another kind of target
    'gradcam': 'GradCAM', 'gradcam++': 'GradCAMPlusPlus', 'hirescam': 'HiResCAM', 'xgradcam': 'XGradCAM',
    'layercam': 'LayerCAM', 'gradcamelementwise': 'GradCAMElementWise', 'eigencam': 'EigenCAM',
    'eigengradcam': 'EigenGradCAM', 'kpcacam': 'KPCA_CAM', 'scorecam': 'ScoreCAM', 'ablationcam': 'AblationCAM',
    'fem': 'FEM',
}


class Explanation(NamedTuple):
    """Where a model looked.

    Attributes:
        label: Of the class that is explained.
        score: Its probability.
        image: The picture as the model sees it: resized and cropped.
        heat: (H, W) of it, in [0, 1].
        layer: Name of the module whose map it is.
    """
    label: str
    score: float
    image: Image.Image
    heat: np.ndarray
    layer: str

    def overlay(self) -> Image.Image:
        """The picture with the heat map over it."""
        from pytorch_grad_cam.utils.image import show_cam_on_image
        pixels = np.asarray(self.image.convert('RGB'), dtype=np.float32) / 255
        return Image.fromarray(show_cam_on_image(pixels, self.heat, use_rgb=True))


def check_installed() -> None:
    """Refuse to go on without the package grad-cam.

    Raises:
        UserError: Says how to install it.
    """
    if importlib.util.find_spec('pytorch_grad_cam') is None:
        raise UserError("explain: the package grad-cam is not installed; pip install 'timm-spinal[explain]'")


def explain(
        opened: Opened,
        image: Image.Image,
        target: int | None = None,
        method: str = 'gradcam',
        layer: str = '',
) -> Explanation:
    """Where a model looked in a picture.

    Args:
        opened: A classifier.
        image: In the mode of the model.
        target: Class to explain; None for the one that the model says.
        method: A key of ``METHODS``.
        layer: Name of a module; '' for the last of timm's ``feature_info``.

    Raises:
        UserError: A model without gradients or without a map.
    """
    check_installed()
    import pytorch_grad_cam
    model = _differentiable(opened)
    device = next(model.parameters()).device
    x = opened.transform(image).unsqueeze(0).to(device)
    with torch.no_grad():
        scores = _first(model(x)).float().softmax(1)[0]
    target = int(scores.argmax()) if target is None else target
    last: UserError | None = None
    cold: Explanation | None = None
    for name in [layer] if layer else _layers(model, opened.name):
        try:
            with _silent(), torch.enable_grad():
                cam_of = getattr(pytorch_grad_cam, METHODS[method])
                found = _Map(model, model.get_submodule(name), name)
                with cam_of(model=_FirstOutput(model), target_layers=[found.module],
                            reshape_transform=found.reshape) as cam:
                    heat = cam(input_tensor=x, targets=[LogOdds(target)])[0]
                    gradients = list(cam.activations_and_grads.gradients)
        except _NoMap as e:
            last = UserError(f'explain: {opened.name}: {e}')
            continue
        flat = bool(gradients) and all(not np.any(np.asarray(g)) for g in gradients)
        if flat or not np.isfinite(heat).all():
            last = UserError(f'explain: {opened.name}: the class does not depend on the places of {name}; name another '
                             'module with --layer')
            continue
        found_here = Explanation(opened.label(target), float(scores[target]), _as_seen(opened, x), heat, name)
        if heat.max() > 0:
            return found_here
        cold = cold or found_here
    if cold:  # nowhere does anything speak for the class
        return cold
    raise last or UserError(f'explain: {opened.name}: has no feature map (feature_info); name a module with --layer')


def class_index(opened: Opened, name: str) -> int:
    """The class that a name or a number means.

    Raises:
        UserError: None does; names the nearest.
    """
    if name in opened.labels:
        return opened.labels.index(name)
    alike = [i for i, label in enumerate(opened.labels) if label.casefold() == name.casefold()]
    if len(alike) == 1:
        return alike[0]
    if name.isdecimal() and int(name) < len(opened.labels):
        return int(name)
    near = difflib.get_close_matches(name, opened.labels, n=3, cutoff=0.5) or opened.labels[:5]
    some = ', '.join(map(shown, near)) + (', ...' if len(near) < len(opened.labels) else '')
    raise UserError(f'--class {shown(name)}: is none of the {len(opened.labels)} classes; there are {some}')


# ---- the layer and its map --------------------------------------------------------------------------------------


class _NoMap(Exception):
    """What a module gives has no places."""


class LogOdds:
    """What is explained: the logarithm of the odds of a class against all others.

    Its logit alone may fall with evidence by which those of the others fall more.
    """

    def __init__(self, target: int):
        self.target = target

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.float()
        if len(scores) == 1:
            return scores[0]
        others = torch.cat([scores[:self.target], scores[self.target + 1:]])
        return scores[self.target] - others.logsumexp(0)


class _FirstOutput(nn.Module):
    """A model whose first output counts when it returns several."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _first(self.model(x))


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output


def _layers(model: Any, name: str) -> list[str]:
    """Names of modules to try: the last one with features, in a transformer's block its first norm, and the one before.

    Behind the last block the class token alone may reach the classifier; then the patches count as they enter it.
    """
    info = getattr(model, 'feature_info', None) or []
    named = [str(entry.get('module') or '') for entry in info if isinstance(entry, dict)]
    modules = [module for module in named if module and _has(model, module)]
    if not modules:
        return []
    last = modules[-1]
    inside = [f'{last}.{i}' for i in ('norm1', 'norm') if _has(model, f'{last}.{i}')]
    return [last, *inside, *modules[-2:-1]]


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


class _Map:
    """Turns what a module gives into (B, C, H, W) for grad-cam."""

    def __init__(self, model: Any, module: nn.Module, name: str):
        self.model, self.module, self.name = model, module, name

    def reshape(self, x: Any) -> torch.Tensor:
        if not isinstance(x, torch.Tensor):
            raise _NoMap(f'{self.name} gives {type(x).__name__} and no map; name another module with --layer')
        if x.ndim == 4:
            x = x if self._channels_first(x) else x.permute(0, 3, 1, 2)
            if x.shape[2] * x.shape[3] > 1:
                return x
        if x.ndim == 3:
            return self._of_tokens(x)
        raise _NoMap(f'{self.name} gives {tuple(x.shape[1:])}, which has no places; name another module with --layer')

    def _channels_first(self, x: torch.Tensor) -> bool:
        channels = {entry['num_chs'] for entry in self.model.feature_info if isinstance(entry, dict)} \
            if getattr(self.model, 'feature_info', None) else set()
        first, last = x.shape[1] in channels, x.shape[3] in channels
        return first if first != last else getattr(self.model, 'output_fmt', 'NCHW') != 'NHWC'

    def _of_tokens(self, x: torch.Tensor) -> torch.Tensor:
        grid = getattr(getattr(self.model, 'patch_embed', None), 'grid_size', None)
        grids = [tuple(grid)] if grid else []
        for count in (x.shape[1] - getattr(self.model, 'num_prefix_tokens', 0), x.shape[1]):
            grids.append((math.isqrt(count),) * 2)
            for height, width in grids:
                if height * width == count:  # other tokens stand in front
                    return x[:, x.shape[1] - count:].transpose(1, 2).unflatten(2, (height, width))
        raise _NoMap(f'{self.name} gives {x.shape[1]} tokens, which are no grid; name another module with --layer')


def _differentiable(opened: Opened) -> Any:
    if opened.detector:
        raise UserError(f'explain: {opened.name} is a detector; its boxes say where it looked: timm-spinal predict')
    if isinstance(opened.model, OnnxModel):
        raise UserError('explain: an ONNX file gives no gradients; give the run that it was exported from')
    model = opened.model
    if any(isinstance(module, CapsuleHead) and module.packed for module in model.modules()):
        model = copy.deepcopy(model)
        for module in model.modules():
            if isinstance(module, CapsuleHead):
                module.unpack()
    for parameter in model.parameters():
        parameter.requires_grad_(True)  # else what frozen layers give has no gradient
    return model.eval()


def _as_seen(opened: Opened, x: torch.Tensor) -> Image.Image:
    """The input of the model as a picture."""
    assert opened.data is not None
    mean, std = (torch.tensor(opened.data[key], device=x.device).view(-1, 1, 1) for key in ('mean', 'std'))
    pixels = ((x[0] * std + mean) * 255).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels, opened.decode.mode).convert('RGB')


@contextlib.contextmanager
def _silent():
    """Without the progress bars that some methods print."""
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stderr(nowhere), quiet():
        yield


# ---- command line -------------------------------------------------------------------------------------------------


def run(argv: list[str]) -> int:
    """``timm-spinal explain``."""
    parser = Parser('timm-spinal explain', __doc__)
    parser.add_argument('model', metavar='MODEL', help='run folder, hf-hub:OWNER/NAME, local-dir:FOLDER, or a name of '
                        'timm')
    parser.add_argument('image', metavar='IMAGE', help='the picture')
    parser.add_argument('--output', '-o', required=True, metavar='FILE', help='.png file: the picture, and beside it '
                        'the picture with the heat map')
    parser.add_argument('--class', dest='target', default='', metavar='NAME',
                        help='class to explain, by name or number; not given: the one that the model says')
    parser.add_argument('--method', choices=tuple(METHODS), default='gradcam', help='method of grad-cam (default: '
                        'gradcam)')
    parser.add_argument('--layer', default='', metavar='NAME', help='module whose map is shown, by its name in '
                        'named_modules(), for instance layer3')
    parser.add_argument('--device', default='', help='cpu, cuda, mps, ...; not given: the fastest there is')
    parser.add_argument('--img-size', type=number(low=8), metavar='N', help="image side in pixels; not given: the "
                        "model's")
    parser.add_argument('--exif-transpose', action='store_true', help='rotate the image upright by its EXIF '
                        'orientation')
    args = parser.parse_args(argv)
    check_installed()
    check_output_file(args.output, '--output', ('.png',))
    if os.path.realpath(args.output) == os.path.realpath(args.image):
        raise UserError(f'--output {args.output}: is the image; name another file')
    accelerator = accelerator_on(args.device)
    opened = open_any(args.model, ValidateConfig(img_size=args.img_size, exif_transpose=args.exif_transpose))
    target = class_index(opened, args.target) if args.target and not opened.detector else None
    image = opened.read(args.image)
    opened.model.to(accelerator.device)
    if args.layer and not _has(opened.model, args.layer):
        known = difflib.get_close_matches(args.layer, [name for name, _ in opened.model.named_modules()], n=3)
        raise UserError(f'--layer {args.layer}: the model has no such module; {", ".join(known) or "see --help"}')
    found = explain(opened, image, target, args.method, args.layer)
    said = f'{shown(found.label)} {100 * found.score:.1f} %'
    draw_sheet(Path(args.output), [found.image, found.overlay()], [os.path.basename(args.image), said])
    print(f'{said}: {args.output}, from {found.layer} by {args.method}')
    return 0


if __name__ == '__main__':
    sys.exit(guard(run, sys.argv[1:]))
