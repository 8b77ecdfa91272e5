"""Orthanc with DICOMweb in a network namespace of its own, as it listens on all addresses whatever it is told.

What comes in on a port of the loopback interface goes through a Unix socket, which knows no namespaces, to the server.
This file is also the program that runs inside: python orthanc.py FOLDER.
"""

import contextlib
import json
import os
import secrets
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests

READY_LIMIT_S = 30
HTTP_PORT = 8042  # inside
PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
USER, PASSWORD = "RAYSEG_DICOMWEB_USER", "RAYSEG_DICOMWEB_PASSWORD"
_NAMESPACE = ["unshare", "--net", "--pid", "--fork", "--kill-child=KILL", *([] if os.getuid() == 0 else ["-r"])]


def missing() -> str | None:
    """Why it cannot run here; None where it can."""
    if shutil.which("Orthanc", path=f"/usr/sbin{os.pathsep}{os.environ['PATH']}") is None or not PLUGIN.exists():
        return "Orthanc with DICOMweb (orthanc, orthanc-dicomweb) is not installed"
    if subprocess.run([*_NAMESPACE, "true"], capture_output=True, check=False).returncode:
        return "network namespaces cannot be made here"
    return None


@contextmanager
def orthanc(folder: Path) -> Iterator[str]:
    """Yields the URL of the server's root, with an empty store; user and password are those of the environment."""
    settings = {
        "StorageDirectory": str(folder / "store"),
        "IndexDirectory": str(folder / "store"),
        "Plugins": [str(PLUGIN)],
        "HttpPort": HTTP_PORT,
        "DicomServerEnabled": False,
        "RemoteAccessAllowed": True,
        "AuthenticationEnabled": True,
        "RegisteredUsers": {os.environ[USER]: os.environ[PASSWORD]},
        "ExecuteLuaEnabled": True,
        "LimitFindResults": 0,
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/", "StowMaxInstances": 10},
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    # The path of a socket is short.
    inside = Path("/tmp") / f"rayseg-{secrets.token_hex(8)}"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*_NAMESPACE, sys.executable, __file__, folder / "orthanc.json", inside], stdout=log, stderr=log
        )
    try:
        with _forwarded(("127.0.0.1", 0), lambda: _unix(inside)) as port:
            url = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + READY_LIMIT_S
            while True:
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, f"not ready: {(folder / 'log').read_text()}"
                with contextlib.suppress(requests.ConnectionError):
                    requests.get(f"{url}/system", auth=(os.environ[USER], os.environ[PASSWORD]), timeout=5)
                    break
            yield url
    finally:
        process.kill()
        process.wait(30)
        inside.unlink(missing_ok=True)


def _unix(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))
    return connection


@contextmanager
def _forwarded(address, connect) -> Iterator[int]:
    """Forwards what connects to the address, a host and port or a path, to what `connect` gives; yields the port."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError), connect() as other:
                back = threading.Thread(target=_pump, args=(other, self.request), daemon=True)
                back.start()
                _pump(self.request, other)
                back.join()

    kind = socketserver.ThreadingUnixStreamServer if isinstance(address, str) else socketserver.ThreadingTCPServer
    with kind(address, Handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield server.server_address[1] if isinstance(server.server_address, tuple) else 0
        finally:
            server.shutdown()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(2**16):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def _inside(settings: str, path: str) -> None:
    """Runs the server and forwards what comes by the Unix socket."""
    subprocess.run(["/sbin/ip", "link", "set", "lo", "up"], check=True)
    server = subprocess.Popen(["/usr/sbin/Orthanc", settings])
    with _forwarded(path, lambda: socket.create_connection(("127.0.0.1", HTTP_PORT))):
        sys.exit(server.wait())


if __name__ == "__main__":
    _inside(*sys.argv[1:])
