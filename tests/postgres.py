"""A PostgreSQL server of one's own on the loopback interface."""

import contextlib
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from tests.ports import free_port

READY_LIMIT_S = 60


def programs() -> Path | None:
    """The folder of the server's programs, None where it is not installed; Debian keeps them out of the PATH."""
    found = shutil.which("initdb", path=os.pathsep.join(map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin")))))
    found = found or shutil.which("initdb")
    return None if found is None else Path(found).resolve().parent


@contextmanager
def postgres() -> Iterator[tuple[str, dict[str, str]]]:
    """Yields the URI of an empty database, without the password, and the environment that gives it."""
    folder = programs()
    assert folder is not None, "not installed"
    # It refuses to run as root, and then nobody else may enter the tests' own folders.
    owner = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}
    home = Path(tempfile.mkdtemp(prefix="rayseg-postgres-"))
    password, data = secrets.token_hex(16), home / "data"
    port = free_port()
    (home / "password").write_text(password)
    (home / "pgpass").write_text(f"127.0.0.1:{port}:*:mlflow:{password}\n")
    (home / "pgpass").chmod(0o600)
    if owner:
        shutil.chown(home, "postgres", "postgres")
        shutil.chown(home / "password", "postgres", "postgres")
    made = ["-D", data, "-U", "mlflow", "-A", "scram-sha-256", "--pwfile", home / "password", "-E", "UTF8", "--no-sync"]
    subprocess.run([folder / "initdb", *made], cwd=home, check=True, capture_output=True, **owner)  # type: ignore[call-overload]
    settings = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": "", "fsync": "off"}
    options = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
    with (home / "log").open("wb") as log:
        server = subprocess.Popen(
            [folder / "postgres", "-D", data, *options],
            cwd=home,
            stdout=log,
            stderr=log,
            **owner,  # type: ignore[call-overload]
        )
    try:
        environment = {"PGPASSFILE": str(home / "pgpass")}
        deadline = time.monotonic() + READY_LIMIT_S
        while True:
            assert server.poll() is None, (home / "log").read_text()
            assert time.monotonic() < deadline, "not ready"
            with contextlib.suppress(psycopg.OperationalError):
                psycopg.connect(f"postgresql://mlflow:{password}@127.0.0.1:{port}/postgres", connect_timeout=5).close()
                break
        yield f"postgresql+psycopg://mlflow@127.0.0.1:{port}/postgres", environment
    finally:
        server.terminate()
        server.wait(30)
        shutil.rmtree(home)
