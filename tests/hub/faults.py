"""Faults on demand: what a network and a busy Hub do to a request."""
import re
from dataclasses import dataclass, field

from .xet import flipped

KINDS = (
    'status',  # answer with a status code, headers and a body; nothing is done
    'cut',  # close the connection before anything is done
    'cut_after',  # do what was asked, then close the connection without an answer
    'cut_body',  # close the connection in the middle of the body
    'slow',  # pause in the middle of the body
    'corrupt',  # another byte in the body, of the same length
)


@dataclass
class Fault:
    """One fault, for the next ``times`` requests whose method and path match."""
    kind: str
    method: str
    path: str
    times: int = 1
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b'{"error": "on demand"}'
    seconds: float = 0.

    def __post_init__(self) -> None:
        assert self.kind in KINDS, self.kind

    def matches(self, method: str, path: str) -> bool:
        return self.times > 0 and method == self.method and re.search(self.path, path) is not None


def take(faults: list[Fault], method: str, path: str) -> Fault | None:
    """The fault that hits a request, if any."""
    for fault in faults:
        if fault.matches(method, path):
            fault.times -= 1
            return fault
    return None


def corrupted(body: bytes, is_xorb: bool) -> bytes:
    """One byte changed: the last one, which in a safetensors file belongs to a weight, or one of a xorb's data."""
    if is_xorb:
        return flipped(body)
    return body[:-1] + bytes([body[-1] ^ 0x40]) if body else body
