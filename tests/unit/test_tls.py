"""TLS of `jobs.serve`: real handshakes with its HTTP server, before an application that answers."""

import os
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from serving import front
from tests import certificates
from tests.certificates import Certificates

ROOT = Path(__file__).parents[2]
SERVER = """
import socket, sys
from types import SimpleNamespace
from serving import front

class Ingress:
    async def health(self):
        return SimpleNamespace(matches=True, model=SimpleNamespace(version="3"))
    def __serve_build_asgi_app__(self):
        async def application(scope, receive, send):
            if scope["type"] == "http":
                await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
                await send({"type": "http.response.body", "body": scope["scheme"][:2].encode()})
        return application

def ready(version):
    socket.create_connection(listener.getsockname()).close()  # whoever is told may come at once
    print(version, listener.getsockname()[1], flush=True)

listener = front.bound("127.0.0.1", 0)
front.run(Ingress(), listener, *sys.argv[1:], ready)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates.make(tmp_path_factory.mktemp("certificates"), "IP:127.0.0.1")


@pytest.fixture(scope="module")
def url(made: Certificates) -> Iterator[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "platform")])}
    command = [sys.executable, "-c", SERVER, str(made.key), str(made.certificate)]
    with subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        version, port = server.stdout.readline().split()
        assert version == "3"
        yield f"https://127.0.0.1:{port}"
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0


def trusting(authority: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(authority))


def test_who_trusts_its_authority_is_answered(url: str, made: Certificates) -> None:
    with httpx.Client(verify=trusting(made.authority)) as client:
        assert client.get(url).text == "ht"
    assert ssl.get_server_certificate(("127.0.0.1", int(url.rpartition(":")[2]))).startswith("-----BEGIN")


def test_who_trusts_another_hangs_up(url: str, tmp_path: Path) -> None:
    other = certificates.make(tmp_path, "IP:127.0.0.1")
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(url, verify=trusting(other.authority))


def test_nothing_is_said_in_the_clear(url: str) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(url.replace("https", "http"), timeout=5)


def test_a_key_of_another_certificate_is_told_before_anything_starts(made: Certificates, tmp_path: Path) -> None:
    other = certificates.make(tmp_path, "IP:127.0.0.1")
    front.check_certificate(str(made.key), str(made.certificate))
    with pytest.raises(ValueError, match="ssl_keyfile, ssl_certfile: no key with its certificate"):
        front.check_certificate(str(other.key), str(made.certificate))
    with pytest.raises(ValueError, match="ssl_keyfile, ssl_certfile"):
        front.check_certificate(str(tmp_path / "none.pem"), str(made.certificate))
