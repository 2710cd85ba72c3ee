"""Candidates' own bearer tokens: what they may, and that no other token is taken."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import statistics
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from cluster import Cluster
from harness import Server
from test_start import refused, serve
from waiting import wait_until

ISSUER, AUDIENCE = "https://platform.example", "carrel"


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class Signer:
    """Signs tokens as a platform would (RFC 7515, 8037, 7518)."""

    def __init__(self, kid: str, algorithm: str = "EdDSA") -> None:
        self.kid, self.algorithm = kid, algorithm
        self.key: Any = ed25519.Ed25519PrivateKey.generate() if algorithm == "EdDSA" else ec.generate_private_key(ec.SECP256R1())

    @property
    def public(self) -> bytes:
        return self.key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)

    @property
    def jwk(self) -> dict[str, str]:
        common = {"kid": self.kid, "alg": self.algorithm, "use": "sig"}
        if self.algorithm == "EdDSA":
            return common | {"kty": "OKP", "crv": "Ed25519", "x": b64(self.public)}
        numbers = self.key.public_key().public_numbers()
        return common | {"kty": "EC", "crv": "P-256", "x": b64(numbers.x.to_bytes(32)), "y": b64(numbers.y.to_bytes(32))}

    def token(self, user: str, header: dict[str, Any] | None = None, **claims: Any) -> str:
        now = int(time.time())
        body = {"iss": ISSUER, "aud": AUDIENCE, "sub": user, "iat": now, "exp": now + 600} | claims
        body = {name: value for name, value in body.items() if value is not None}
        parts = [{"alg": self.algorithm, "kid": self.kid, "typ": "JWT"} | (header or {}), body]
        signed = ".".join(b64(json.dumps(part).encode()) for part in parts)
        if self.algorithm == "EdDSA":
            signature = self.key.sign(signed.encode())
        else:
            r, s = decode_dss_signature(self.key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
            signature = r.to_bytes(32) + s.to_bytes(32)
        return f"{signed}.{b64(signature)}"


@pytest.fixture(scope="module")
def signer() -> Signer:
    return Signer("first")


@pytest.fixture(scope="module")
def jwks(work: Path, signer: Signer) -> Path:
    path = work / "jwks.json"
    path.write_text(json.dumps({"keys": [signer.jwk]}))
    return path


@pytest.fixture(scope="module")
def trusting(work: Path, place: Cluster | None, jwks: Path) -> Iterator[Server]:
    """A server that takes the signer's tokens."""
    options = ["--jwt-issuer", ISSUER, "--jwt-audience", AUDIENCE, "--jwt-jwks-file", str(jwks)]
    with Server(work, options=options, cluster=place) as server:
        yield server


def known(server: Server, token: str) -> bool:
    """Is the token taken? Its holder has no session, which is an answer of its own."""
    status = server.http("GET", "/sessions/active", key=token).status_code
    assert status in (401, 404), status
    return status == 404


def test_a_candidate_makes_and_uses_only_the_own_session(trusting: Server, signer: Signer) -> None:
    me, other = str(uuid.uuid4()), str(uuid.uuid4())
    mine, theirs = signer.token(me), signer.token(other)
    none = trusting.http("GET", "/sessions/active", key=mine)
    assert none.status_code == 404 and none.json()["error"]["code"] == "NO_ACTIVE_SESSION", none.text
    made = trusting.ok("POST", "/sessions", {"exam_id": "plain"}, key=mine)
    assert made["user_id"] == me
    path = f"/sessions/{made['session_id']}"
    assert trusting.ok("GET", "/sessions/active", key=mine)["session_id"] == made["session_id"]
    assert trusting.ok("GET", path, key=mine)["user_id"] == me
    again = trusting.http("POST", "/sessions", {"exam_id": "plain"}, key=mine)
    assert again.status_code == 409, again.text
    for_other = trusting.http("POST", "/sessions", {"exam_id": "plain", "user_id": other}, key=mine)
    assert for_other.status_code == 403, for_other.text

    foreign = {"GET": ["", "/status"], "POST": ["/submit", "/terminate", "/terminal-ticket"]}
    for method, tails in foreign.items():
        for tail in tails:
            denied = trusting.http(method, path + tail, key=theirs)
            unknown = trusting.http(method, f"/sessions/{uuid.uuid4()}{tail}", key=theirs)
            assert denied.status_code == unknown.status_code == 403, (method, tail, denied.text, unknown.text)
            assert denied.content == unknown.content, f"unknown and foreign are told apart: {denied.text} {unknown.text}"
            hide = ("date", "x-request-id")
            seen = [{k: v for k, v in answer.headers.items() if k not in hide} for answer in (denied, unknown)]
            assert seen[0] == seen[1], f"the headers tell unknown and foreign apart: {seen}"
    assert trusting.ok("GET", path, key=mine)["lifecycle_state"] not in ("terminated", "failed"), "a stranger ended the session"
    assert trusting.http("PUT", "/exams/plain", {"id": "plain", "title": "x", "duration_minutes": 1}, key=mine).status_code == 403

    wait_until("it is ready", lambda: trusting.ok("GET", path, key=mine)["lifecycle_state"] == "ready", within=20)
    trusting.ok("POST", f"{path}/submit", key=mine)
    ended = trusting.ok("GET", path, key=mine)
    assert ended["lifecycle_state"] == "terminated", ended
    assert trusting.http("GET", "/sessions/active", key=mine).status_code == 404


def test_unknown_and_foreign_sessions_are_denied_in_the_same_time(trusting: Server, signer: Signer) -> None:
    made = trusting.ok("POST", "/sessions", {"exam_id": "plain"}, key=signer.token(str(uuid.uuid4())))
    stranger = signer.token(str(uuid.uuid4()))
    times: dict[str, list[float]] = {"foreign": [], "unknown": []}
    with httpx.Client(base_url=trusting.url, trust_env=False, headers={"Authorization": f"Bearer {stranger}"}) as client:
        for number in range(120):
            for kind, session in (("foreign", made["session_id"]), ("unknown", str(uuid.uuid4()))):
                started = time.perf_counter()
                assert client.get(f"/v1/sessions/{session}").status_code == 403
                if number >= 20:
                    times[kind].append(time.perf_counter() - started)
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    assert abs(medians["foreign"] - medians["unknown"]) < 0.002, f"the clock tells them apart: {medians}"
    trusting.http("POST", f"/sessions/{made['session_id']}/terminate")


def test_no_other_token_is_taken(trusting: Server, signer: Signer) -> None:
    me, now = str(uuid.uuid4()), int(time.time())
    good = signer.token(me)
    assert known(trusting, good), "the good token is refused: this test is broken"
    head, body, signature = good.split(".")
    none = b64(json.dumps({"alg": "none"}).encode())
    hs_head = b64(json.dumps({"alg": "HS256", "kid": signer.kid}).encode())
    hs = hmac.new(signer.public, f"{hs_head}.{body}".encode(), hashlib.sha256).digest()
    other_body = b64(json.dumps({"iss": ISSUER, "aud": AUDIENCE, "sub": str(uuid.uuid4()), "exp": now + 600}).encode())
    bad = {
        "alg none": f"{none}.{body}.",
        "alg none, old signature": f"{none}.{body}.{signature}",
        "symmetric, by the public key": f"{hs_head}.{body}.{b64(hs)}",
        "other body": f"{head}.{other_body}.{signature}",
        "no signature": f"{head}.{body}.",
        "another signer": Signer("first").token(me),
        "another key id": signer.token(me, header={"kid": "other"}),
        "expired": signer.token(me, exp=now - 120),
        "no expiry": signer.token(me, exp=None),
        "not yet": signer.token(me, nbf=now + 300),
        "another issuer": signer.token(me, iss="https://evil.example"),
        "another audience": signer.token(me, aud="other"),
        "no audience": signer.token(me, aud=None),
        "no subject": signer.token(me, sub=None),
        "a name for a subject": signer.token("root"),
        "an embedded key": Signer("first").token(me, header={"jwk": Signer("x").jwk}),
        "very long": good + "A" * 20_000,
        "four parts": good + ".x",
    }
    for kind, token in bad.items():
        answer = trusting.http("GET", "/sessions/active", key=token)
        # More header than the server takes is an answer of its own.
        assert answer.status_code == 401 or (kind == "very long" and answer.status_code == 431), f"{kind}: {answer.status_code} {answer.text}"


def test_roles_of_a_token_never_make_sessions_for_others(trusting: Server, signer: Signer) -> None:
    token = signer.token(str(uuid.uuid4()), roles=["platform", "candidate", "unknown"])
    answer = trusting.http("POST", "/sessions", {"exam_id": "plain", "user_id": str(uuid.uuid4())}, key=token)
    assert answer.status_code == 403, answer.text


def test_new_keys_are_taken_without_a_restart_and_a_broken_file_does_no_harm(trusting: Server, signer: Signer, jwks: Path) -> None:
    second = Signer("second", "ES256")
    user = str(uuid.uuid4())
    assert not known(trusting, second.token(user))
    jwks.write_text(json.dumps({"keys": [signer.jwk, second.jwk]}))
    wait_until("the new key is taken", lambda: known(trusting, second.token(user)), within=10)
    jwks.write_text("{broken")
    time.sleep(1.5)
    assert known(trusting, second.token(user)), "a broken file locks everybody out"
    jwks.write_text(json.dumps({"keys": [signer.jwk]}))
    wait_until("the withdrawn key is refused", lambda: not known(trusting, second.token(user)), within=10)


def test_half_settings_and_weak_algorithms_are_refused(tmp_path: Path, jwks: Path) -> None:
    refused(serve(tmp_path / "d", "--jwt-issuer", ISSUER), "--jwt-jwks-file", status=1)
    whole = ["--jwt-issuer", ISSUER, "--jwt-audience", AUDIENCE]
    refused(serve(tmp_path / "d", *whole, "--jwt-jwks-file", str(jwks), "--jwt-algorithms", "HS256"), "HS256", status=1)
    refused(serve(tmp_path / "d", *whole, "--jwt-jwks-file", str(tmp_path / "none")), "none", status=1)
