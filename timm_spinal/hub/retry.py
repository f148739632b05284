"""Calls to the Hub that go on after a passing fault, and end with one line after another one."""
import json
import time
from typing import Callable, TypeVar

from huggingface_hub.errors import HfHubHTTPError

from timm_spinal.errors import UserError
from timm_spinal.training.remote import chain, explain, is_transport, one_line

WAITS = (1., 2., 4., 8.)  # seconds before the second try and those after it
LONGEST_WAIT = 300.  # when the Hub asks for more, that is an error
PASSING = (408, 429, 500, 502, 503, 504)

T = TypeVar('T')
Say = Callable[[str], None]


def with_retries(action: Callable[[], T], what: str, say: Say, *, waits: tuple[float, ...] = WAITS) -> T:
    """Call an action that may be repeated, again after a passing fault of the Hub or the network.

    Args:
        action: The call; repeating it after it was done but not answered must do no harm.
        what: What it does, for messages.
        say: Gets a line for each repetition.
        waits: Seconds to wait before each repetition, where the Hub names none (Retry-After).

    Raises:
        UserError: The fault did not pass, or is one that does not.
    """
    for wait in (*waits, None):
        try:
            return action()
        except UserError:
            raise
        except Exception as e:
            pause = _pause(e, wait)
            if pause is None:
                raise UserError(f'{what}: {explain(e) or one_line(e)}') from e
            say(f'{what}: {_reason(e)}; trying again in {pause:g} s')
            time.sleep(pause)
    raise AssertionError('the last try returns or raises')


def _pause(error: Exception, wait: float | None) -> float | None:
    """Seconds to wait before the next try; None when there is none."""
    if wait is None:
        return None
    for cause in chain(error):
        if isinstance(cause, HfHubHTTPError):
            asked = cause.response.headers.get('Retry-After', '')
            seconds = float(asked) if asked.isdigit() else wait
            return seconds if cause.response.status_code in PASSING and seconds <= LONGEST_WAIT else None
        if is_transport(cause) or isinstance(cause, json.JSONDecodeError):  # a proxy's page in place of an answer
            return wait
    return None


def _reason(error: Exception) -> str:
    for cause in chain(error):
        if isinstance(cause, HfHubHTTPError):
            return f'status {cause.response.status_code}'
    return one_line(list(chain(error))[-1], 100)
