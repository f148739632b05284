"""Losses of the updates, shared by all processes and read one update late so that no device waits."""
import math
from collections import deque

import torch
from accelerate import Accelerator

from timm_spinal.errors import UserError

from .signals import SignalFlag


class NotFinite(UserError):
    """A loss or a weight is NaN or infinite."""


class Meter:
    """Sums the parts of the loss over an epoch and passes signals from any process to all.

    Per update one small tensor (sums over images, images, SIGINT, SIGTERM) is summed over the processes. It is read
    when the next update has been queued, so a device never idles for it; a NaN is therefore noticed one update
    later, and before anything is saved.

    Args:
        accelerator: Sums over its processes.
        flag: The signals of this process.
        sums: Sums of the epoch so far, by name, with ``images`` (from a checkpoint; changed in place).
    """

    def __init__(self, accelerator: Accelerator, flag: SignalFlag, sums: dict[str, float]):
        self.accelerator = accelerator
        self.flag = flag
        self.sums = sums
        self.signum = 0
        self.last: dict[str, float] = {}
        self._window: dict[str, torch.Tensor] = {}
        self._images = 0
        self._queue: deque[tuple[int, list[str], torch.Tensor]] = deque()
        # MPS has no float64
        self._dtype = torch.float32 if accelerator.device.type == 'mps' else torch.float64

    def add(self, parts: dict[str, torch.Tensor], images: int) -> None:
        """Count one micro-batch: mean losses by name and the number of images."""
        for name, value in parts.items():
            value = value.detach().to(self._dtype) * images
            self._window[name] = self._window[name] + value if name in self._window else value
        self._images += images

    def add_penalty(self, name: str, value: torch.Tensor) -> None:
        """Count a penalty of the update that `close` is about to end."""
        self._window[name] = value.detach().to(self._dtype) * self._images

    def close(self, update: int) -> None:
        """End an update: queue its sums, and read those of the update before."""
        signals = [float(self.flag.signum == s) for s in SignalFlag.SIGNALS]
        counts = torch.tensor([self._images, *signals], dtype=self._dtype, device=self.accelerator.device)
        values = torch.cat([torch.stack(list(self._window.values())), counts])
        self._queue.append((update, list(self._window), self.accelerator.reduce(values)))
        self._window, self._images = {}, 0
        self._read(leave=1)

    def settle(self) -> None:
        """Read everything that is queued.

        Raises:
            NotFinite: A loss was NaN or infinite.
        """
        self._read(leave=0)

    def means(self) -> dict[str, float]:
        """Mean per image of each part since the start of the epoch."""
        images = max(self.sums.get('images', 0.), 1.)
        return {name: value / images for name, value in self.sums.items() if name != 'images'}

    def _read(self, leave: int) -> None:
        while len(self._queue) > leave:
            update, names, tensor = self._queue.popleft()
            *sums, images, sigint, sigterm = tensor.tolist()
            self.last = {name: value / images for name, value in zip(names, sums)}
            for name, value in self.last.items():
                if not math.isfinite(value):
                    raise NotFinite(f'{name} is {value} at update {update}')
            for name, value in zip([*names, 'images'], [*sums, images]):
                self.sums[name] = self.sums.get(name, 0.) + value
            for signum, count in zip(SignalFlag.SIGNALS, (sigint, sigterm)):
                if count:
                    self.signum = self.signum or int(signum)
