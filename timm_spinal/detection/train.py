"""Train a detector on any number of devices; the same as ``timm-spinal train-detection``.

    accelerate launch -m timm_spinal.detection.train --config configs/detection/coco_fasterrcnn_resnet50.yaml
    accelerate launch -m timm_spinal.detection.train --model retinanet --backbone resnet50_sb --data-dir my/coco
    accelerate launch --num_processes 8 --mixed_precision bf16 -m timm_spinal.detection.train --config my.yaml
    accelerate launch -m timm_spinal.detection.train --config my.yaml --experiment first --resume auto

Options that the image trainer has too are the same. A run leaves in its folder what that one leaves, and ``boxes.png``;
the last line that is printed loads the detector.
"""
import sys

from timm_spinal.cli import guard


def run(argv: list[str]) -> int:
    """Train as the arguments say; returns the exit code."""
    from timm_spinal.training.parser import parse_config

    from .options import DetectionConfig
    config = parse_config(argv, DetectionConfig, 'timm-spinal train-detection', __doc__)
    from .problem import train_detector
    train_detector(config)
    return 0


if __name__ == '__main__':
    sys.exit(guard(run, sys.argv[1:]))
