"""One process decides, all go the same way."""
from typing import Any, Callable

from accelerate import Accelerator
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
