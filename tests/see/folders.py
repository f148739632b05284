"""Models and pictures for the tests of this folder."""
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import timm_spinal
from timm_spinal.detection import create_detector
from timm_spinal.detection.saved import save_detector
from timm_spinal.training.results import export_model


def make_run(folder: Path, name: str = 'test_resnet', names: Any = ('ant', 'bee', '=cat()'), **kwargs) -> Path:
    """A folder as a run leaves it, of a model at random weights of a fixed seed."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    timm_spinal.ensure_registered(name)
    model = timm.create_model(name, num_classes=len(names) if names else 3, **kwargs).eval()
    if isinstance(model.get_classifier(), torch.nn.Linear):  # answers that differ from image to image
        with torch.no_grad():
            transform, rng = create_transform(**resolve_model_data_config(model)), np.random.default_rng(9)
            scores = model(torch.stack([transform(picture(rng, i)) for i in range(24)]))
            for p in model.get_classifier().parameters():
                p.div_(scores.std(0).mean())
            model.get_classifier().bias.sub_(scores.mean(0) / scores.std(0).mean())
    export_model(folder, model, model.state_dict(), list(names) if names else None, resolve_model_data_config(model))
    return folder


def make_detector(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    detector = create_detector(
        'retinanet', backbone='test_resnet', num_classes=3, fpn_channels=16, min_size=64, max_size=96,
        score_thresh=0., detections_per_img=4)
    save_detector(folder, detector, detector.state_dict(), ['disc', 'square'])
    return folder


def make_pictures(folder: Path, count: int = 5, size: int = 40) -> list[Path]:
    """Pictures 0.png, 1.png ... of coloured noise, all different; some not square, one grey."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(count)
    paths = [folder / f'{i}.png' for i in range(count)]
    for i, path in enumerate(paths):
        image = picture(rng, i, size)
        (image.convert('L') if i == 1 else image).save(path)
    return paths


def picture(rng: np.random.Generator, i: int = 0, size: int = 40) -> Image.Image:
    """Noise over a colour."""
    pixels = 0.5 * rng.integers(0, 256, (size + 8 * (i % 3), size, 3)) + 0.5 * rng.integers(0, 256, 3)
    return Image.fromarray(pixels.astype(np.uint8))


def write_bomb(path: Path, width: int = 100_000, height: int = 100_000) -> Path:
    """A PNG of this many pixels in a few bytes."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    head = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    rows = chunk(b'IDAT', zlib.compress(bytes(3000)))
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + rows + chunk(b'IEND', b''))
    return path
