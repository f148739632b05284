"""A count of the places where a training loop would wait for its device."""
import contextlib
import sys
import traceback
from typing import Any, Callable, Iterator

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# operators that give the host a number, or a tensor whose size the host must know
READS = {
    aten._local_scalar_dense, aten.nonzero, aten.nonzero_numpy, aten.masked_select, aten.equal, aten._unique,
    aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.unique_dim_consecutive, aten.is_nonzero,
    aten.bincount, aten.repeat_interleave,
}
MASKED = {aten.index, aten.index_put, aten.index_put_, aten._unsafe_index}
# calls that copy from a device to the host, and such as copy the other way
TO_HOST = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}
TO_DEVICE = {torch.Tensor.to, torch.Tensor.cuda}
FROM_NUMBERS = {torch.tensor, torch.as_tensor, torch.asarray}


class Waits:
    """Context that notes what a process would wait for if tensors were on a device.

    Operators are seen below autograd, so those within PyTorch and in a backward pass too. A copy is seen where it is
    called: on a CPU, where there is nothing to copy, it is no operator.

    Args:
        on_host: Whether a tensor is on the host for certain, as the counts of steps in an optimizer's state.

    Attributes:
        found: What was called, and the places that called it.
        operators: Number of operators, to see that anything ran.
    """

    def __init__(self, on_host: Callable[[torch.Tensor], bool] = lambda tensor: False):
        self.on_host = on_host
        self.found: list[str] = []
        self.operators = 0
        self._allowed = 0
        self._modes = contextlib.ExitStack()

    def __enter__(self) -> 'Waits':
        self._modes.enter_context(_Operators(self))
        self._modes.enter_context(_Copies(self))
        return self

    def __exit__(self, *exc: Any) -> None:
        self._modes.close()

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """The process may wait, as on the log line, or works on the host."""
        self._allowed += 1
        try:
            yield
        finally:
            self._allowed -= 1

    def note(self, what: Any) -> None:
        """Count a wait, with the place in our code that caused it."""
        if not self._allowed:
            frames = [f for f in traceback.extract_stack() if f.filename != __file__ and '/torch/' not in f.filename]
            place = ' < '.join(f'{f.filename.rpartition("/")[2]}:{f.lineno} {f.name}' for f in reversed(frames[-4:]))
            self.found.append(f'{what}: {place}')


class _Operators(TorchDispatchMode):
    def __init__(self, waits: Waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        self.waits.operators += 1
        packet = function.overloadpacket
        masked = packet in MASKED and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if masked or packet in READS and not self.waits.on_host(args[0]):
            self.waits.note(function)
        return function(*args, **kwargs or {})


class _Copies(TorchFunctionMode):
    def __init__(self, waits: Waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if '/torch/' in sys._getframe(1).f_code.co_filename:  # PyTorch's own functions know where a tensor is
            return function(*args, **kwargs)
        devices = [a for a in (*args[1:2], kwargs.get('device')) if isinstance(a, (torch.device, str, torch.Tensor))]
        to_device = function in TO_DEVICE and devices and not kwargs.get('non_blocking')
        made = function in FROM_NUMBERS and kwargs.get('device') is not None and not isinstance(args[0], torch.Tensor)
        if to_device or made or function in TO_HOST or function is torch.Tensor.new_tensor:
            self.waits.note(function.__name__)
        return function(*args, **kwargs)
