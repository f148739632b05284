"""Train an image classifier on any number of devices.

    accelerate launch -m timm_spinal.train --config configs/quickstart.yaml
    accelerate launch -m timm_spinal.train --config finetune --model resnet50_pspinal --data-dir my/images
    accelerate launch --num_processes 8 --mixed_precision bf16 -m timm_spinal.train --config my.yaml --experiment first
    accelerate launch -m timm_spinal.train --config my.yaml --experiment first --resume auto
    accelerate launch -m timm_spinal.train --config my.yaml --push-to-hub me/my_model --hub-license apache-2.0

The options are those of timm; devices and processes are set with `accelerate`. A run writes into its folder
``args.yaml``, ``summary.csv``, ``curves.png``, ``result.json``, ``last/`` (from which --resume continues exactly) and
the best weights in timm's format. The last line of the output shows how to load them. Epochs count from 0, as in timm.
"""
import sys

from timm_spinal.cli import guard


def run(argv: list[str]) -> int:
    """Train as the arguments say; returns the exit code."""
    from timm_spinal.hub.options import TrainAndPushConfig, split_config
    from timm_spinal.training.parser import parse_config
    config, hub = split_config(parse_config(argv, TrainAndPushConfig, 'timm-spinal train', __doc__))
    from timm_spinal.training.results import write_result
    from timm_spinal.training.train import open_run, train, train_epochs
    if not hub.push_to_hub:
        train(config)
        return 0
    from timm_spinal.hub.push import Pusher
    pusher = Pusher(config, hub)
    with open_run(config) as run:
        train_epochs(run, pusher.after_epoch)
        pusher.after_training(run, write_result(run))
    return 0


if __name__ == '__main__':
    sys.exit(guard(run, sys.argv[1:]))
