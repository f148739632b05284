"""Publishing from the trainer: ``--push-to-hub``."""
import os
from pathlib import Path
from typing import Any

import torch
from timm.models import get_pretrained_cfg, load_model_config_from_hf, parse_model_name

from timm_spinal.errors import UserError
from timm_spinal.training.config import TrainConfig
from timm_spinal.training.model import check_model_name
from timm_spinal.training.run import Run

from .licences import Licence, choose_licence
from .options import HubOptions, PublishOptions
from .package import built
from .publication import open_run
from .publish import check_account, publish
from .recipe import started_from_weights


class Pusher:
    """Publishes the run folder of a run, from its main process; made before the run, so that what is wrong shows then.

    Args:
        config: The run.
        hub: Where its weights go.

    Raises:
        UserError: No licence, malformed repository name, no token that may write, no network.
    """

    def __init__(self, config: TrainConfig, hub: HubOptions):
        self.interval = hub.push_interval
        check_model_name(config.model)
        asked = Licence(hub.hub_license, hub.hub_license_name, hub.hub_license_link)
        licence = choose_licence(asked, _licence_of_start(config), flag='--hub-license')
        if licence.file:
            raise UserError(f'--hub-license-link {licence.link}: give the address of the text, https://...')
        options = PublishOptions(
            hub.push_to_hub, private=hub.hub_private, licence=hub.hub_license, licence_name=hub.hub_license_name,
            licence_link=hub.hub_license_link, pictures=hub.hub_pictures)
        self.options = check_account(options) if os.environ.get('RANK', '0') == '0' else options

    def after_epoch(self, run: Run) -> None:
        """Publish the best weights so far, when it is time; training goes on if that fails."""
        epoch = run.progress.epoch
        if not self.interval or epoch % self.interval or epoch >= run.last_epoch or not run.progress.best:
            return
        result = run.problem.result(run)  # every process takes part
        if run.accelerator.is_main_process:
            try:
                self._push(run.folder, result)
            except UserError as e:
                print(f'warning: not published after epoch {epoch - 1}: {e}', flush=True)

    def after_training(self, run: Run, result: dict[str, Any]) -> None:
        """Publish the best weights. Every process may call it.

        Raises:
            UserError: It failed, or there are none; the run folder is whole.
        """
        if not run.accelerator.is_main_process:
            return
        try:
            self._push(run.folder, result)
        except UserError as e:
            raise UserError(f'{e} (trained, but not published; try again with timm-spinal publish {run.folder} '
                            f'--repo {self.options.repo})') from e

    def _push(self, folder: Path, result: dict[str, Any]) -> None:
        with torch.random.fork_rng(devices=[]):  # training goes on as if nothing had been published
            source = open_run(folder, result=result)
            with built(source, self.options) as package:
                published = publish(package, self.options, f'{source.architecture} from timm_spinal')
        print(published.line, flush=True)


def _licence_of_start(config: TrainConfig) -> str | None:
    """The licence of the weights that a run will start from, where they name one."""
    if not started_from_weights(config):
        return None
    source, name = parse_model_name(config.model)
    if source == 'hf-hub':
        return load_model_config_from_hf(name)[0].get('license')
    cfg = None if source else get_pretrained_cfg(name)
    return cfg.license if cfg is not None else None
