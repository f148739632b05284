"""FSDP2 between processes on a CPU, for tests: ``accelerate launch --use_fsdp ... -m tests.training.shard_on_cpu``.

Accelerate shards on GPUs only, and runs DDP in silence elsewhere; it asks for the kind of its devices in one place,
which says GPU here, with gloo between them and the CPU as the device.
"""
import json
import os
import sys
from pathlib import Path

import pytest
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from timm_spinal.cli import guard
from timm_spinal.errors import UserError
from timm_spinal.training.train import train

from .runs import small_config, train_until


def shard_on_cpu() -> None:
    """As `accelerate launch` leaves a process on a machine with GPUs."""
    os.environ.pop('ACCELERATE_USE_CPU', None)
    os.environ['ACCELERATE_TORCH_DEVICE'] = 'cpu'
    PartialState._prepare_backend = lambda self, *args, **kwargs: ('gloo', DistributedType.MULTI_GPU)  # type: ignore


def main(argv: list[str]) -> int:
    """Train one run after the other, in the same processes; write what each gave into ``NAME.json``.

    ``RUNS`` is a JSON file beside the folder ``images``: the options of each run by its name. ``until`` among them
    stops the run in that update, as a kill would.
    """
    path = Path(argv[0])
    shard_on_cpu()
    for name, options in json.loads(path.read_text()).items():
        until, outcome = options.pop('until', 0), {}
        config = small_config(path.parent, **{'experiment': name, **options})
        try:
            if until:
                train_until(pytest.MonkeyPatch(), config, until, KeyboardInterrupt())
            else:
                outcome = train(config)
        except UserError as e:
            outcome = dict(error=str(e))
        if os.environ['RANK'] == '0':
            (path.parent / f'{name}.json').write_text(json.dumps(outcome))
    return 0


if __name__ == '__main__':
    sys.exit(guard(main, sys.argv[1:]))
