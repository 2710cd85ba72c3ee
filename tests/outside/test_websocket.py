"""The terminal's WebSocket with a plain client: both dialects, logins, flow control and close codes."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import struct
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from harness import Server, Session, rss_kib

INPUT, RESIZE, ACK = 0, 1, 2
OUTPUT, STATUS, TERMINATION, ATTACHED, TAKEN, EXIT = 0, 1, 2, 3, 4, 5
INPUT_WINDOW = 64 * 1024


@contextmanager
def dial(session: Session, *protocols: str, path: str | None = None, **kwargs: Any) -> Iterator[ClientConnection]:
    """A WebSocket to the session's terminal, without a credential unless one is given."""
    url = session.ws_base + (path or f"/v1/sessions/{session.id}/terminal")
    kwargs = {"max_size": None, "max_queue": None, "open_timeout": 10, "close_timeout": 5, "proxy": None} | kwargs
    with connect(url, subprotocols=list(protocols) or None, **kwargs) as socket:
        yield socket


def close_of(socket: ClientConnection, within: float = 15) -> tuple[int, str]:
    """Reads to the end and returns the server's close code and reason."""
    deadline = time.monotonic() + within
    try:
        while True:
            socket.recv(timeout=max(0.01, deadline - time.monotonic()))
    except ConnectionClosed as closed:
        assert closed.rcvd, "the connection was cut without a close frame"
        return closed.rcvd.code, closed.rcvd.reason


class JsonClient:
    """Speaks the JSON frames of the contract."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.text = ""
        self.frames: list[dict[str, Any]] = []

    def send(self, **frame: Any) -> None:
        self.socket.send(json.dumps(frame))

    def type(self, text: str) -> None:
        self.send(type="input", data=text)

    def read(self, deadline: float) -> dict[str, Any]:
        message = self.socket.recv(timeout=max(0.01, deadline - time.monotonic()))
        assert isinstance(message, str), f"a binary frame without carrel.v1: {message[:20]!r}"
        frame = json.loads(message)
        self.frames.append(frame)
        if frame["type"] == "output":
            self.text += frame["data"]
        return frame

    def expect(self, pattern: str, within: float = 15) -> re.Match[str]:
        """Waits for a regular expression in the output."""
        deadline = time.monotonic() + within
        while not (match := re.search(pattern, self.text, re.DOTALL)):
            try:
                self.read(deadline)
            except TimeoutError:
                raise AssertionError(f"{pattern!r} was not shown; last: {self.text[-1000:]!r}") from None
        self.text = self.text[match.end() :]
        return match

    def until(self, kind: str, within: float = 15) -> dict[str, Any]:
        """The next frame of a type."""
        deadline = time.monotonic() + within
        while (frame := self.read(deadline))["type"] != kind:
            pass
        return frame


class BinaryClient:
    """Speaks carrel.v1: acknowledges output unless told not to, and keeps within its window of input."""

    def __init__(self, socket: ClientConnection, cols: int = 80, rows: int = 24, acknowledge: bool = True) -> None:
        assert socket.subprotocol == "carrel.v1"
        self.socket = socket
        self.acknowledge = acknowledge
        self.output = bytearray()
        self.received = 0
        self.under_way = 0
        self.json: dict[int, list[dict[str, Any]]] = {}
        self.resize(cols, rows)

    def resize(self, cols: int, rows: int) -> None:
        self.socket.send(struct.pack(">BHH", RESIZE, cols, rows))

    def ack(self, count: int) -> None:
        self.socket.send(struct.pack(">BI", ACK, count))

    def type(self, data: bytes) -> None:
        self.socket.send(bytes([INPUT]) + data)
        self.under_way += len(data)

    def read(self, deadline: float) -> int:
        message = self.socket.recv(timeout=max(0.01, deadline - time.monotonic()))
        assert isinstance(message, bytes), f"a text frame in carrel.v1: {message[:100]!r}"
        kind, payload = message[0], message[1:]
        if kind == OUTPUT:
            self.output += payload
            self.received += len(payload)
            if self.acknowledge:
                # What was received before a close is still read after it.
                with suppress(ConnectionClosed):
                    self.ack(len(payload))
        elif kind == TAKEN:
            self.under_way -= struct.unpack(">I", payload)[0]
        else:
            self.json.setdefault(kind, []).append(json.loads(payload))
        return kind

    def until(self, kind: int, within: float = 15) -> dict[str, Any]:
        """The latest frame of a type, waited for if there is none."""
        deadline = time.monotonic() + within
        while kind not in self.json:
            self.read(deadline)
        return self.json[kind][-1]

    def expect(self, pattern: bytes, within: float = 15) -> re.Match[bytes]:
        deadline = time.monotonic() + within
        while not (match := re.search(pattern, bytes(self.output), re.DOTALL)):
            try:
                self.read(deadline)
            except TimeoutError:
                raise AssertionError(f"{pattern!r} was not shown; last: {bytes(self.output[-1000:])!r}") from None
        del self.output[: match.end()]
        return match

    def send_all(self, data: bytes, within: float = 60) -> None:
        """A large input in chunks, as the page sends a paste."""
        deadline = time.monotonic() + within
        for start in range(0, len(data), 16384):
            chunk = data[start : start + 16384]
            while self.under_way + len(chunk) > INPUT_WINDOW:
                self.read(deadline)
            self.type(chunk)


@contextmanager
def json_client(session: Session) -> Iterator[JsonClient]:
    with dial(session) as socket:
        client = JsonClient(socket)
        client.send(type="auth", ticket=session.ticket())
        yield client


@contextmanager
def binary_client(session: Session, **kwargs: Any) -> Iterator[BinaryClient]:
    with dial(session, "carrel.v1", f"carrel.ticket.{session.ticket()}") as socket:
        client = BinaryClient(socket, **kwargs)
        client.until(ATTACHED)
        yield client


# --- coming in ---------------------------------------------------------------------------------------------------


def test_a_ticket_in_the_first_frame_lets_in(fresh: Session) -> None:
    with json_client(fresh) as client:
        client.type("echo in-$((40+2))\r")
        client.expect("in-42")


def test_a_ticket_as_a_subprotocol_lets_in_and_a_client_is_answered_one_of_its_offers(fresh: Session) -> None:
    ticket = f"carrel.ticket.{fresh.ticket()}"
    with dial(fresh, ticket) as socket:
        assert socket.subprotocol == ticket
        client = JsonClient(socket)
        client.type("echo in-$((40+2))\r")
        client.expect("in-42")
    with dial(fresh, f"carrel.ticket.{fresh.ticket()}", "carrel.json") as socket:
        assert socket.subprotocol == "carrel.json"
        JsonClient(socket).until("status")


def test_a_ticket_works_once(fresh: Session) -> None:
    ticket = fresh.ticket()
    with dial(fresh, f"carrel.ticket.{ticket}") as socket:
        JsonClient(socket).until("status")
    with dial(fresh, f"carrel.ticket.{ticket}") as socket:
        assert close_of(socket)[0] == 4001


def test_a_wrong_credential_and_none_are_refused(session: Session) -> None:
    with dial(session, "carrel.ticket.nonsense") as socket:
        assert close_of(socket)[0] == 4001
    with dial(session) as socket:
        socket.send(json.dumps({"type": "auth", "ticket": "nonsense"}))
        assert close_of(socket)[0] == 4001
    with dial(session) as socket:
        socket.send(json.dumps({"type": "input", "data": "id\r"}))
        assert close_of(socket)[0] == 4001
    with dial(session, additional_headers={"Authorization": "Bearer nonsense"}) as socket:
        assert close_of(socket)[0] == 4001
    with dial(session, additional_headers={"Cookie": "carrel_page=nonsense"}) as socket:
        assert close_of(socket)[0] == 4001


def test_a_client_that_says_nothing_is_closed_after_ten_seconds(session: Session) -> None:
    started = time.monotonic()
    with dial(session) as socket:
        assert close_of(socket, within=20)[0] == 4001
    assert 8 < time.monotonic() - started < 15


def test_a_ticket_opens_no_other_session_and_unknown_ones_look_the_same(server: Server, fresh: Session, session: Session) -> None:
    seen = set()
    for other in (session.id, str(uuid.uuid4()), "nonsense"):
        with dial(fresh, f"carrel.ticket.{fresh.ticket()}", path=f"/v1/sessions/{other}/terminal") as socket:
            seen.add(close_of(socket))
    assert len(seen) == 1, seen
    assert seen.pop()[0] in (4001, 4003)


def test_a_page_of_a_foreign_origin_is_refused_and_our_own_is_not(fresh: Session) -> None:
    for origin in ("https://evil.example", "null", fresh.http_base.replace("127.0.0.1", "127.0.0.2")):
        with pytest.raises(InvalidStatus) as refused, dial(fresh, f"carrel.ticket.{fresh.ticket()}", origin=origin):
            pass
        assert refused.value.response.status_code == 403
    with dial(fresh, f"carrel.ticket.{fresh.ticket()}", origin=fresh.http_base) as socket:
        JsonClient(socket).until("status")


def test_a_plain_request_is_told_that_this_is_a_websocket(session: Session) -> None:
    answer = session.server.http("GET", f"/sessions/{session.id}/terminal")
    assert answer.status_code == 426
    assert answer.json()["error"]["code"] == "WEBSOCKET_REQUIRED"


def test_the_thirty_third_connection_is_refused(fresh: Session) -> None:
    with ExitStack() as stack:
        for _ in range(32):
            socket = stack.enter_context(dial(fresh, f"carrel.ticket.{fresh.ticket()}"))
            JsonClient(socket).until("status")
        with dial(fresh, f"carrel.ticket.{fresh.ticket()}") as socket:
            assert close_of(socket)[0] == 4009
    with json_client(fresh) as client:
        client.until("status")


def test_a_platforms_key_lets_in_and_a_proctor_may_only_look(fresh: Session) -> None:
    header = {"Authorization": f"Bearer {fresh.server.key}"}
    proctor = {"Authorization": f"Bearer {fresh.server.create_key('proctor')}"}
    with dial(fresh, "carrel.v1", additional_headers=proctor) as socket:
        early = BinaryClient(socket)
        early.until(STATUS)
        assert ATTACHED not in early.json, "a terminal that only a proctor has opened"
        assert fresh.get()["lifecycle_state"] == "ready"
        with dial(fresh, "carrel.v1", additional_headers=header) as socket:
            client = BinaryClient(socket, cols=90, rows=20)
            client.until(ATTACHED)
            assert early.until(ATTACHED) == {"resumed": True, "watching": True}
            early.type(b"echo from-the-proctor\r")
            early.resize(40, 10)
            client.type(b"echo seen-$((40+2)); stty size\r")
            early.expect(rb"seen-42\r\n20 90")
            client.expect(rb"seen-42\r\n20 90")
            assert b"proctor" not in client.output + early.output
    grader = {"Authorization": f"Bearer {fresh.server.create_key('grader')}"}
    with dial(fresh, additional_headers=grader) as socket:
        assert close_of(socket)[0] == 4003
    with dial(fresh, path=f"/v1/sessions/{uuid.uuid4()}/terminal", additional_headers=header) as socket:
        assert close_of(socket)[0] == 4003


# --- JSON --------------------------------------------------------------------------------------------------------


def test_json_shows_the_state_and_the_time_left(fresh: Session) -> None:
    with json_client(fresh) as client:
        frame = client.until("status")
        while frame["state"] != "running":
            frame = client.until("status")
        assert 7190 <= frame["remaining_seconds"] <= 7200
        assert frame["exam_id"] == "plain"


@pytest.mark.pods
def test_json_resizes_the_terminal(fresh: Session) -> None:
    with json_client(fresh) as client:
        client.send(type="resize", cols=101, rows=33)
        client.type("stty size\r")
        client.expect("33 101")
        client.send(type="resize", cols=90, rows=20)
        client.type("sleep 0.3; stty size\r")
        client.expect("20 90")


def test_json_never_splits_a_character_and_shows_bad_bytes(fresh: Session) -> None:
    text = "aé€😀" * 20
    script = " ".join(f"\\\\x{byte:02x}" for byte in text.encode())
    with json_client(fresh) as client:
        # Every byte in a write of its own.
        client.type(f"stty -echo; for b in {script}; do printf $b; sleep 0.005; done; printf 'bad\\xff\\xfeend\\n'\r")
        client.expect(re.escape(text))
        client.expect("bad\ufffd\ufffdend")
        assert not any("\ufffd" in frame["data"] for frame in client.frames if frame["type"] == "output" and "bad" not in frame["data"] and "end" not in frame["data"])


def test_frames_that_are_none_are_refused_with_what_was_expected(fresh: Session) -> None:
    for bad in ("nonsense", '{"type":"x"}', "[]", b"\0ls"):
        with json_client(fresh) as client:
            client.until("status")
            client.socket.send(bad)
            code, reason = close_of(client.socket)
            assert (code, bool(reason)) == (1003, True), bad
    for bad in (b"", b"\x01\0", b"\x02", b"\x7f", '{"type":"input","data":"x"}'):
        with binary_client(fresh) as client:
            client.socket.send(bad)
            code, reason = close_of(client.socket)
            assert (code, bool(reason)) == (1003, True), bad


def test_a_frame_above_64_kib_is_refused(fresh: Session) -> None:
    with json_client(fresh) as client:
        client.until("status")
        client.socket.send(json.dumps({"type": "input", "data": "x" * 70_000}))
        assert close_of(client.socket)[0] == 1009


@pytest.mark.pods
def test_the_end_of_the_session_is_told_with_its_reason_and_then_it_is_over(fresh: Session) -> None:
    with json_client(fresh) as client, binary_client(fresh) as binary:
        client.type("echo up\r")
        client.expect("up")
        fresh.terminate()
        frame = client.until("termination")
        assert frame["reason"] == "ended_by_staff"
        assert len(frame["message"]) > 10
        assert close_of(client.socket)[0] == 1000
        assert binary.until(TERMINATION)["reason"] == "ended_by_staff"
        assert close_of(binary.socket)[0] == 1000


def test_a_session_that_is_over_says_so(fresh: Session) -> None:
    tickets = [fresh.ticket() for _ in range(2)]
    fresh.terminate()
    with dial(fresh) as socket:
        client = JsonClient(socket)
        client.send(type="auth", ticket=tickets[0])
        assert client.until("termination")["reason"] == "ended_by_staff"
        assert close_of(socket)[0] == 4006


def test_a_session_that_starts_shows_its_steps_and_then_its_terminal(server: Server) -> None:
    session = server.create_session("slow-start", ready=False)
    with json_client(session) as client:
        first = client.until("status")
        assert first["state"] in ("created", "initializing")
        client.type("echo in-$((40+2))\r")
        client.expect("in-42", within=40)
        steps = [frame["progress"] for frame in client.frames if frame["type"] == "status" and "progress" in frame]
        numbers = [step["current_step"] for step in steps]
        assert numbers == sorted(numbers) and numbers[0] >= 1
        assert all(step["steps"][step["current_step"] - 1] == step["step_description"] for step in steps)
    session.terminate()


def test_a_session_that_cannot_start_says_why(server: Server) -> None:
    session = server.create_session("broken", ready=False)
    with json_client(session) as client:
        assert client.until("termination", within=40)["reason"] == "setup_failed"
        assert close_of(client.socket)[0] in (1000, 4006)


def test_the_end_of_the_shell_is_no_end_of_the_session(fresh: Session) -> None:
    with json_client(fresh) as client:
        client.type("exit 3\r")
        assert close_of(client.socket)[0] == 1000
        assert not any(frame["type"] == "termination" for frame in client.frames)
    with binary_client(fresh) as client:
        assert client.json[ATTACHED][-1]["resumed"] is False
        client.type(b"exit 3\r")
        assert client.until(EXIT) == {"code": 3}
        assert close_of(client.socket)[0] == 1000
    assert fresh.get()["lifecycle_state"] == "running"


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_time_running_out_ends_the_terminal_to_the_second(server: Server) -> None:
    session = server.create_session("minute")
    with json_client(session) as client:
        while (frame := client.until("status"))["state"] != "running":
            pass
        started = time.monotonic()
        shown = [frame["remaining_seconds"]]
        while (frame := client.read(time.monotonic() + 70))["type"] != "termination":
            if frame["type"] == "status":
                shown.append(frame["remaining_seconds"])
        assert frame["reason"] == "time_expired"
        assert 57 < time.monotonic() - started < 63
        assert shown == sorted(shown, reverse=True) and shown[0] <= 60
        assert close_of(client.socket)[0] == 1000


# --- carrel.v1 ---------------------------------------------------------------------------------------------------


@pytest.mark.pods
def test_binary_output_keeps_every_byte(fresh: Session) -> None:
    with binary_client(fresh) as client:
        client.type(b"stty raw -echo; printf '<<'; printf '\\377\\376\\200\\303'; printf '>>'; stty sane\r")
        assert client.expect(rb"<<(\xff.*?)>>")[1] == b"\xff\xfe\x80\xc3"


def test_the_size_that_is_said_first_is_the_new_terminals(fresh: Session) -> None:
    with binary_client(fresh, cols=133, rows=41) as client:
        client.type(b"stty size\r")
        client.expect(rb"41 133")


@pytest.mark.pods
def test_a_second_connection_comes_into_the_same_terminal_with_its_screen(fresh: Session) -> None:
    with binary_client(fresh) as first:
        assert first.json[ATTACHED][-1] == {"resumed": False, "watching": False}
        first.type(b"cd /tmp; echo kept-$((40+2)); x=remembered\r")
        first.expect(rb"kept-42")
        with binary_client(fresh) as second:
            assert second.json[ATTACHED][-1]["resumed"] is True
            second.expect(rb"kept-42")
            second.type(b"echo $x-$PWD\r")
            second.expect(rb"remembered-/tmp")
            first.expect(rb"remembered-/tmp")
    with binary_client(fresh) as third:
        third.expect(rb"remembered-/tmp")


@pytest.mark.pods
def test_a_megabyte_of_input_arrives_whole(fresh: Session) -> None:
    lines = "".join(f"{index:07d} {os.urandom(40).hex()}\n" for index in range(11_500))
    data = lines.encode()
    assert len(data) > 1_000_000
    with binary_client(fresh) as client:
        # Without echo: the kernel mixes what is left of it with the output of the next program.
        client.type(b"stty -echo; echo go-$((40+2)); cat > /tmp/paste; stty echo; sha256sum < /tmp/paste\r")
        client.expect(rb"go-42\r\n")
        client.send_all(data)
        client.type(b"\x04")
        assert client.expect(rb"([0-9a-f]{64})  -", within=30)[1].decode() == hashlib.sha256(data).hexdigest()


@pytest.mark.pods
def test_output_that_nobody_acknowledges_stops_and_goes_on(fresh: Session) -> None:
    with binary_client(fresh) as client:
        client.expect(rb"[$#] ")
        client.acknowledge = False
        client.received = 0
        client.type(b"yes\r")
        with pytest.raises(TimeoutError):
            while True:
                client.read(time.monotonic() + 2)
        assert 400_000 < client.received < 700_000
        before = rss_kib(fresh.server.pid)
        client.ack(client.received)
        client.acknowledge = True
        deadline = time.monotonic() + 10
        while client.received < 20_000_000:
            client.read(deadline)
            client.output.clear()
        assert rss_kib(fresh.server.pid) - before < 20_000
        client.type(b"\x03")
        client.type(b"echo still-$((40+2))\r")
        client.expect(rb"still-42", within=10)


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_a_client_that_never_acknowledges_is_too_slow(fresh: Session) -> None:
    with binary_client(fresh) as client:
        client.acknowledge = False
        client.type(b"yes\r")
        started = time.monotonic()
        assert close_of(client.socket, within=100)[0] == 4008
        assert 55 < time.monotonic() - started < 80


@contextmanager
def raw(session: Session) -> Iterator[socket.socket]:
    """A JSON client's connection after its handshake, without a library that answers pings."""
    port = session.server.http_port
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(
            f"GET /v1/sessions/{session.id}/terminal HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: Upgrade\r\n"
            f"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}\r\n"
            f"Sec-WebSocket-Protocol: carrel.ticket.{session.ticket()}\r\n\r\n".encode()
        )
        assert connection.recv(65536).startswith(b"HTTP/1.1 101 ")
        yield connection


def drain(connection: socket.socket, within: float) -> float:
    """Reads to the end; returns how long that took."""
    started = time.monotonic()
    while True:
        connection.settimeout(max(0.01, started + within - time.monotonic()))
        try:
            if not connection.recv(1 << 20):
                return time.monotonic() - started
        except ConnectionResetError:
            return time.monotonic() - started


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_a_client_without_a_sign_of_life_is_dropped(fresh: Session) -> None:
    with raw(fresh) as connection:
        assert 40 < drain(connection, within=90) < 80


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_a_client_that_reads_nothing_is_dropped_and_costs_little(fresh: Session) -> None:
    before = rss_kib(fresh.server.pid)
    with raw(fresh) as connection:
        text = b'{"type":"input","data":"yes\\r"}'
        mask = os.urandom(4)
        connection.sendall(bytes([0x81, 0x80 | len(text)]) + mask + bytes(byte ^ mask[at % 4] for at, byte in enumerate(text)))
        # Not a byte is read until the server must have given up.
        time.sleep(72)
        assert rss_kib(fresh.server.pid) - before < 20_000
        drain(connection, within=20)


def test_input_is_taken_while_output_stands(fresh: Session) -> None:
    """The two directions must not wait for each other: input fills its window while no output is acknowledged."""
    with binary_client(fresh) as client:
        client.type(b"stty -echo; sleep 1; cat /dev/zero | tr '\\0' x & exec cat > /dev/null\r")
        client.acknowledge = False
        with pytest.raises(TimeoutError):
            while True:
                client.read(time.monotonic() + 3)
        client.send_all(b"y" * 200_000 + b"\n", within=20)


def test_a_server_that_ends_says_so_and_the_terminal_is_there_again(new_server: Callable[..., Server]) -> None:
    server = new_server()
    session = server.create_session("plain")
    with binary_client(session) as client:
        client.type(b"marker=survived\r")
        client.expect(rb"survived")
        server.stop()
        assert close_of(client.socket)[0] == 1001
    server.start()
    with binary_client(session) as client:
        assert client.json[ATTACHED][-1]["resumed"] is True
        client.type(b"echo $marker-$((40+2))\r")
        client.expect(rb"survived-42")
