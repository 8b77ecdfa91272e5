"""Tokens, limits, headers, the audit log and figures, in front of the real routes."""

import asyncio
import hashlib
import json
import logging
import re
from collections.abc import AsyncIterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pydicom
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.responses import JSONResponse

from rayseg.data.synthetic import slice_bytes
from rayseg.dicom import pseudonyms
from rayseg.tracking.registry import ModelVersion
from serving import app as application
from serving import audit, auth, front
from serving.app import ServeConfig
from serving.limits import Limits
from tests.unit.guarded import MAX_BODY, asked, get, post, service

DICOM = {"content-type": "application/dicom"}


def line(name: str, role: str, token: str) -> str:
    return f"{name}:{role}:{hashlib.sha256(token.encode()).hexdigest()}"


def tokens(*lines: str) -> tuple[auth.Token, ...]:
    return auth.from_environment({auth.VALUE: "\n".join(lines)})


KNOWN = tokens(line("ward", "read", "r-token"), line("lab", "submit", "s-token"), line("it", "admin", "a-token"))


def bearing(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def test_tokens_come_from_a_file_before_the_variable(tmp_path: Path):
    path = tmp_path / "tokens"
    path.write_text(f"# the ward\n\n{line('ward', 'read', 'x')}  # until May\n")
    found = auth.from_environment({auth.FILE: str(path), auth.VALUE: line("lab", "admin", "y")})
    assert [(token.name, token.role) for token in found] == [("ward", "read")]
    assert auth.from_environment({}) == ()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("ward:read:SECRET-in-the-clear", "line 1: expected name:role:sha256"),
        (line("ward", "root", "SECRET"), "line 1: expected"),
        (line("Ward One", "read", "SECRET"), "line 1: expected"),
        (line("a", "read", "x") + "\n" + line("b", "read", "x"), "line 2: this hash stands above"),
        ("# nobody", "no token"),
    ],
)
def test_wrong_lines_are_told_without_what_stands_in_them(text: str, told: str):
    with pytest.raises(ValueError, match=told) as caught:
        tokens(text)
    assert "SECRET" not in str(caught.value)


def test_the_documented_shell_line_makes_a_line_that_is_understood():
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "tokens.md").read_text()
    assert "printf %s \"$TOKEN\" | sha256sum | cut -d' ' -f1" in page
    # SHA-256 of "abc": FIPS 180-2, appendix B.1
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (token,) = auth.from_environment({auth.VALUE: f"alice:submit:{known}"})
    assert auth.bearer([token], "Bearer abc") == token


@pytest.mark.parametrize(
    ("method", "path", "token", "status"),
    [
        ("GET", "/", None, 200),
        ("GET", "/healthz", None, 200),
        ("GET", "/readyz", None, 200),
        ("GET", "/docs", None, 200),
        ("GET", "/openapi.json", None, 200),
        ("POST", "/healthz", None, 401),
        ("GET", "/v1/model", None, 401),
        ("GET", "/v1/model", "wrong", 401),
        ("GET", "/v1/model", "r-token", 200),
        ("GET", "/nowhere", None, 401),  # what there is, is no stranger's business
        ("GET", "/nowhere", "r-token", 404),
        ("GET", "/metrics", "r-token", 200),
        ("POST", "/v1/segment", None, 401),
        ("POST", "/v1/segment", "r-token", 200),
        ("GET", "/v1/jobs", "r-token", 403),
        ("GET", "/v1/jobs", "s-token", 404),  # through to the routes, which have none configured
        ("DELETE", "/v1/jobs/0123456789abcdef", "r-token", 403),
        ("GET", "/v1/jobs", "a-token", 404),
        ("POST", "/v1/dicomweb/segment", "r-token", 403),
    ],
)
def test_roles(method: str, path: str, token: str | None, status: int):
    headers = {**DICOM, **(bearing(token) if token else {})}
    content = slice_bytes(3, 32) if method == "POST" else None
    (answer,) = asked(
        service(tokens=KNOWN), lambda client: client.request(method, path, content=content, headers=headers)
    )
    assert answer.status_code == status
    if status in {401, 403}:
        challenge = answer.headers["www-authenticate"]
        assert challenge.startswith('Bearer realm="rayseg"')
        assert ("insufficient_scope" in challenge) == (status == 403)
        assert ("invalid_token" in challenge) == (token == "wrong")
        assert set(answer.json()) == {"reason", "detail"}


@pytest.mark.parametrize(
    "value",
    ["", "Bearer", "Bearer ", "Basic r-token", "r-token", "Bearer r-token x", "bearer\tr-token", "Bearer R-TOKEN"],
)
def test_only_a_bearer_token_as_it_is_opens(value: str):
    (answer,) = asked(service(tokens=KNOWN), get("/v1/model", authorization=value))
    assert answer.status_code == 401


def test_two_tokens_in_one_request_are_none():
    headers = [("authorization", "Bearer wrong"), ("authorization", "Bearer a-token")]
    (answer,) = asked(service(tokens=KNOWN), lambda client: client.get("/v1/model", headers=headers))
    assert answer.status_code == 401


def test_the_description_asks_for_a_token_where_one_is_needed():
    (answer,) = asked(service(tokens=KNOWN), get("/openapi.json"))
    paths = answer.json()["paths"]
    assert paths["/v1/segment"]["post"]["security"] == [{"token": []}]
    assert "security" not in paths["/healthz"]["get"]
    assert answer.json()["components"]["securitySchemes"]["token"] == {"type": "http", "scheme": "bearer"}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"host": "0.0.0.0"}, "RAYSEG_TOKENS_FILE"),
        ({"host": "192.0.2.1"}, "RAYSEG_TOKENS_FILE"),
        ({"host": "::"}, "RAYSEG_TOKENS_FILE"),
        ({"host": "0.0.0.0", "ssl_keyfile": "k", "ssl_certfile": "c"}, "RAYSEG_TOKENS_FILE"),
        ({"host": "127.0.0.1"}, None),
        ({"host": "::1"}, None),
        ({"host": "localhost"}, None),
        ({"host": "0.0.0.0", "behind_proxy": True}, None),
    ],
)
def test_without_tokens_nobody_else_is_served(settings: dict[str, Any], told: str | None):
    config = ServeConfig(tracking_uri="sqlite:///x.db", **settings)
    if told:
        with pytest.raises(ValueError, match=told):
            application._check_exposure(config, ())
    else:
        application._check_exposure(config, ())


def test_tokens_do_not_cross_the_network_in_the_clear():
    config = ServeConfig(tracking_uri="sqlite:///x.db", host="0.0.0.0")
    with pytest.raises(ValueError, match="ssl_certfile"):
        application._check_exposure(config, KNOWN)
    secured = ServeConfig(tracking_uri="x", host="0.0.0.0", ssl_keyfile="k", ssl_certfile="c")
    application._check_exposure(secured, KNOWN)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"min_replicas": 0}, "autoscaling.min_replicas"),
        ({"min_replicas": 3}, "autoscaling.max_replicas"),
        ({"target_ongoing_requests": 0}, "autoscaling.target_ongoing_requests"),
        ({"upscale_delay_s": -1}, "autoscaling.upscale_delay_s"),
    ],
)
def test_replicas_may_come_and_go_within_bounds_that_make_sense(settings: dict[str, Any], told: str):
    with pytest.raises(ValueError, match=told):
        application.Autoscaling(**settings)


def test_replicas_are_as_many_as_configured_or_come_and_go():
    version = ModelVersion("m", "1", "models:/m/1", "run", "d" * 64)
    scaled = ServeConfig(
        tracking_uri="x", autoscaling=application.Autoscaling(min_replicas=2, max_replicas=5), cpus_per_replica=3
    )
    model = application._model(scaled, version)._bound_deployment
    told = model._deployment_config.autoscaling_config
    assert (told.min_replicas, told.max_replicas, told.target_ongoing_requests) == (2, 5, 8)
    assert model.ray_actor_options["num_cpus"] == 3
    fixed = application._model(ServeConfig(tracking_uri="x", num_replicas=4), version)._bound_deployment
    assert fixed._deployment_config.num_replicas == 4
    assert fixed._deployment_config.autoscaling_config is None
    with pytest.raises(ValueError, match="num_replicas, autoscaling"):
        ServeConfig(tracking_uri="x", num_replicas=2, autoscaling=application.Autoscaling())


def test_a_certificate_is_looked_at_before_anything_starts(tmp_path: Path):
    (tmp_path / "key.pem").write_text("no key")
    with pytest.raises(ValueError, match="ssl_keyfile, ssl_certfile"):
        front.check_certificate(str(tmp_path / "key.pem"), str(tmp_path / "key.pem"))
    with pytest.raises(ValueError, match="ssl_keyfile, ssl_certfile"):
        front.check_certificate(str(tmp_path / "nowhere.pem"), str(tmp_path / "nowhere.pem"))


def test_an_address_is_had_once():
    with front.bound("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(ValueError, match=f"port: 127.0.0.1:{port}"):
            front.bound("127.0.0.1", port)


def test_a_deployed_application_wants_tokens_or_a_proxy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(auth.FILE, raising=False)
    monkeypatch.delenv(auth.VALUE, raising=False)
    with pytest.raises(ValueError, match="behind_proxy"):
        application.application({"tracking_uri": "sqlite:///x.db"})


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:8000"}, 200),
        ({"host": "evil.example"}, 403),  # DNS rebinding
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": ""}, 403),
        ({"host": "[::1"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:9000"}, 403),
    ],
)
def test_without_tokens_other_sites_do_not_get_in_through_a_browser(headers: dict[str, str], status: int):
    (answer,) = asked(service(), get("/v1/model", **headers))
    assert answer.status_code == status
    (behind,) = asked(service(local=False), get("/v1/model", **headers))
    assert behind.status_code == 200, "the proxy's business"


def test_every_answer_has_the_security_headers():
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("PATIENT")

    app = service(tls=True)
    requests = [get(path) for path in ("/", "/docs", "/v1/model", "/nowhere", "/v1/jobs")]
    answers = asked(app, *requests, post("/v1/segment", b"", **DICOM), post("/v1/segment", b"x" * (MAX_BODY + 1)))
    app._app = broken  # type: ignore[assignment]
    (failed,) = asked(app, get("/v1/model"))
    assert (failed.status_code, failed.json()) == (500, {"reason": "internal", "detail": "RuntimeError"})
    assert answers[0].headers["cache-control"] == "no-cache", "the page: it holds nothing, and is asked for anew"
    for answer in [*answers[1:], failed]:
        assert answer.headers["cache-control"] == "no-store"
    for answer in [*answers, failed]:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["strict-transport-security"]
        assert "access-control-allow-origin" not in answer.headers
    assert len(answers[0].headers.get_list("content-security-policy")) == 1, "the page's own"


def slowly(parts: list[bytes], seconds: float) -> AsyncIterator[bytes]:
    async def body() -> AsyncIterator[bytes]:
        for part in parts:
            yield part
            await asyncio.sleep(seconds)

    return body()


def test_a_body_that_drips_is_refused_and_a_slow_one_is_not():
    app = service(limits=Limits(body_grace_s=0.2, body_bytes_per_s=10_000))
    image = slice_bytes(3, 64)

    async def drips(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post("/v1/segment", content=slowly([b"x"] * 1000, 0.05), headers=DICOM)

    async def slow(client: httpx.AsyncClient) -> httpx.Response:
        pieces = [image[start : start + 2000] for start in range(0, len(image), 2000)]
        return await client.post("/v1/segment", content=slowly(pieces, 0.05), headers=DICOM)

    dripping, steady = asked(app, drips, slow)
    assert (dripping.status_code, dripping.json()["reason"]) == (408, "slow_body")
    assert steady.status_code == 200


def test_a_body_is_refused_while_it_arrives():
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 65536
            yield b"\0" * 65536

    (answer,) = asked(service(), lambda client: client.post("/v1/segment", content=endless(), headers=DICOM))
    assert (answer.status_code, answer.json()["reason"]) == (413, "too_large")
    assert taken <= MAX_BODY + 2 * 65536


def test_json_bodies_are_small():
    (answer,) = asked(service(), post("/v1/jobs", b" " * 70_000, **{"content-type": "application/json"}))
    assert answer.status_code == 413


def test_heads_are_limited():
    limits = Limits(headers=10, header_bytes=1000, target_bytes=100)
    many, long, target, fine = asked(
        service(limits=limits),
        get("/v1/model", **{f"x-{number}": "1" for number in range(12)}),
        get("/v1/model", **{"x-long": "1" * 1001}),
        get("/v1/model?" + "x" * 101),
        get("/v1/model"),
    )
    assert [many.status_code, long.status_code, target.status_code, fine.status_code] == [431, 431, 414, 200]


def test_a_request_has_a_deadline_and_a_token_a_share(monkeypatch: pytest.MonkeyPatch):
    app = service(tokens=KNOWN, limits=Limits(request_s=0.5, requests_per_token=2))
    started: list[str] = []

    async def stuck(scope: Any, receive: Any, send: Any) -> None:
        started.append(scope["path"])
        await asyncio.Event().wait()

    app._app = stuck  # type: ignore[assignment]

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            headers = [bearing(token) for token in ("r-token", "r-token", "r-token", "s-token")]
            return await asyncio.gather(*(client.get("/v1/model", headers=each) for each in headers))

    answers = asyncio.run(ask())
    assert [answer.status_code for answer in answers] == [503, 503, 429, 503]
    assert answers[0].json()["reason"] == "deadline"
    assert (answers[2].json()["reason"], answers[2].headers["retry-after"]) == ("too_many_requests", "1")
    assert len(started) == 3
    assert not app._slots._taken, "given back"


def test_what_is_too_much_at_once_is_told_to_come_again():
    app = service(limits=Limits(requests=2))
    go = asyncio.Event()

    async def stuck(scope: Any, receive: Any, send: Any) -> None:
        await go.wait()
        await JSONResponse({})(scope, receive, send)

    routed, app._app = app._app, stuck  # type: ignore[assignment]

    async def ask() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            tasks = [asyncio.create_task(client.get("/v1/model")) for _ in range(3)]
            refused, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            (answer,) = [task.result() for task in refused]
            assert (answer.json()["reason"], answer.headers["retry-after"]) == ("busy", "5")
            go.set()
            return sorted(answer.status_code for answer in await asyncio.gather(*tasks))

    assert asyncio.run(ask()) == [200, 200, 503]
    app._app = routed
    (later,) = asked(app, get("/v1/model"))
    assert later.status_code == 200, "given back"


def test_the_audit_log_tells_who_and_what_but_no_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("RAYSEG_PSEUDONYM_KEY", "k" * 32)
    path = tmp_path / "audit.jsonl"
    app = service(tokens=KNOWN, audit=str(path))
    canaries = {"x-request-id": "CANARY", "user-agent": "CANARY", **bearing("CANARY-token")}
    body = slice_bytes(3, 32)
    with caplog.at_level(logging.DEBUG):
        asked(
            app,
            post("/v1/segment?name=CANARY", body, **DICOM, **bearing("r-token")),
            get("/CANARY", **canaries),
            get("/v1/jobs/CANARY", **bearing("it-CANARY")),
            lambda client: client.request("CANARY", "/v1/model", headers=bearing("a-token")),
        )
    text = path.read_text()
    ours = [record.getMessage() for record in caplog.records if record.name != "httpx"]  # the client's own
    assert "CANARY" not in text + "".join(ours)
    assert "token" not in re.sub('"token":', "", text), "neither a token nor its hash"
    lines = [json.loads(one) for one in text.splitlines()]
    assert [(one["token"], one["method"], one["route"], one["status"]) for one in lines] == [
        ("ward", "POST", "/v1/segment", 200),
        (None, "GET", "unmatched", 401),
        (None, "GET", "unmatched", 401),
        ("it", "other", "/v1/model", 405),
    ]
    assert (lines[0]["model"], lines[0]["received"]) == ("3", len(body))
    series = pydicom.dcmread(BytesIO(body), stop_before_pixels=True).SeriesInstanceUID
    assert [one["sent"] for one in lines] == [[pseudonyms.Pseudonyms(b"k" * 32).key("series", series)], [], [], []]
    assert lines[1]["reason"] == "unauthorized"
    assert all(one["time"].endswith("+00:00") for one in lines)


def test_the_audit_log_names_a_series_by_its_pseudonym_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import hmac

    monkeypatch.setenv("RAYSEG_PSEUDONYM_KEY", "a-secret-of-the-hospital")
    path = tmp_path / "audit.jsonl"
    scope: dict[str, Any] = {}
    audit.about(scope, ["1.2.840.1", "1.2.840.1"])
    audit.Audit(str(path)).write(scope, status=200)
    monkeypatch.delenv("RAYSEG_PSEUDONYM_KEY")
    audit.Audit(str(path)).write(scope, status=200)
    keyed, bare = map(json.loads, path.read_text().splitlines())
    expected = hmac.digest(b"a-secret-of-the-hospital", b"series\x001.2.840.1", "sha256").hex()[:20]
    assert (keyed["sent"], bare["sent"]) == ([expected], [])
    with pytest.raises(ValueError, match=r"serve\.audit"):
        audit.Audit(str(tmp_path / "no" / "such" / "folder"))


def test_figures_count_requests_by_route_and_rejects_by_reason():
    app = service()
    image = slice_bytes(3, 32)
    *_, answer = asked(
        app,
        post("/v1/segment", image, **DICOM),
        post("/v1/segment", b"", **DICOM),
        post("/v1/segment", b"nothing", **DICOM),
        get("/nowhere/1"),
        get("/nowhere/2"),
        get("/metrics"),
    )
    assert answer.headers["content-type"].startswith("text/plain; version=")
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    assert samples["rayseg_http_requests_total", "/v1/segment", "200", "POST"] == 1
    assert samples["rayseg_http_requests_total", "/v1/segment", "400", "POST"] == 2
    assert samples["rayseg_http_requests_total", "404", "GET", "unmatched"] == 2
    assert samples["rayseg_http_rejects_total", "empty_object"] == 1
    assert samples["rayseg_http_rejects_total", "not_found"] == 2
    assert samples["rayseg_http_seconds_count", "/v1/segment"] == 3
    assert samples["rayseg_http_received_bytes_total", "/v1/segment"] == len(image) + len(b"nothing")
    assert samples["rayseg_model_info", "3", "d" * 64, "m"] == 1
    assert samples["rayseg_http_in_flight",] == 1, "this one"
    assert (samples["rayseg_replica_waiting",], samples["rayseg_replica_swaps",]) == (5, 2)
