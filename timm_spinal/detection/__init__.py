"""torchvision's detectors over any timm backbone with ``features_only``, and their training.

    detector = create_detector('fasterrcnn', backbone='resnet50_sb', num_classes=91)
    losses = detector(images, targets)                # in train mode
    detector = load_detector('output/detection/RUN')  # what `timm-spinal train-detection` left
    boxes = detector.eval()(images)[0]['boxes']
"""
from .detector import DETECTORS as DETECTORS
from .detector import create_detector as create_detector
from .saved import load_detector as load_detector
