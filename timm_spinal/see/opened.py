"""Open whatever can answer to a picture: a run, a published model, a packed one, a name of timm, an ONNX file."""
import importlib.util
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable

import torch
from PIL import Image
from timm.data import CustomDatasetInfo, ImageNetInfo, infer_imagenet_subset
from timm.models import parse_model_name
from torch import nn
from torchvision.transforms.functional import to_tensor

from timm_spinal.detection import load_detector
from timm_spinal.errors import UserError
from timm_spinal.files import read_json
from timm_spinal.training.config import ValidateConfig
from timm_spinal.training.image_files import shown
from timm_spinal.training.model import check_classifier, create_model
from timm_spinal.training.parser import load_yaml
from timm_spinal.training.pixels import UNREADABLE, Decoder, open_image
from timm_spinal.training.results import CONFIG, WEIGHTS
from timm_spinal.training.transforms import create_decoder, eval_transform, resolve_data

ONNX = '.onnx'
_DATA = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')  # in an ONNX file that we exported
_OF_PIXELS = ('input_img_mode', 'exif_transpose')  # options of a run that its config.json does not have


@dataclass
class Opened:
    """A model, in eval mode on the CPU, and what its pictures need.

    Attributes:
        name: As the user gave it.
        model: Images (B, C, H, W) to scores (B, K); of a detector, a list of images (3, H, W) in [0, 1] to boxes.
        labels: Names of the classes by index; of a detector those of label 1, 2, ...; numbers where none are known.
        decode: Makes a picture's mode that of the model.
        transform: From a picture in that mode to a tensor.
        detector: It finds boxes.
        data: timm's data config; empty for a detector.
    """
    name: str
    model: Any
    labels: list[str]
    decode: Decoder
    transform: Callable[[Image.Image], torch.Tensor]
    detector: bool = False
    data: dict[str, Any] | None = None

    def read(self, path: str) -> Image.Image:
        """A picture in the mode of the model.

        Raises:
            UserError: It cannot be read.
        """
        try:
            if not os.path.isfile(path):
                raise OSError('there is no such file')
            return self.decode(open_image(path), lambda: shown(path))
        except UNREADABLE as e:
            raise UserError(f'image {shown(path)}: cannot be read ({why_unreadable(e)}); mend it, or leave it '
                            'out') from e

    def label(self, index: int) -> str:
        """Name of a class, or its number."""
        return self.labels[index] if 0 <= index < len(self.labels) else str(index)


def why_unreadable(error: BaseException) -> str:
    """The reason in one short line."""
    reason = getattr(error, 'strerror', None) or ' '.join(str(error).split()) or type(error).__name__
    return shown(reason)[:200]


def open_any(name: str, options: ValidateConfig | None = None) -> Opened:
    """The model that a name means.

    Args:
        name: A run folder, of a classifier or a detector; a folder that pack, publish or timm wrote; ``hf-hub:...``;
            ``local-dir:...``; a name of timm, with its pretrained weights; or an ``.onnx`` file of timm-spinal export.
        options: Options of the model and its images; the name and ``pretrained`` in it do not count.

    Raises:
        UserError: No such model, none that gives classes or boxes, or a file that cannot be used.
    """
    options = options or ValidateConfig()
    if name.lower().endswith(ONNX) and not name.startswith('hf-hub:'):
        return _open_onnx(name, options)
    folder = Path(name.removeprefix('local-dir:'))
    if folder.is_dir():
        return _open_folder(name, folder, options)
    if name.startswith('local-dir:') or '/' in name and ':' not in name:
        raise UserError(f'model {shown(name)}: no such folder; give the folder of a run, hf-hub:OWNER/NAME, a name of '
                        'timm, or an .onnx file')
    if folder.is_file():
        raise UserError(f'model {shown(name)}: is a file and no .onnx file; give the folder of a run')
    return _open_classifier(name, name, options)


def _open_folder(name: str, folder: Path, options: ValidateConfig) -> Opened:
    missing = [file for file in (CONFIG, WEIGHTS) if not (folder / file).is_file()]
    if missing:
        unfinished = (folder / 'args.yaml').is_file()
        raise UserError(f'model {shown(name)}: has no {missing[0]}; ' + (
            'the run has kept no weights yet: continue with --resume' if unfinished else
            'give the folder of a run, or one that pack or timm wrote'))
    args = load_yaml(folder / 'args.yaml', ValidateConfig) if (folder / 'args.yaml').is_file() else {}
    options = replace(options, **{
        key: args[key] for key in _OF_PIXELS if key in args and not getattr(options, key)})
    config = read_json(folder / CONFIG, fix='restore it')
    if 'detector' not in config:
        return _open_classifier(name, f'local-dir:{folder}', options)
    detector = load_detector(folder)
    decode = Decoder(exif_transpose=options.exif_transpose)
    return Opened(name, detector, list(detector.class_names), decode, to_tensor, detector=True)


def _open_classifier(name: str, model_name: str, options: ValidateConfig) -> Opened:
    model: Any = create_model(replace(options, model=model_name, pretrained=True), None).eval()
    if getattr(model, 'num_classes', 0) < 1:
        raise UserError(f'model {shown(name)}: has no classifier (num_classes is 0), so it names no class; train one '
                        'on it with timm-spinal train')
    if model.loaded_weights is not None:
        check_classifier(model)
    return _opened(name, model, options)


def _opened(name: str, model: Any, options: ValidateConfig) -> Opened:
    data = resolve_data(options, model)
    labels = class_names(model, name)
    return Opened(name, model, labels, create_decoder(options, data['input_size'][0]), eval_transform(data), data=data)


def class_names(model: Any, name: str) -> list[str]:
    """Names of a model's classes: those in its config; ImageNet's for timm's own weights; else numbers.

    Raises:
        UserError: The names in its config are none.
    """
    cfg, count = model.pretrained_cfg, model.num_classes
    source, path = parse_model_name(name) if not os.path.exists(name) else ('local-dir', name)
    info: Any = None
    if names := cfg.get('label_names'):
        try:
            info = CustomDatasetInfo(names, cfg.get('label_descriptions'))
        except (TypeError, ValueError) as e:
            raise UserError(f'model {shown(name)}: the label_names in its {CONFIG} are no names ({e}); restore '
                            'it') from e
    elif (not source or path.startswith('timm/')) and not cfg.get('file'):  # timm's own weights
        subset = infer_imagenet_subset(model)
        info = ImageNetInfo(subset) if subset else None
    return [info.index_to_description(i) if info is not None and info.has_label(i) else str(i) for i in range(count)]


# ---- ONNX -------------------------------------------------------------------------------------------------------


class OnnxModel(nn.Module):
    """A classifier in an ONNX file, with the attributes of a timm model that pictures need.

    Args:
        file: Written by ``timm-spinal export``, which puts what an image needs into the file.

    Raises:
        UserError: It cannot be opened, or is of another program.
    """
    loaded_weights = None

    def __init__(self, file: str):
        super().__init__()
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only: they come as exceptions too
        threads = int(os.environ.get('OMP_NUM_THREADS') or 0)
        options.intra_op_num_threads = threads
        try:
            self.session = onnxruntime.InferenceSession(file, options, providers=onnxruntime.get_available_providers())
        except Exception as e:  # onnxruntime has a type of its own for each reason
            raise UserError(f'model {shown(file)}: is no ONNX file that onnxruntime can open '
                            f'({" ".join(str(e).split())[:200]}); export it again') from e
        found = self.session.get_modelmeta().custom_metadata_map
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        try:
            cfg = {key: json.loads(value) for key, value in found.items()}
            size, classes = cfg['input_size'], outputs[0].shape[1]
            fits = len(inputs) == 1 and inputs[0].shape[1:] == size and len(outputs[0].shape) == 2
            if not fits or not isinstance(classes, int) or any(key not in cfg for key in _DATA):
                raise ValueError('its input or output is another')
        except (ValueError, KeyError, IndexError, TypeError) as e:
            raise UserError(f'model {shown(file)}: does not say what its images need, as files of timm-spinal export '
                            'do; export the model with timm-spinal export --format onnx') from e
        self.pretrained_cfg = {'architecture': 'onnx', **cfg, 'num_classes': classes}
        self.num_classes, self.in_chans = classes, size[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer = self.session.run(None, {self.session.get_inputs()[0].name: x.float().cpu().numpy()})[0]
        return torch.from_numpy(answer)


def _open_onnx(name: str, options: ValidateConfig) -> Opened:
    if not os.path.isfile(name):
        raise UserError(f'model {shown(name)}: there is no such file')
    if importlib.util.find_spec('onnxruntime') is None:
        raise UserError(f"model {shown(name)}: onnxruntime is not installed; pip install 'timm-spinal[onnx]'")
    return _opened('', OnnxModel(name).eval(), options)
