"""A storage that fails for a while: which of its errors may pass by themselves, and for how long they are waited for."""

import errno
import logging
import re
from collections.abc import Callable

import pyarrow as pa
from safetensors import SafetensorError
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_exponential

from burnish.errors import InfrastructureError, one_line

RETRY_SECONDS = 300.0
"""How long what must reach the storage, or come from it, is tried again."""
MOST_WAIT_SECONDS = 15.0
"""How long one attempt waits for the next at most."""
_FINAL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
"""Answers of a storage that waiting does not change."""

logger = logging.getLogger(__name__)


def attempts(what: str, alive: Callable[[], None] | None = None) -> Retrying:
    """Attempts at what a storage may refuse for a while; the last error is raised.

    `what` is said of each that failed, and `alive` is called then, so that nobody takes the wait for a hang.
    """

    def say(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        logger.warning("%s yet, trying again: %s", what, one_line(error) if error else "")
        if alive is not None:
            alive()

    return Retrying(
        retry=retry_if_exception(may_pass),
        wait=wait_exponential(multiplier=0.5, max=MOST_WAIT_SECONDS),
        stop=stop_after_delay(RETRY_SECONDS),
        before_sleep=say,
        reraise=True,
    )


def may_pass(error: BaseException) -> bool:
    """Whether a storage that failed so may work again by itself."""
    if isinstance(error, InfrastructureError | pa.ArrowException):
        return True
    if isinstance(error, SafetensorError):
        found = re.search(r"os error (\d+)", str(error))
        return found is not None and int(found[1]) not in _FINAL
    return isinstance(error, OSError) and error.errno not in _FINAL
