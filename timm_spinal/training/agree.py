"""The processes of a launch: made known to each other, and going the same way when one decides."""
from typing import Any, Callable

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list

from timm_spinal.errors import UserError


def agree(accelerator: Accelerator, choose: Callable[[], Any]) -> Any:
    """Let the main process choose; every process gets the same answer or the same error."""
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = choose()
        except UserError as e:
            answer[1] = str(e)
    if accelerator.num_processes > 1:
        broadcast_object_list(answer)
    if answer[1]:
        raise UserError(answer[1])
    return answer[0]


def new_accelerator(mixed_precision: str | None, **kwargs: Any) -> Accelerator:
    """An `Accelerator` without the settings of one before it in the same process.

    Raises:
        UserError: A precision, plugin or tracker that is not available.
    """
    AcceleratorState._reset_state()
    try:
        return Accelerator(mixed_precision=mixed_precision, **kwargs)
    except (ValueError, ImportError) as e:
        raise UserError(f'accelerate: {" ".join(str(e).split())}') from e
