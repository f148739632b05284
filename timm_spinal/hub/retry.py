"""Calls to the Hub that go on after a passing fault, and end with one line after another one."""
import json
import re
import time
from typing import Callable, TypeVar

from timm_spinal.errors import UserError
from timm_spinal.models.hub_errors import answer_of, chain, explain, is_transport, one_line, xet_text

WAITS = (1., 2., 4., 8.)  # seconds before the second try and those after it
LONGEST_WAIT = 300.  # when the Hub asks for more, that is an error
PASSING = (408, 429, 500, 502, 503, 504)
EXPIRED = (401, 403)  # from the storage of large files, whose links hold for some minutes; the next try gets new ones

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
                raise UserError(f'{what}: {explain(e) or _odd_answer(e)}') from e
            say(f'{what}: {_reason(e)}; trying again in {pause:g} s')
            time.sleep(pause)
    raise AssertionError('the last try returns or raises')


def _pause(error: Exception, wait: float | None) -> float | None:
    """Seconds to wait before the next try; None when there is none."""
    if wait is None:
        return None
    for cause in chain(error):
        if answer := answer_of(cause):
            if answer.of_storage and answer.status in EXPIRED:
                return wait
            if answer.by_xet:  # hf_xet has tried again by itself, for minutes
                return None
            asked = cause.response.headers.get('Retry-After', '')  # type: ignore[attr-defined]
            seconds = float(asked) if asked.isdigit() else wait
            return seconds if answer.status in PASSING and seconds <= LONGEST_WAIT else None
        if isinstance(cause, json.JSONDecodeError):  # a proxy's page in place of an answer
            return wait
        if is_transport(cause):
            return None if xet_text(cause) else wait
    return None


def _reason(error: Exception) -> str:
    for cause in chain(error):
        if answer := answer_of(cause):
            return f'status {answer.status}'
    return one_line(list(chain(error))[-1], 100)


def _odd_answer(error: Exception) -> str:
    """What came where huggingface_hub's client expects another answer."""
    if isinstance(error, json.JSONDecodeError):
        title = re.search(r'<title[^>]*>(.*?)</title>', error.doc, re.DOTALL | re.IGNORECASE)
        came = f'the page {one_line(title[1], 60)!r}' if title else repr(one_line(error.doc, 60))
        return f'{came} came instead of an answer of the Hub; a proxy or a login page may be in between'
    if isinstance(error, (KeyError, IndexError, TypeError, AttributeError)):
        return f'the Hub gave an answer that its client cannot read ({type(error).__name__}: {one_line(error)})'
    return one_line(error)
