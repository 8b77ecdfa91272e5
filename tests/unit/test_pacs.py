"""What DICOMweb services answer, as a server of a few lines does: stored, refused, busy, cut off, a page at a time."""

import json
import logging
import ssl
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, urlsplit

import pytest

from rayseg import pacs, retry, storage
from rayseg.data.catalog import CatalogConfig
from rayseg.data.layouts import Layout
from rayseg.inference.archive import SegmentConfig
from rayseg.inference.delivery import deliver
from rayseg.inference.outputs import File
from rayseg.records import Reason, Reject

INSTANCE = "studies/1.2.840.1/series/1.2.840.2/instances/1.2.840.3"
UID = "2.25.17"


@dataclass
class Answer:
    code: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: int = 0  # bytes that never come


@dataclass
class Service:
    """A server whose next answers are given, or made by `respond` of a path with its query."""

    url: str
    answers: list[Answer] = field(default_factory=list)
    respond: Callable[[str], Answer] | None = None
    asked: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)  # method, path, headers, body

    @property
    def uri(self) -> str:
        return f"dicomweb+{self.url}"


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setattr(retry, "sleep", lambda pause: None)
    for name in ("USER", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"RAYSEG_DICOMWEB_{name}", raising=False)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            made.asked.append((self.command, self.path, dict(self.headers), body))
            answer = made.respond(self.path) if made.respond else made.answers.pop(0)
            self.send_response(answer.code)
            for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.body[: len(answer.body) - answer.cut])
            self.close_connection = bool(answer.cut)

        do_POST = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        made = Service(f"http://127.0.0.1:{server.server_address[1]}/dicom-web")
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield made
        server.shutdown()


def stored(code: int = 200, reason: int | None = None, uid: str = UID) -> Answer:
    """An answer of STOW-RS in the DICOM JSON model (PS3.18 F, I.2)."""
    item = {"00081155": {"vr": "UI", "Value": [uid]}}
    if reason is None:
        told = {"00081199": {"vr": "SQ", "Value": [item]}}
    else:
        told = {"00081198": {"vr": "SQ", "Value": [item | {"00081197": {"vr": "US", "Value": [reason]}}]}}
    return Answer(code, json.dumps(told).encode(), {"Content-Type": "application/dicom+json; charset=utf-8"})


def part(data: bytes, cut: int = 0) -> Answer:
    body = b'\r\n--"b\r\nContent-Type: application/dicom\r\n\r\n' + data + b'\r\n--"b--\r\n'
    return Answer(200, body, {"Content-Type": 'multipart/related; type="application/dicom"; boundary="\\"b"'}, cut)


@pytest.mark.parametrize(
    "answers",
    [
        [stored()],
        [stored(202)],  # with a warning, as that elements were coerced
        [Answer(200)],  # nothing told
        [stored(409, 0x0111)],  # a duplicate: of ours, so the same
        [Answer(503), Answer(429), stored()],
        [stored(409, 0xA700), stored()],  # out of resources
    ],
)
def test_what_is_stored(service: Service, answers: list[Answer]) -> None:
    data = b"DICM\r\n--\x00\xff" * 100
    service.answers = list(answers)
    assert pacs.store(service.url, UID, data) == f"{service.url}/instances?SOPInstanceUID={UID}"
    assert len(service.asked) == len(answers)
    method, path, headers, body = service.asked[-1]
    assert (method, path) == ("POST", "/dicom-web/studies")
    message = BytesParser().parsebytes(b"Content-Type: " + headers["Content-Type"].encode() + b"\r\n\r\n" + body)
    assert (message.get_content_type(), message.get_param("type")) == ("multipart/related", "application/dicom")
    [sent] = message.get_payload()
    assert sent.get_content_type() == "application/dicom"
    assert data in body


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (stored(409, 0xA900), "HTTP 409, FailureReason 0xA900"),
        (stored(202, 0x0122), "HTTP 202, FailureReason 0x0122"),
        (stored(200, 0xC000), "HTTP 200, FailureReason 0xC000"),
        (stored(200, uid="1.2"), "HTTP 200"),  # something else was stored
        (Answer(409, b"<NativeDicomModel/>"), "HTTP 409"),
        (Answer(202, b"accepted"), "HTTP 202"),
        (Answer(400), "HTTP 400"),
        (Answer(301, headers={"Location": "/elsewhere"}), "HTTP 301"),  # a GET would follow, and nothing be stored
    ],
)
def test_what_is_refused_is_not_tried_again(service: Service, answer: Answer, told: str) -> None:
    service.answers = [answer]
    with pytest.raises(PermissionError, match=rf"{told}$"):
        pacs.store(service.url, UID, b"data")
    assert len(service.asked) == 1


def test_refused_credentials_are_no_fault_of_an_instance(service: Service) -> None:
    service.respond = lambda path: Answer(401)
    told = r"^HTTP 401: the credentials are refused: renew them .*RAYSEG_DICOMWEB_\*"
    for call in (
        lambda: list(storage.read_each([f"{service.uri}/{INSTANCE}"] * 100)),
        lambda: pacs.store(service.url, UID, b"data"),
        lambda: list(pacs.instances(service.uri)),
    ):
        service.asked.clear()
        with pytest.raises(retry.CredentialsError, match=told):
            call()
        assert len(service.asked) <= 3 * storage.THREADS


def test_a_file_is_whole_on_the_store_before_the_pacs_has_it(service: Service, tmp_path: Path) -> None:
    import pydicom

    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = pydicom.uid.SegmentationStorage, UID
    dataset.save_as(tmp_path / "made", enforce_file_format=True)
    file = File("seg", "k.dcm", (tmp_path / "made").read_bytes())
    there: list[bool] = []

    def respond(path: str) -> Answer:
        there.append((tmp_path / "out" / "k.dcm").read_bytes() == file.data)
        return stored(409, 0xA701)

    service.respond = respond
    refused = deliver(file, str(tmp_path / "out"), service.url)
    assert refused == Reject(Reason.WRITE_FAILED, "seg: PACS: not stored: HTTP 409, FailureReason 0xA701")
    assert there == [True] * retry.ATTEMPTS
    service.respond = lambda path: stored()
    row = deliver(file, str(tmp_path / "out"), service.url)
    assert isinstance(row, dict)
    assert row["pacs"] == f"{service.url}/instances?SOPInstanceUID={UID}"
    asked = len(service.asked)
    mesh = deliver(File("stl", "k.stl", b"solid"), str(tmp_path / "out"), service.url)
    assert isinstance(mesh, dict)
    assert (mesh["pacs"], len(service.asked)) == (None, asked)


def test_an_instance_that_comes_cut_off_is_asked_for_again(service: Service) -> None:
    data = bytes(range(256)) * 50 + b"\r\n"
    lacking = part(data)
    lacking.body = lacking.body[:-500]  # in an answer of the right length
    service.answers = [part(data, cut=1000), lacking, Answer(500), part(data)]
    assert storage.read(f"{service.uri}/{INSTANCE}") == data
    method, path, headers, _ = service.asked[-1]
    assert (method, path) == ("GET", f"/dicom-web/{INSTANCE}")
    assert headers["Accept"] == 'multipart/related; type="application/dicom"; transfer-syntax=*'
    service.answers = [Answer(200, data, {"Content-Type": "application/dicom"}), part(data)]
    assert storage.read(f"{service.uri}/{INSTANCE}") == data
    assert storage.read(f"{service.uri}/{INSTANCE}", 100) == data[:100]


@pytest.mark.parametrize(
    ("code", "kind", "requests"),
    [(404, FileNotFoundError, 1), (403, PermissionError, 1), (406, PermissionError, 1), (502, OSError, retry.ATTEMPTS)],
)
def test_no_error_and_no_log_line_has_a_uid(
    service: Service, code: int, kind: type[OSError], requests: int, caplog: pytest.LogCaptureFixture
) -> None:
    service.respond = lambda path: Answer(code, headers={"no colon": ""} if code == 502 else {})
    with caplog.at_level(logging.DEBUG):
        (error,) = storage.read_each([f"{service.uri}/{INSTANCE}"])
    assert type(error) is kind
    assert str(error) == f"HTTP {code}"
    assert error.__cause__ is None
    assert len(service.asked) == requests
    assert "1.2.840" not in caplog.text


def test_a_service_that_is_not_there(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), pytest.raises(OSError, match=r"^ConnectionError$") as caught:
        pacs.read(f"dicomweb+http://127.0.0.1:9/{INSTANCE}")
    assert caught.value.__suppress_context__
    assert "1.2.840" not in caplog.text


def paged(kind: str, found: list[str], limit: int, offset: int) -> list[str] | None:
    """The page that a service of this kind gives; None where it refuses."""
    if kind == "at most three":
        return found[offset:][: min(limit, 3)]
    if kind == "refuses more than one":
        return None if limit > 1 else found[offset:][:limit]
    if kind == "refuses more than two, with 413":
        return None if limit > 2 else found[offset:][:limit]
    if kind == "limit from the start":
        return found[:limit][offset:]
    if kind == "pages of two":  # it makes the number of a page of an offset and the limit
        size = min(limit, 2)
        return found[offset // limit * size :][:size]
    if kind == "pages of any size":
        return found[offset:][: min(limit, 1 + offset * 7 % 3)]
    if kind == "overlapping pages":
        return found[max(0, offset - 1) :][:limit]
    if kind == "last page again":
        return found[min(offset, max(0, len(found) - 1) // limit * limit) :][:limit]
    if kind == "no page there":
        return found[offset:][:limit] if offset < len(found) or not offset else []
    return found[offset:][:limit]


KINDS = (
    *("as asked", "at most three", "limit from the start", "refuses more than one", "refuses more than two, with 413"),
    *("pages of two", "pages of any size", "overlapping pages", "last page again", "no page there"),
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("studies", [0, 1, 3, 4, 5, 8, 9])
def test_studies_are_listed_whole_whatever_a_page_is(
    service: Service, kind: str, studies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "last page again" and studies == 4:
        pytest.skip("a whole page, and the same again: nobody can tell this from a service that knows no offset")
    monkeypatch.setattr(pacs, "PAGE", 4)
    everything = [f"1.2.{number}" for number in range(studies)]

    def respond(path: str) -> Answer:
        url = urlsplit(path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        limit, offset = int(query.pop("limit")), int(query.pop("offset"))
        level = url.path.rpartition("/")[2]
        assert query == {
            "studies": {"ModalitiesInStudy": "CT", "StudyDate": "20200101-"},
            "series": {"Modality": "CT"},
        }.get(level, {})
        tag, found = {"studies": ("0020000D", everything), "series": ("0020000E", ["9", "7"])}.get(
            level, ("00080018", ["5"])
        )
        some = paged(kind, found, limit, offset)
        if some is None:
            return Answer(413 if "413" in kind else 400)
        if not some:
            return Answer(404 if kind == "no page there" and offset else 204)
        return Answer(200, json.dumps([{tag: {"vr": "UI", "Value": [uid]}} for uid in some]).encode())

    service.respond = respond
    query = "?ModalitiesInStudy=CT&StudyDate=20200101-&Modality=CT"
    expected = [f"{service.uri}/studies/{s}/series/{k}/instances/5" for s in everything for k in ("7", "9")]
    assert list(pacs.instances(service.uri + query)) == expected


def test_a_service_without_paging_gives_all_at_once_or_is_refused(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    body = json.dumps([{"0020000D": {"Value": [f"1.2.{number}"]}} for number in range(3)]).encode()
    service.respond = lambda path: Answer(200, body)
    pacs._warn_of_offset.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert list(pacs._search(f"{service.url}/studies", [], "0020000D")) == ["1.2.0", "1.2.1", "1.2.2"]
    assert caplog.text.count("knows no offset") == 1
    # It says that there are more, and gives them to nobody.
    service.respond = lambda path: Answer(200, body, {"Warning": '299 service "There are more results"'})
    with pytest.raises(ValueError, match="no offset of QIDO-RS"):
        list(pacs._search(f"{service.url}/studies", [], "0020000D"))
    service.respond = lambda path: Answer(400)
    with pytest.raises(PermissionError, match="refuses the search"):
        list(pacs._search(f"{service.url}/studies", [], "0020000D"))
    assert [urlsplit(path).query for _, path, _, _ in service.asked[-5:]] == [
        f"limit={limit}&offset=0" for limit in (1000, 200, 40, 8, 1)
    ]


def test_what_cannot_be_listed_is_said(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacs, "PAGE", 1)
    service.respond = lambda path: Answer(200, b'[{"0020000D": {"vr": "UI", "Value": ["1.2"]}}]')
    with pytest.raises(ValueError, match="no offset of QIDO-RS"):
        list(pacs._search(f"{service.url}/studies", [], "0020000D"))
    for body in (b"<html>", b'{"error": 1}', b'[{"0020000D": {"vr": "UI"}}]'):
        service.respond = lambda path, body=body: Answer(200, body)
        with pytest.raises(ValueError, match="no list of UIDs"):
            list(pacs.instances(service.uri))
    with pytest.raises(ValueError, match="limit and offset"):
        list(pacs.instances(f"{service.uri}?limit=5"))
    with pytest.raises(ValueError, match=r"catalog\.layout"):
        CatalogConfig(service.uri, "manifest", Layout(images="ct"))


def test_credentials_come_from_the_environment_and_may_change(
    service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    service.respond = lambda path: part(b"data")

    def sent() -> str | None:
        pacs.read(f"{service.uri}/{INSTANCE}")
        return service.asked[-1][2].get("Authorization")

    (tmp_path / "netrc").write_text("machine 127.0.0.1 login other password other")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert sent() is None
    monkeypatch.setenv("RAYSEG_DICOMWEB_USER", "Aladdin")
    monkeypatch.setenv("RAYSEG_DICOMWEB_PASSWORD", "open sesame")
    assert sent() == "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="  # RFC 7617
    monkeypatch.setenv("RAYSEG_DICOMWEB_TOKEN", "first")
    assert sent() == "Bearer first"
    monkeypatch.setenv("RAYSEG_DICOMWEB_TOKEN_FILE", str(tmp_path / "token"))
    with pytest.raises(PermissionError, match=r"RAYSEG_DICOMWEB_TOKEN_FILE .* \(FileNotFoundError\)"):
        sent()
    for token in ("second", "third"):
        (tmp_path / "token").write_text(f"{token}\n")
        assert sent() == f"Bearer {token}"
    (tmp_path / "token").write_text("a\nsecret")
    with pytest.raises(PermissionError, match=r"TOKEN is no token: a line of ASCII expected$"):
        sent()


@pytest.mark.parametrize(
    "url", ["https://user:secret@pacs/dicom-web", "pacs/dicom-web", "https:///dicom-web", "ftp://p/"]
)
def test_other_urls_are_refused_without_repeating_secrets(url: str) -> None:
    for call in (lambda: pacs.service(url), lambda: SegmentConfig("m", "u", "t", "o", pacs=url)):
        with pytest.raises(ValueError, match="URL") as caught:
            call()
        assert "secret" not in str(caught.value)
    with pytest.raises(ValueError, match=r"segment\.pacs: none of the profiles"):
        SegmentConfig("m", "u", "t", "o", profiles=("nifti",), pacs="https://pacs/dicom-web")
    with pytest.raises(ValueError, match=r"segment\.pacs"):
        SegmentConfig("m", "u", "t", "o", pacs="https://pacs/dicom-web?PatientID=1")


def test_a_certificate_that_nobody_knows_is_refused_at_once(
    service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-keyout", key, "-out", certificate, "-subj", "/CN=here", "-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        check=True,
        capture_output=True,
    )

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = part(b"data")
            self.send_response(200)
            self.send_header("Content-Type", answer.headers["Content-Type"])
            self.end_headers()
            self.wfile.write(answer.body)

        def log_message(self, *arguments: object) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *arguments: None  # type: ignore[method-assign]
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        uri = f"dicomweb+https://127.0.0.1:{server.server_address[1]}/{INSTANCE}"
        monkeypatch.setattr(retry, "sleep", lambda pause: pytest.fail("tried again"))
        with pytest.raises(PermissionError, match=r"^SSLError$"):
            pacs.read(uri)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        assert pacs.read(uri) == b"data"
        server.shutdown()
