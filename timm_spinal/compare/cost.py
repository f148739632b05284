"""What a model costs: parameters, multiply-accumulates, measured latency, file size."""
from dataclasses import dataclass

import torch
from safetensors.torch import save
from torch import nn
from torch.utils.benchmark import Timer

from timm_spinal.cost import count_macs, count_params


@dataclass(frozen=True)
class Cost:
    """Cost of one variant.

    Attributes:
        params: Parameters of the head alone (frozen features) or of the whole network (sweep).
        macs: Multiply-accumulates of the same for one image, as torch.utils.flop_counter counts them.
        head_ms: Milliseconds for one image through the head alone; None where there is no separate head.
        network_ms: Milliseconds for one image through the whole network.
        file_mb: Size of the weights of what ``params`` counts, as safetensors, in 10^6 bytes.
    """
    params: int
    macs: int
    head_ms: float | None
    network_ms: float
    file_mb: float


@torch.inference_mode()
def latency_ms(model: nn.Module, x: torch.Tensor, seconds: float = 0.5) -> float:
    """Median milliseconds of a forward in evaluation mode, with the threads that torch is set to.

    Args:
        model: Model on the device of x.
        x: Input.
        seconds: Time to measure for, at least.
    """
    model.eval()
    timer = Timer('model(x)', globals=dict(model=model, x=x), num_threads=torch.get_num_threads())
    timer.timeit(2)
    return 1e3 * timer.blocked_autorange(min_run_time=seconds).median


def file_mb(model: nn.Module) -> float:
    """Size of a model's weights as safetensors, in 10^6 bytes."""
    return len(save({k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()})) / 1e6


def head_cost(head: nn.Module, backbone_ms: float, x: torch.Tensor) -> Cost:
    """Cost of a head; the network's latency is that of the backbone and the head one after the other.

    Args:
        head: The head.
        backbone_ms: Measured latency of the backbone for one image.
        x: Features of one image, (1, ...).
    """
    head_ms = latency_ms(head, x)
    return Cost(count_params(head), count_macs(head.eval(), x), head_ms, backbone_ms + head_ms, file_mb(head))


@torch.inference_mode()
def network_cost(model: nn.Module, x: torch.Tensor) -> Cost:
    """Cost of a whole network for images (1, C, H, W)."""
    head, head_ms = getattr(model, 'attached_head', None), None
    if head is not None:
        seen: list[torch.Tensor] = []  # a pooled vector, or a map
        hook = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model.eval()(x)
        hook.remove()
        head_ms = latency_ms(head, seen[0])
    return Cost(count_params(model), count_macs(model.eval(), x), head_ms, latency_ms(model, x), file_mb(model))
