"""Measure loss, top-1 and top-5 of models on a data set.

    accelerate launch -m timm_spinal.validate --model local-dir:output/train/RUN --data-dir my/images
    accelerate launch -m timm_spinal.validate --checkpoint output/train/RUN --config output/train/RUN/args.yaml
    accelerate launch -m timm_spinal.validate --checkpoint 'output/train/*' --data-dir my/images --results-file all.csv
    accelerate launch -m timm_spinal.validate --model 'resnet*' --pretrained --data-dir imagenet

``--model`` takes a name, ``hf-hub:org/name``, ``local-dir:FOLDER`` or a wildcard; ``--checkpoint`` a run folder, one of
its ``last/step-*`` folders, a weights file for ``--model``, or a wildcard of those. Every image counts once, whatever
the number of processes. Weights whose classifier does not fit the model are an error.
"""
import sys
from typing import Any

from timm_spinal.cli import guard


def run(argv: list[str]) -> int:
    """Evaluate as the arguments say; returns the exit code."""
    from timm_spinal.training.config import ValidateConfig
    from timm_spinal.training.parser import parse_config
    config = parse_config(argv, ValidateConfig, 'timm-spinal validate', __doc__)
    from timm_spinal.training.validation import validate
    rows: list[dict[str, Any]] = validate(config)
    return 0 if all('error' not in row for row in rows) else 2


if __name__ == '__main__':
    sys.exit(guard(run, sys.argv[1:]))
