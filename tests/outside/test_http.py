"""The HTTP contract, by curl; its description, by schemathesis; and bad clients, by hand."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from harness import Server, Session, need, rss_kib, told


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return self.json["error"]["code"]


def curl(server: Server, method: str, path: str, *words: str, key: str | None = None, body: Any = None) -> Answer:
    """One request by curl; `key=""` sends no token."""
    token = server.key if key is None else key
    argv = [need("curl"), "-q", "-sS", "-i", "--noproxy", "*", "--max-time", "30", "--path-as-is", "-X", method, f"{server.url}{path}", *words]
    if method == "HEAD":
        argv[argv.index("-X")] = "-I"
        argv.remove("HEAD")
    given = b""
    if token:
        # By stdin: a key in argv is seen by everybody on the machine.
        given += f'header = "Authorization: Bearer {token}"\n'.encode()
    if body is not None:
        argv += ["-H", "Content-Type: application/json", "--data-binary", body if isinstance(body, str) else json.dumps(body)]
    done = subprocess.run([*argv, "-K", "-"], input=given, capture_output=True, timeout=40)
    assert done.returncode == 0, told(done)
    head, _, rest = done.stdout.partition(b"\r\n\r\n")
    while head.startswith(b"HTTP/1.1 100"):
        head, _, rest = rest.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    return Answer(int(lines[0].split()[1]), headers, rest)


def is_error(answer: Answer, status: int, code: str | None = None) -> None:
    """The contract's error: a status, a code and one sentence."""
    assert answer.status == status, f"{answer.status}: {answer.body[:500]!r}"
    assert answer.headers["content-type"].startswith("application/json"), answer.headers
    body = answer.json
    assert set(body) == {"success", "error"} and body["success"] is False, body
    assert {"code", "message"} <= set(body["error"]) and re.fullmatch(r"[A-Z][A-Z0-9_]+", body["error"]["code"]) and body["error"]["message"], body
    if code:
        assert body["error"]["code"] == code, body


# --- shapes ------------------------------------------------------------------------------------------------------


def test_a_created_session_has_the_contracts_fields(server: Server) -> None:
    user = str(uuid.uuid4())
    answer = curl(server, "POST", "/v1/sessions", body={"exam_id": "plain", "user_id": user})
    assert answer.status == 201, answer.body
    body = answer.json
    assert body["success"] is True and set(body) == {"success", "data"}
    data = body["data"]
    assert {"session_id", "user_id", "exam_id", "status", "websocket_url", "status_url", "ssh"} <= set(data), data
    assert data["user_id"] == user and data["exam_id"] == "plain" and data["status"] == "created"
    assert uuid.UUID(data["session_id"])
    assert data["websocket_url"] == f"ws://127.0.0.1:{server.http_port}/v1/sessions/{data['session_id']}/terminal", data["websocket_url"]
    assert data["status_url"].endswith(f"/v1/sessions/{data['session_id']}/status")
    assert set(data["ssh"]) == {"host", "port", "username", "password", "command", "host_key_fingerprint", "known_hosts"}, data["ssh"]
    assert len(data["ssh"]["password"]) >= 12 and data["ssh"]["port"] == server.ssh_port
    assert answer.headers.get("cache-control", "").find("no-store") >= 0, "an answer with a password may be cached"

    got = curl(server, "GET", f"/v1/sessions/{data['session_id']}").json["data"]
    fields = {"session_id", "user_id", "exam_id", "lifecycle_state", "lifecycle_reason", "started_at", "ready_at", "ends_at", "remaining_seconds", "environment"}
    assert fields <= set(got), fields - set(got)
    assert set(got["environment"]) == {"ready", "environment_id"}
    assert "password" not in json.dumps(got), "the password is told a second time"

    status = curl(server, "GET", f"/v1/sessions/{data['session_id']}/status").json["data"]
    fields = {"session_id", "display_state", "message", "progress", "environment_ready", "remaining_seconds", "error_reason", "recoverable", "updated_at"}
    assert fields <= set(status), fields - set(status)
    assert set(status["progress"]) == {"current_step", "total_steps", "step_description"}
    curl(server, "POST", f"/v1/sessions/{data['session_id']}/terminate")


def test_a_ticket_is_single_use_and_short_lived(server: Server, session: Session) -> None:
    data = curl(server, "POST", f"/v1/sessions/{session.id}/terminal-ticket").json["data"]
    assert set(data) == {"ticket", "expires_in"} and data["expires_in"] == 30, data
    assert len(data["ticket"]) > 40
    other = curl(server, "POST", f"/v1/sessions/{session.id}/terminal-ticket").json["data"]
    assert other["ticket"] != data["ticket"]


def test_exams_are_read_and_written(server: Server) -> None:
    listed = curl(server, "GET", "/v1/exams")
    assert listed.status == 200 and "plain" in listed.body.decode()
    one = curl(server, "GET", "/v1/exams/plain")
    assert one.status == 200 and one.json["data"]["duration_minutes"] == 120, one.body
    exam = {"id": "from-api", "title": "From the API", "duration_minutes": 5}
    put = curl(server, "PUT", "/v1/exams/from-api", body=exam)
    assert put.status in (200, 201), put.body
    assert curl(server, "GET", "/v1/exams/from-api").json["data"]["title"] == "From the API"
    bad = curl(server, "PUT", "/v1/exams/from-api", body=exam | {"duration_minutes": 0})
    assert bad.status in (400, 422) and b"duration_minutes" in bad.body, bad.body
    other = curl(server, "PUT", "/v1/exams/another", body=exam)
    assert other.status in (400, 422), f"the id of the path and of the body differ: {other.body!r}"
    assert curl(server, "GET", "/v1/exams/no-such-exam").status in (400, 404)
    platform = server.create_key("platform", name="no-operator")
    is_error(curl(server, "PUT", "/v1/exams/from-api", body=exam, key=platform), 403)


def test_health_readiness_and_description(server: Server) -> None:
    for path in ("/healthz", "/readyz", "/metrics", "/openapi.json"):
        answer = curl(server, "GET", path, key="")
        if answer.status == 404:
            answer = curl(server, "GET", f"/v1{path}", key="")
        assert answer.status == 200, f"{path}: {answer.status}"
        if path == "/openapi.json":
            assert answer.json["openapi"].startswith("3.1"), answer.json["openapi"]
            paths = answer.json["paths"]
            for wanted in ("/v1/sessions", "/v1/sessions/active", "/v1/exams"):
                assert wanted in paths, f"{wanted} is not described: {sorted(paths)}"
        if path == "/metrics":
            assert b"# TYPE" in answer.body, answer.body[:300]


# --- errors ------------------------------------------------------------------------------------------------------


def test_no_or_a_bad_token_is_401(server: Server, session: Session) -> None:
    paths = [("GET", "/v1/exams"), ("GET", f"/v1/sessions/{session.id}"), ("POST", "/v1/sessions"), ("GET", "/v1/sessions/active")]
    for method, path in paths:
        is_error(curl(server, method, path, key=""), 401, "UNAUTHENTICATED")
        for bad in ("x", server.key[:-1], server.key + "x", server.key.swapcase(), "a.b.c", "eyJhbGciOiJub25lIn0.eyJzdWIiOiJ4In0."):
            is_error(curl(server, method, path, key=bad), 401, "UNAUTHENTICATED")
    for header in ("Authorization: Basic eDp5", "Authorization: Bearer", "Authorization:", "Authorization: bearer  "):
        is_error(curl(server, "GET", "/v1/exams", "-H", header, key=""), 401, "UNAUTHENTICATED")


def test_every_session_call_denies_unknown_sessions_alike(server: Server) -> None:
    bodies = set()
    for method, tail in (("GET", ""), ("GET", "/status"), ("POST", "/submit"), ("POST", "/terminate"), ("POST", "/terminal-ticket")):
        answer = curl(server, method, f"/v1/sessions/{uuid.uuid4()}{tail}")
        is_error(answer, 403, "ACCESS_DENIED")
        bodies.add(answer.body)
    assert len(bodies) == 1, f"denials differ: {bodies}"


def test_a_malformed_session_id_is_no_oracle_and_no_crash(server: Server) -> None:
    for bad in ("x", "1", "..%2f..%2fexams", "%00", "a" * 5000, "%F0%9F%8E%93", "%ff", "{" + str(uuid.uuid4()) + "}"):
        answer = curl(server, "GET", f"/v1/sessions/{bad}")
        assert 400 <= answer.status < 500, f"{bad!r}: {answer.status}"
        is_error(answer, answer.status)


def test_an_unknown_exam_is_invalid(server: Server) -> None:
    for exam in ("no-such-exam", "", "../x", "x" * 500, "ünï"):
        is_error(curl(server, "POST", "/v1/sessions", body={"exam_id": exam, "user_id": str(uuid.uuid4())}), 400, "INVALID_EXAM_ID")


BAD_BODIES = {
    "unknown field": '{"exam_id":"plain","user_id":"%s","evil":1}',
    "no json": "{",
    "empty": "",
    "array": "[]",
    "null": "null",
    "number": "1e999",
    "wrong types": '{"exam_id":5}',
    "no exam": '{"user_id":"%s"}',
    "malformed user": '{"exam_id":"plain","user_id":"me"}',
    "bad key": '{"exam_id":"plain","user_id":"%s","ssh_public_key":"ssh-rsa nonsense"}',
    "private key": '{"exam_id":"plain","user_id":"%s","ssh_public_key":"-----BEGIN OPENSSH PRIVATE KEY-----"}',
    "deep": "[" * 5000 + "]" * 5000,
    "duplicate": '{"exam_id":"plain","exam_id":"forward","user_id":"%s"}',
    "trailing": '{"exam_id":"plain","user_id":"%s"} x',
}


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES.keys())
def test_a_bad_body_is_refused_with_a_reason(server: Server, body: str) -> None:
    text = body.replace("%s", str(uuid.uuid4()))
    answer = curl(server, "POST", "/v1/sessions", body=text)
    assert answer.status in (400, 415, 422), f"{answer.status}: {answer.body[:300]!r}"
    is_error(answer, answer.status)
    if "evil" in body:
        assert "evil" in answer.json["error"]["message"], answer.json


def test_a_wrong_method_and_an_unknown_path_are_errors_of_the_contracts_form(server: Server) -> None:
    is_error(curl(server, "DELETE", "/v1/exams/plain"), 405)
    is_error(curl(server, "GET", "/v1/no-such-thing"), 404)
    assert curl(server, "HEAD", "/healthz", key="").status == 200
    assert curl(server, "TRACE", "/v1/exams").status in (400, 404, 405)


def test_other_origins_are_given_nothing(server: Server) -> None:
    answer = curl(server, "GET", "/v1/exams", "-H", "Origin: https://evil.example")
    assert "access-control-allow-origin" not in answer.headers, answer.headers
    answer = curl(server, "OPTIONS", "/v1/sessions", "-H", "Origin: https://evil.example", "-H", "Access-Control-Request-Method: POST", key="")
    assert "access-control-allow-origin" not in answer.headers, answer.headers


def test_no_active_session_and_the_active_session(server: Server) -> None:
    answer = curl(server, "GET", "/v1/sessions/active")
    # A platform key is nobody's own caller: it has no session of its own.
    is_error(answer, answer.status)
    assert answer.status in (400, 403, 404), answer.body


# --- scopes and tokens -------------------------------------------------------------------------------------------


def test_a_key_does_only_what_its_scopes_allow(server: Server, session: Session) -> None:
    proctor = server.create_key("proctor", name="proctor")
    grader = server.create_key("grader", name="grader")
    for key in (proctor, grader):
        answer = curl(server, "POST", "/v1/sessions", key=key, body={"exam_id": "plain", "user_id": str(uuid.uuid4())})
        is_error(answer, 403)
    is_error(curl(server, "PUT", "/v1/exams/plain", key=grader, body={"id": "plain", "title": "x", "duration_minutes": 1}), 403)
    answer = curl(server, "POST", f"/v1/sessions/{session.id}/terminate", key=grader)
    assert answer.status == 403, f"a grader ends a session: {answer.body!r}"
    assert session.get()["lifecycle_state"] in ("ready", "running")


# --- bad clients -------------------------------------------------------------------------------------------------


def raw(server: Server, timeout: float = 20) -> socket.socket:
    one = socket.create_connection(("127.0.0.1", server.http_port), timeout=timeout)
    one.settimeout(timeout)
    return one


def read_all(one: socket.socket) -> bytes:
    seen = b""
    try:
        while data := one.recv(65536):
            seen += data
    except ConnectionResetError:
        pass
    return seen


def test_a_header_of_one_mib_is_refused(server: Server) -> None:
    with raw(server) as one:
        try:
            one.sendall(b"GET /v1/exams HTTP/1.1\r\nHost: x\r\nX-Large: " + b"x" * (1 << 20) + b"\r\n\r\n")
        except (BrokenPipeError, ConnectionResetError):
            pass
        first = read_all(one).split(b"\r\n")[0]
    assert first in (b"", b"HTTP/1.1 431 Request Header Fields Too Large", b"HTTP/1.1 400 Bad Request"), first
    assert server.ready()
    with raw(server) as one:
        try:
            one.sendall(b"GET /v1/exams HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X-%d: y\r\n" % number for number in range(20_000)) + b"\r\n")
        except (BrokenPipeError, ConnectionResetError):
            pass
        first = read_all(one).split(b"\r\n")[0]
    assert b"200" not in first, first
    assert server.ready()


def test_900_kb_of_headers_by_curl_get_an_answer(server: Server, tmp_path: Path) -> None:
    (tmp_path / "header").write_text("".join(f"X-Large-{number}: {'x' * 90_000}\n" for number in range(10)))
    argv = [need("curl"), "-q", "-s", "-o", "/dev/null", "-w", "%{http_code}", "--noproxy", "*", "--max-time", "20", "-H", f"@{tmp_path}/header"]
    done = subprocess.run([*argv, f"{server.url}/healthz"], capture_output=True, timeout=30)
    assert done.stdout in (b"431", b"400"), f"a clear answer is 431, this was {told(done)}"


def test_a_large_body_is_refused_without_being_read(server: Server, tmp_path: Path) -> None:
    big = tmp_path / "big.json"
    with big.open("wb") as file:
        file.write(b'{"exam_id":"')
        for _ in range(100):
            file.write(b"x" * 1_000_000)
        file.write(b'"}')
    before = rss_kib(server.pid)
    answer = curl(server, "POST", "/v1/sessions", "-H", "Content-Type: application/json", "-H", "Expect:", "-T", str(big))
    is_error(answer, 413)
    assert rss_kib(server.pid) - before < 20_000, "the body was kept in memory"


@pytest.mark.timeout(60)
def test_slow_headers_are_cut(server: Server) -> None:
    with raw(server, timeout=40) as one, raw(server, timeout=40) as silent:
        started = time.monotonic()
        one.sendall(b"GET /healthz HTTP/1.1\r\n")
        ended = None
        while time.monotonic() - started < 30:
            try:
                one.sendall(b"X-A: b\r\n")
            except OSError:
                ended = time.monotonic() - started
                break
            one.settimeout(1)
            try:
                if one.recv(4096) == b"":
                    ended = time.monotonic() - started
                    break
            except TimeoutError:
                pass
            except ConnectionResetError:
                ended = time.monotonic() - started
                break
        assert ended is not None and ended < 20, "a client that sends a header a second holds its connection for ever"
        silent.settimeout(30)
        read_all(silent)
        assert time.monotonic() - started < 35, "a connection that says nothing stays"


@pytest.mark.slow
@pytest.mark.timeout(100)
def test_a_slow_body_is_cut(server: Server) -> None:
    with raw(server, timeout=80) as one:
        head = f"POST /v1/sessions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        one.sendall(head.encode() + b'{"exam')
        started = time.monotonic()
        try:
            seen = one.recv(4096)
        except TimeoutError:
            raise AssertionError("a body that does not come holds its request for over 80 s") from None
        assert not seen or b" 4" in seen.split(b"\r\n")[0], seen
        assert time.monotonic() - started < 75


SMUGGLING = {
    "two lengths": b"POST /v1/sessions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "bad chunk": b"POST /v1/sessions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzzz\r\n",
    "huge chunk": b"POST /v1/sessions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff1\r\n",
    "binary": os.urandom(2000),
    "no version": b"GET /\r\n\r\n",
    "long line": b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "bad utf-8": b"GET /v1/exams/\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    "absolute": b"GET http://evil.example/healthz HTTP/1.1\r\nHost: evil.example\r\n\r\n",
}


@pytest.mark.parametrize("data", SMUGGLING.values(), ids=SMUGGLING.keys())
def test_a_broken_request_harms_nobody(server: Server, data: bytes) -> None:
    with raw(server, timeout=15) as one:
        try:
            one.sendall(data)
            one.shutdown(socket.SHUT_WR)
            first = read_all(one).split(b"\r\n")[0]
            assert b" 50" not in first, first
        except OSError:
            pass
    assert server.ready()


# --- the description ---------------------------------------------------------------------------------------------


@pytest.mark.timeout(170)
def test_schemathesis_finds_no_difference_between_description_and_server(new_server: Callable[..., Server], tmp_path: Path) -> None:
    server = new_server()
    path = "/openapi.json" if server.client.get("/openapi.json").status_code == 200 else "/v1/openapi.json"
    tool = str(Path(sys.executable).parent / "schemathesis")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,response_headers_conformance,ignored_auth"
    config = tmp_path / "schemathesis.toml"
    config.write_text('headers = { Authorization = "Bearer ${TEST_KEY}" }\n')
    words = ["--phases", "examples,coverage,fuzzing", "--max-examples", "15", "--seed", "1", "--checks", checks, "--request-timeout", "15", "--no-color"]
    done = subprocess.run(
        [tool, "--config-file", str(config), "run", server.url + path, *words],
        env=os.environ | {"TEST_KEY": server.key, "NO_PROXY": "127.0.0.1", "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        timeout=150,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-6000:] + done.stderr.decode(errors="replace")[-500:]
    assert server.ready()
