"""Who gets in and who does not, what they are told, and what the server keeps to itself."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import re
import resource
import socket
import statistics
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import paramiko
import pytest

from cluster import Cluster
from harness import Server, Session, Ssh, rss_kib, told
from test_websocket import json_client
from waiting import wait_until

DENIED = b"Permission denied"


def denied(ssh: Ssh, user: str, password: str | None = None, auth: str = "password") -> tuple[int, bytes]:
    """Status and what was said, with the user's name blanked out."""
    done = ssh.run("echo in", user=user, password=password, auth=auth, timeout=30)
    assert done.stdout == b"", f"{user!r} was let in"
    return done.returncode, done.stderr.replace(user.encode(), b"USER")


# --- in ----------------------------------------------------------------------------------------------------------


def test_password_and_key_let_the_owner_in(session: Session) -> None:
    assert session.ssh.out("echo in", auth="password") == "in"
    assert session.ssh.out("echo in", auth="key") == "in"


def test_user_and_session_together_let_the_owner_in(session: Session) -> None:
    name = f"{session.user_id}+{session.id}"
    for auth in ("password", "key"):
        done = session.ssh.run("echo in", user=name, auth=auth)
        assert done.stdout == b"in\n", told(done)


def test_the_api_tells_a_command_that_works(session: Session) -> None:
    ssh = session.data["ssh"]
    assert ssh["username"] == session.id
    assert str(ssh["port"]) in ssh["command"] and ssh["username"] in ssh["command"] and ssh["host"] in ssh["command"]
    assert ssh["password"] not in ssh["command"], "the password stands in the command line"


# --- out ---------------------------------------------------------------------------------------------------------


def test_a_wrong_password_is_denied(session: Session) -> None:
    for wrong in ("wrong", "", " ", session.ssh.password + "x", session.ssh.password[:-1], session.ssh.password.swapcase(), "x" * 5000):
        status, said = denied(session.ssh, session.id, wrong)
        assert status == 255 and DENIED in said, (wrong[:20], said)
    assert session.ssh.out("echo in") == "in", "wrong passwords locked the owner out"


def test_a_key_of_somebody_else_is_denied(session: Session, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "k")], check=True, timeout=20)
    done = session.ssh.run("echo in", "-o", f"IdentityFile={tmp_path / 'k'}", "-o", "PreferredAuthentications=publickey")
    assert done.returncode == 255 and DENIED in done.stderr and done.stdout == b"", told(done)


def test_unknown_and_foreign_sessions_are_denied_alike(session: Session, fresh: Session) -> None:
    mine = session.ssh
    answers = {
        "unknown session": denied(mine, str(uuid.uuid4())),
        "foreign session": denied(mine, fresh.id),
        "foreign session, own user": denied(mine, f"{session.user_id}+{fresh.id}"),
        "own session, foreign user": denied(mine, f"{fresh.user_id}+{session.id}"),
        "own session, unknown user": denied(mine, f"{uuid.uuid4()}+{session.id}"),
        "wrong password": denied(mine, session.id, "wrong-password"),
        "foreign key": denied(mine, str(uuid.uuid4()), auth="key"),
    }
    assert all(status == 255 and DENIED in said for status, said in answers.values()), answers
    by_password = {name: said for name, (_, said) in answers.items() if name != "foreign key"}
    assert len(set(by_password.values())) == 1, f"denials differ: {by_password}"


MALFORMED = {
    "root": "root",
    "empty half": "+",
    "no session": f"{uuid.uuid4()}+",
    "three parts": f"{uuid.uuid4()}+{uuid.uuid4()}+{uuid.uuid4()}",
    "sql": "' or 1=1 --",
    "traversal": "../../etc/passwd",
    "long": "a" * 3000,
    "nul-like": "a\\0b",
    "braces": "{" + str(uuid.uuid4()) + "}",
    "simple form": uuid.uuid4().hex,
    "unicode": "ünïcödé-🎓",
    "format": "%s%n%x$(id)`id`",
    "blank": " ",
}


@pytest.mark.parametrize("name", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_user_name_is_denied_like_any_other(session: Session, name: str) -> None:
    # By paramiko: OpenSSH's own client refuses to send some of these.
    for password in ("wrong", session.ssh.password):
        with pytest.raises(paramiko.AuthenticationException) as denial:
            raw_login(session.ssh, name, password)
        assert not isinstance(denial.value, paramiko.BadAuthenticationType), f"{name!r} is told other methods: {denial.value}"
    assert session.ssh.out("echo in", auth="key") == "in"


def test_hostile_user_names_do_not_break_the_log(work: Path, new_server: Callable[..., Server]) -> None:
    server = new_server(options=["--log-format", "json"])
    session = server.create_session()
    for name in ("a\nINFO forged line", "\x1b[31mred\x1b[0m", "\r\n\r\n"):
        with pytest.raises(paramiko.SSHException):
            raw_login(session.ssh, name, "x")
    log = server.log.read_text(errors="replace")
    assert "\x1b[31mred" not in log and not re.search(r"^INFO forged line", log, re.M), "a user name writes into the log raw"


def raw_login(ssh: Ssh, user: str, password: str) -> paramiko.Transport:
    """A login by paramiko, which sends any name."""
    transport = paramiko.Transport((ssh.host, ssh.port))
    try:
        transport.start_client(timeout=15)
        transport.auth_password(user, password, fallback=False)
    except BaseException:
        transport.close()
        raise
    return transport


def test_none_is_refused_at_once_and_names_the_methods(session: Session) -> None:
    transport = paramiko.Transport((session.ssh.host, session.ssh.port))
    try:
        transport.start_client(timeout=15)
        started = time.monotonic()
        with pytest.raises(paramiko.BadAuthenticationType) as refused:
            transport.auth_none(session.id)
        assert time.monotonic() - started < 0.5, "the first `none` is made to wait: 86 checks would lose minutes"
        assert set(refused.value.allowed_types) == {"publickey", "password"}
    finally:
        transport.close()


def test_the_fourth_password_of_one_connection_is_not_heard(session: Session) -> None:
    tried = session.ssh.run("echo in", "-o", "NumberOfPasswordPrompts=6", "-o", "LogLevel=INFO", password="wrong")
    assert tried.returncode == 255
    assert b"too many failed logins" in tried.stderr, told(tried)
    assert tried.stderr.count(b"please try again") <= 3, told(tried)


def test_nothing_is_opened_before_a_login(session: Session) -> None:
    transport = paramiko.Transport((session.ssh.host, session.ssh.port))
    try:
        transport.start_client(timeout=15)
        with pytest.raises((paramiko.SSHException, EOFError, OSError)):
            transport.open_session(timeout=10)
    finally:
        transport.close()
    assert session.ssh.out("echo in") == "in"


@pytest.mark.parametrize("how", ["submit", "terminate"])
def test_an_ended_session_says_why_and_lets_nobody_in(server: Server, ssh_key: Path, how: str) -> None:
    session = server.create_session(ssh_key=ssh_key)
    assert session.ssh.out("echo in") == "in"
    server.ok("POST", f"/sessions/{session.id}/{how}")
    for auth in ("password", "key"):
        done = session.ssh.run("echo in", auth=auth, timeout=30)
        assert done.returncode == 255 and done.stdout == b"", told(done)
        lines = [line for line in done.stderr.decode().splitlines() if line.strip()]
        assert any(re.search(r"\b(over|ended|handed in|submitted|terminated|closed)\b", line, re.I) for line in lines), f"no reason: {told(done)}"
    wrong = session.ssh.run("echo in", password="wrong")
    assert wrong.returncode == 255 and DENIED in wrong.stderr
    assert not re.search(rb"handed in|submitted|ended by", wrong.stderr), f"a stranger learns how the session ended: {told(wrong)}"


def test_failures_cost_only_the_address_they_come_from(new_server: Callable[..., Server]) -> None:
    server = new_server()
    session = server.create_session()
    blocked = b""
    for _ in range(60):
        done = session.ssh.run("echo in", "-b", "127.0.0.66", "-o", "NumberOfPasswordPrompts=3", "-o", "LogLevel=INFO", password="wrong")
        assert done.returncode == 255
        if DENIED not in done.stderr:
            blocked = done.stderr
            break
    assert blocked, "60 connections with three wrong passwords each were all heard"
    owner = session.ssh.run("echo in", "-b", "127.0.0.66", timeout=20)
    assert owner.returncode == 255, "the penalty is not for the address"
    assert session.ssh.out("echo in", "-b", "127.0.0.67") == "in", "another address pays for it"
    # A failure a second is forgiven.
    wait_until("the address may try again", lambda: session.ssh.run("echo in", "-b", "127.0.0.66").stdout == b"in\n", within=90, every=2)


# --- secrets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["debug", "trace"])
def test_no_secret_and_no_keystroke_reaches_the_log_or_a_command_line(
    work: Path, place: Cluster | None, ssh_key: Path, level: str
) -> None:
    with Server(work, env={"RUST_LOG": level, "CARREL_LOG": level}, cluster=place) as server:
        session = server.create_session(ssh_key=ssh_key)
        kinds = ("typed", "wrong", "printed", "stdin", "browser")
        typed, wrong, printed, stdin, browser = (f"secret-{kind}-{uuid.uuid4().hex}" for kind in kinds)
        session.ssh.run("echo in", password=wrong)
        ticket = session.ticket()
        server.http("GET", "/exams", key="carrel_wrong_" + wrong)
        with session.ssh.terminal() as terminal:
            terminal.ask("true")
            terminal.send(f": {typed}\r")
            assert terminal.ask("echo shown")
            for entry in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    line = entry.read_bytes()
                    for secret in (session.ssh.password, server.key, ticket):
                        assert secret.encode() not in line, f"a secret stands in a command line: {line[:300]!r}"
            terminal.send("exit\r")
            terminal.wait()
        session.ssh.run(f"cat; echo {printed}", input=stdin.encode())
        session.ssh.run("cat; echo out", input=stdin.encode(), auth="key")
        with json_client(session) as client:
            client.type(f"echo {browser}; echo se''en\r")
            client.expect("seen")
        log = server.log.read_text(errors="replace")
        assert session.id in log, "the log does not name the session: is anything logged at all?"
        secrets = {
            "password": session.ssh.password,
            "API key": server.key,
            "ticket": ticket,
            "wrong password": wrong,
            "keystrokes": typed,
            "keystrokes of a browser": browser,
            "output": printed,
            "input": stdin,
        }
        found = {}
        for kind, secret in secrets.items():
            as_bytes = ", ".join(str(byte) for byte in secret.encode()[:24])
            as_hex = secret.encode()[:24].hex()
            for line in log.splitlines():
                if secret in line or as_bytes in line or as_hex in line.replace(" ", "").lower():
                    found[kind] = line[:300]
                    break
        assert not found, f"the log at level {level} shows: {found}"
    stored = b"".join(path.read_bytes() for path in server.data_dir.glob("*") if path.is_file())
    for kind in ("password", "API key", "ticket"):
        assert secrets[kind].encode() not in stored, f"the {kind} is stored in the clear"


def test_the_data_directory_is_closed_to_others(server: Server) -> None:
    assert server.data_dir.stat().st_mode & 0o077 == 0, oct(server.data_dir.stat().st_mode)
    for path in server.data_dir.glob("*key*"):
        assert path.stat().st_mode & 0o077 == 0, f"{path} is readable by others"


# --- floods and silence ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(90)
def test_a_connection_that_does_not_log_in_is_closed_after_30_s(server: Server) -> None:
    def connect(first: bytes) -> socket.socket:
        one = socket.create_connection(("127.0.0.1", server.ssh_port), timeout=10)
        one.sendall(first)
        return one

    silent, half, hello = connect(b""), connect(b"SSH-2.0-half"), connect(b"SSH-2.0-Test_1\r\n")
    idle = paramiko.Transport(("127.0.0.1", server.ssh_port))
    idle.start_client(timeout=15)
    started = time.monotonic()
    for name, one in (("silent", silent), ("half a version", half), ("version only", hello)):
        one.settimeout(45 - (time.monotonic() - started))
        try:
            while one.recv(4096):
                pass
        except ConnectionResetError:
            pass
        except TimeoutError:
            raise AssertionError(f"the {name} connection is still open after 45 s") from None
        waited = time.monotonic() - started
        assert waited > 20, f"the {name} connection was closed after {waited:.0f} s: too short to type a password"
        one.close()
    wait_until("the one that does not authenticate is closed as well", lambda: not idle.is_active(), within=15)
    idle.close()


@pytest.mark.timeout(150)
def test_a_flood_of_600_connections_is_bounded_and_others_get_in(new_server: Callable[..., Server]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    server = new_server()
    session = server.create_session()
    before = rss_kib(server.pid)
    flood: list[socket.socket] = []
    try:
        with session.ssh.master() as inside:
            for number in range(600):
                one = socket.socket()
                one.settimeout(10)
                one.bind((f"127.0.1.{number % 200 + 1}", 0))
                one.connect(("127.0.0.1", server.ssh_port))
                flood.append(one)
            open_now = 0
            refused_with_a_word = 0
            time.sleep(1.5)
            for one in flood:
                one.setblocking(False)
                data = b""
                try:
                    while more := one.recv(4096):
                        data += more
                    refused_with_a_word += b"try again" in data
                except BlockingIOError:
                    open_now += 1
                except OSError:
                    pass
            assert open_now <= 512, f"{open_now} unauthenticated connections are open"
            assert open_now >= 200, f"only {open_now} of 600 are open: the server refuses far too early"
            assert inside.out("echo still") == "still", "somebody inside was disturbed"
            tries = 0
            deadline = time.monotonic() + 60
            while True:
                tries += 1
                if session.ssh.run("echo in", timeout=40).stdout == b"in\n":
                    break
                assert time.monotonic() < deadline, f"{tries} attempts and nobody gets in"
            print(f"{open_now} open, {refused_with_a_word} told to try again, in after {tries} attempts")
            assert rss_kib(server.pid) - before < 100_000, "the flood costs more than 100 MB"
    finally:
        for one in flood:
            one.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    wait_until("after the flood everybody gets in", lambda: session.ssh.run("echo in").stdout == b"in\n", within=10)


def test_a_burst_of_new_sessions_leaves_the_server_small(new_server: Callable[..., Server]) -> None:
    server = new_server()
    server.create_session(ready=False)
    before = rss_kib(server.pid)
    # Each has a password, and hashing one takes 19 MiB, which the server keeps for as many as it hashes at once.
    kept = min(max((os.cpu_count() or 1) // 2, 2), 16) * 19 * 1024
    with concurrent.futures.ThreadPoolExecutor(40) as executor:
        list(executor.map(lambda _: server.create_session(ready=False), range(40)))
    grown = rss_kib(server.pid) - before
    print(f"{grown} KiB more after 40 at once")
    assert grown < kept + 40_000


GARBAGE = {
    "random": os.urandom(4096),
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "tls": bytes.fromhex("16030100") + os.urandom(300),
    "long version": b"SSH-2.0-" + b"x" * 100_000,
    "many lines": b"hello\r\n" * 20_000,
    "huge packet": b"SSH-2.0-x\r\n" + b"\xff\xff\xff\xff" + b"\x00" * 5000,
    "zero packet": b"SSH-2.0-x\r\n" + b"\x00" * 5000,
    "old version": b"SSH-1.5-x\r\n",
}


@pytest.mark.parametrize("what", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_ends_only_its_own_connection(session: Session, what: bytes) -> None:
    with session.ssh.master(auth="key") as bystander:
        for _ in range(3):
            with contextlib.suppress(OSError), socket.create_connection((session.ssh.host, session.ssh.port), timeout=5) as one:
                one.settimeout(5)
                one.sendall(what)
                with contextlib.suppress(OSError):
                    while one.recv(65536):
                        pass
        assert bystander.out("echo alive") == "alive"
    assert session.ssh.out("echo in", auth="key") == "in"


@pytest.mark.timeout(120)
def test_denials_take_the_same_time(session: Session, fresh: Session) -> None:
    """Whether a session exists is not told by the clock. Compared are medians, generously: 23 ms of hashing would show."""
    names = {"existing": fresh.id, "unknown": str(uuid.uuid4()), "malformed": "nobody"}
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(9):
        for kind, name in names.items():
            transport = paramiko.Transport((session.ssh.host, session.ssh.port))
            try:
                transport.start_client(timeout=15)
                started = time.monotonic()
                with pytest.raises(paramiko.AuthenticationException):
                    transport.auth_password(name, "wrong", fallback=False)
                times[kind].append(time.monotonic() - started)
            finally:
                transport.close()
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    spread = max(medians.values()) - min(medians.values())
    assert spread < 0.015, f"denials differ by {1000 * spread:.0f} ms: {medians}"
