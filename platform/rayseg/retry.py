"""Calls of stores and services that fail: tried again, except where another try cannot help."""

import logging
import random
from collections.abc import Callable
from time import sleep
from typing import TypeVar

logger = logging.getLogger(__name__)

# A read from S3 is two requests, of the size and of the bytes: where one in ten fails, one read in 600,000 does so this
# often.
ATTEMPTS = 8
FIRST_PAUSE_S = 0.2  # doubled after each failure, with jitter
LONGEST_PAUSE_S = 16.0

ResultT = TypeVar("ResultT")

# What these say stays so however often it is asked; pyarrow gives an OSError with the store's error name in its text.
_FINAL = (FileExistsError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_FORBIDDEN = ("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "HTTP status 403")
_JITTER = random.SystemRandom()


def tried(call: Callable[[], ResultT]) -> ResultT:
    """What `call` returns, made `ATTEMPTS` times as long as it raises an OSError.

    What is missing or forbidden is reported at once, as FileNotFoundError or PermissionError.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except _FINAL:
            raise
        except OSError as error:
            refusals = [name for name in _FORBIDDEN if name in str(error)]
            if refusals:
                raise PermissionError(f"the object store refuses access ({refusals[0]})") from error
            if attempt == ATTEMPTS:
                raise
            # The text may name an object, and its name a patient: only the type is logged.
            logger.warning("storage call failed (%s), attempt %d of %d", type(error).__name__, attempt, ATTEMPTS)
            sleep(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (attempt - 1)) * _JITTER.uniform(0.5, 1.5))
    raise AssertionError("the loop returns or raises")
