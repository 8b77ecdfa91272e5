"""Leases: one job at a time writes to an output. The second one waits and says for whom.

It waits, and is not refused: what it was started for is a whole output. When its turn comes it finds that there is
nothing left to do, or goes on where a killed job stopped, and nobody has to start it again.

On an object store a lease is an object. It is created where there is none (`If-None-Match: *`), its holder writes it
anew every `RENEW_S`, and when it is older than `STALE_S` another job takes it over (`If-Match`). One answer of the
store tells its time and the object's, so that clocks of hosts decide nothing. On a local disk, NFS included, a lease is
a lock of the kernel on a file: it ends with its process.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from rayseg import bucket, storage

logger = logging.getLogger(__name__)

RENEW_S = 10.0
STALE_S = 60.0
LOOK_S = 2.0  # between two tries of who waits
_TELL_S = 30.0  # between two lines about it
SUFFIX = ".lease"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class LostError(RuntimeError):
    """Another job has the lease, or somebody has removed it, while this one was paused or cut off."""


@dataclass(frozen=True)
class Holder:
    """A process that has a lease."""

    job: str
    host: str
    process: int
    since: str  # by its own clock: for people
    token: str  # of this lease alone

    def __str__(self) -> str:
        return f"the {self.job} job on {self.host}, process {self.process}, since {self.since}"


class Lease:
    """What `held` yields: asked before each step that removes or replaces something."""

    def __init__(self, uri: str, job: str) -> None:
        self.uri = uri
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.holder = Holder(job, socket.gethostname(), os.getpid(), now, secrets.token_hex(8))
        path = storage.filesystem(uri)[1]
        self._way: _Object | _Locked = _Object(path) if uri.startswith("s3://") else _Locked(Path(path))

    def wait(self) -> None:
        """Returns when the lease is this process's."""
        told_s = -_TELL_S  # when it was told last
        while (other := self._way.take(self.holder)) is not None:
            if time.monotonic() - told_s >= _TELL_S:
                told_s = time.monotonic()
                logger.info("%s: waits for %s, which has %s", self.holder.job, other, self.uri)
            time.sleep(LOOK_S)

    def check(self) -> None:
        """Raises LostError where the lease is another one's; asks the store."""
        if not self._way.keep():
            raise LostError(
                f"{self.holder.job}: another job has taken {self.uri} over, or somebody has removed it, while this "
                f"process was paused or cut off from the store for more than {STALE_S:.0f} s; nothing more is written. "
                "Start the job again"
            )

    def release(self) -> None:
        """Gives it up."""
        self._way.release()


@contextlib.contextmanager
def held(uri: str, job: str) -> Iterator[Lease]:
    """Within it no other process has the lease at `uri`; waits for that.

    Where a store takes no conditional writes, or a file system has no locks, it says so once and keeps nobody off.
    """
    lease = Lease(uri, job)
    lease.wait()
    try:
        yield lease
    finally:
        lease.release()


@contextlib.contextmanager
def reader(folder: str, job: str) -> Iterator[None]:
    """While it is open `living(folder)` tells of this process; says so where it cannot write there."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(held(storage.join(folder, f"{secrets.token_hex(8)}{SUFFIX}"), job))
        except OSError as error:
            why = type(error).__name__
            logger.warning("%s: it cannot write %s (%s): who replaces what it reads will not wait", job, folder, why)
        yield


def living(folder: str) -> list[Holder]:
    """Who has the leases right below `folder`; those of processes that have ended are removed."""
    if not folder.startswith("s3://"):
        paths = sorted(Path(storage.filesystem(folder)[1]).glob(f"*{SUFFIX}"))
        return [holder for path in paths if (holder := _Locked(path).other()) is not None]
    name, _, prefix = folder.removeprefix("s3://").partition("/")
    holders = []
    for entry in list(bucket.objects(name, f"{prefix.rstrip('/')}/")):
        with contextlib.suppress(FileNotFoundError):  # it has just ended
            current = bucket.version(f"{name}/{entry.key}")
            if current.age_s <= STALE_S:
                holders.append(_holder(current.data))
            else:
                bucket.delete(f"{name}/{entry.key}")
    return holders


@lru_cache
def _warn(why: str) -> None:
    logger.warning("%s: two jobs on one output are not kept apart there; start one at a time", why)


def _holder(data: bytes) -> Holder:
    """The holder that a lease tells, whose writer may be under way."""
    try:
        return Holder(**{name: json.loads(data)[name] for name in Holder.__dataclass_fields__})
    except (ValueError, KeyError):
        return Holder("another", "an unknown host", 0, "a moment ago", "")


class _Object:
    """On an object store."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._holder: Holder | None = None
        self._etag: str | None = None
        self._renewals = 0
        self._changing, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name="rayseg-lease", daemon=True)

    def take(self, holder: Holder) -> Holder | None:
        """Takes the lease; else who has it."""
        self._holder = holder
        try:
            if (other := self._taken()) is not None:
                return other
            assert self._etag is not None
            wrong = "0" * len(self._etag)
            if any(bucket.write_if(self._path, self._words(), etag) is not None for etag in (None, wrong)):
                bucket.delete(self._path)
                raise bucket.NoConditionsError("the store ignores the conditions of writes")
        except bucket.NoConditionsError as error:
            _warn(str(error))
            self._etag = None
            return None
        self._thread.start()
        return None

    def keep(self) -> bool:
        """Renews the lease; False where it is lost, from then on."""
        with self._changing:
            if self._etag is None:  # of a store that knows no leases, or lost
                return not self._ended.is_set()
            self._renewals += 1
            etag = bucket.write_if(self._path, self._words(), self._etag) or self._own()
            if etag is None:
                self._ended.set()
            self._etag = etag
            return etag is not None

    def release(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._etag is not None:
            try:
                bucket.delete_if(self._path, self._etag)
            except (OSError, bucket.NoConditionsError) as error:  # it ends by itself; a result must not be lost
                logger.warning("a lease was not given up, and ends after %.0f s: %s", STALE_S, type(error).__name__)

    def _taken(self) -> Holder | None:
        self._etag = bucket.write_if(self._path, self._words(), None) or self._own()
        if self._etag is None:
            try:
                current = bucket.version(self._path)
            except FileNotFoundError:  # given up between the two calls
                return self._taken()
            if current.age_s > STALE_S:
                self._etag = bucket.write_if(self._path, self._words(), current.etag) or self._own()
            if self._etag is None:
                return _holder(current.data)
        return None

    def _own(self) -> str | None:
        """The ETag of the object where this process wrote it: the answer to its write may have been lost."""
        assert self._holder is not None
        with contextlib.suppress(FileNotFoundError):
            current = bucket.version(self._path)
            if _holder(current.data).token == self._holder.token:
                return current.etag
        return None

    def _words(self) -> bytes:
        assert self._holder is not None
        # The number makes each renewal another content, and so another ETag.
        return json.dumps(asdict(self._holder) | {"renewals": self._renewals}).encode()

    def _beat(self) -> None:
        while not self._ended.wait(RENEW_S):
            try:
                if not self.keep():
                    logger.error("the lease is lost: the job stops before it changes anything")
            except Exception as error:  # the next beat tries again, and so does `keep` where it matters
                logger.warning("a lease was not renewed: %s", type(error).__name__)


class _Locked:
    """On a local disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def take(self, holder: Holder) -> Holder | None:
        """As of `_Object`."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                other = _holder(os.pread(descriptor, 4096, 0))
                os.close(descriptor)
                return other
            except OSError as error:
                os.close(descriptor)
                if error.errno not in _NO_LOCKS:
                    raise
                _warn("the file system has no locks")
                self._path.unlink(missing_ok=True)
                return None
            if self._stands(descriptor):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(asdict(holder)).encode(), 0)
                self._descriptor = descriptor
                return None
            os.close(descriptor)  # of a file that its holder has just removed

    def keep(self) -> bool:
        """False where the file was removed: then another process can have one of its own."""
        return self._descriptor is None or self._stands(self._descriptor)

    def release(self) -> None:
        if self._descriptor is not None:
            if self._stands(self._descriptor):
                self._path.unlink()
            os.close(self._descriptor)

    def other(self) -> Holder | None:
        """Who has it; what nobody has is removed."""
        try:
            descriptor = os.open(self._path, os.O_RDWR)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._stands(descriptor):
                self._path.unlink()
        except BlockingIOError:
            return _holder(os.pread(descriptor, 4096, 0))
        finally:
            os.close(descriptor)
        return None

    def _stands(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(self._path.stat(), os.fstat(descriptor))
        except FileNotFoundError:
            return False
