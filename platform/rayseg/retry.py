"""Calls of stores and services that fail: tried again, except where another try cannot help. One table says which."""

import errno
import logging
import random
import re
from collections.abc import Callable
from time import sleep
from typing import TypeVar

logger = logging.getLogger(__name__)

ATTEMPTS = 8  # where one request in ten fails, one read in a hundred million does so this often
FIRST_PAUSE_S = 0.2  # doubled after each failure, with jitter
LONGEST_PAUSE_S = 16.0

ResultT = TypeVar("ResultT")


class CredentialsError(Exception):
    """A store or a service refuses the credentials of this process, whatever is asked for: a run ends.

    It is no OSError: that is about one object, and makes a reject of it.
    """


# What the code of an answer means. Codes are HTTP's numbers, and S3's names without case and underscores: boto3 has
# ExpiredToken, pyarrow EXPIRED_TOKEN. An OSError is tried again; so is what is not in the table.
_MEANINGS: dict[str, type[Exception]] = {
    **dict.fromkeys(("accessdenied", *map(str, range(300, 500))), PermissionError),
    **dict.fromkeys(("nosuchbucket", "nosuchkey", "404", "410"), FileNotFoundError),
    **dict.fromkeys(
        ("expiredtoken", "expiredtokenexception", "requestexpired", "tokenrefreshrequired"), CredentialsError
    ),
    **dict.fromkeys(
        ("invalidaccesskeyid", "invalidclienttokenid", "unrecognizedclient", "invalidtoken"), CredentialsError
    ),
    **dict.fromkeys(("signaturedoesnotmatch", "missingauthenticationtoken", "401"), CredentialsError),
    "requesttimetooskewed": CredentialsError,  # this machine's clock is wrong, and every signature with it
    **dict.fromkeys(("requesttimeout", "incompletebody", "baddigest", "operationaborted"), OSError),  # 4xx all the same
    **dict.fromkeys(("408", "425", "429"), OSError),
}
_FINAL = (FileExistsError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_FINAL_NUMBERS = {errno.ELOOP, errno.ENAMETOOLONG, errno.EROFS}
_IN_TEXT = re.compile(r"AWS Error (\w+)|code: (\w+)|HTTP status (\d+)|<Code>(\w+)")  # of pyarrow's errors; deltalake's
_JITTER = random.SystemRandom()


def failure(doing: str, *codes: str | int) -> Exception:
    """The error that an answer with these codes is: the first that the table has decides; none of its words are in it.

    `doing` stands before the code in the error's text.
    """
    known = [code for code in codes if _spelled(code) in _MEANINGS]
    kind = _MEANINGS[_spelled(known[0])] if known else OSError
    return refused_credentials(f"{doing} {known[0]}") if kind is CredentialsError else kind(f"{doing} {codes[0]}")


def refused_credentials(what: str) -> CredentialsError:
    """The error that ends a run, with what to do."""
    clock = "requesttimetooskewed" in _spelled(what)
    cure = "set this machine's clock" if clock else "renew them (a store's: AWS_*; a PACS': RAYSEG_DICOMWEB_*)"
    return CredentialsError(f"{what}: the credentials are refused: {cure} and start the job again")


def said_of_credentials(error: BaseException) -> str | None:
    """The text of a CredentialsError, which Ray gives, of a task, as text within text; None of another error."""
    texts = re.findall(rf"^\S*{CredentialsError.__name__}: (.+)$", str(error), re.MULTILINE)
    if texts:
        return str(texts[-1])
    return str(error) if isinstance(error, CredentialsError) else None


def meant(error: OSError) -> Exception:
    """The error that one of a library is, by the codes in its text; itself where that has none."""
    codes = [code for names in _IN_TEXT.findall(str(error)) for code in names if code]
    return failure("the object store says", *codes) if codes else error


def tried(call: Callable[[], ResultT]) -> ResultT:
    """What `call` returns, made `ATTEMPTS` times as long as it raises an OSError that may pass.

    What is missing or forbidden is reported at once, as FileNotFoundError or PermissionError, and credentials that are
    refused as CredentialsError.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except _FINAL:
            raise
        except OSError as error:
            known = meant(error)
            if type(known) not in (OSError, type(error)):
                raise known from error
            if attempt == ATTEMPTS or error.errno in _FINAL_NUMBERS:
                raise
            # The text may name an object, and its name a patient: only the type is logged.
            logger.warning("storage call failed (%s), attempt %d of %d", type(error).__name__, attempt, ATTEMPTS)
            sleep(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (attempt - 1)) * _JITTER.uniform(0.5, 1.5))
    raise AssertionError("the loop returns or raises")


def _spelled(code: str | int) -> str:
    return str(code).replace("_", "").lower()
