"""Much data, slow readers and many connections: everything arrives, memory stays bounded, nobody else is slowed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster import Cluster
from harness import Server, Session, Ssh, rss_kib, told
from waiting import wait_until

MIB = 1 << 20


@pytest.fixture(scope="module")
def busy(work: Path, place: Cluster | None, ssh_key: Path) -> Iterator[tuple[Server, Session]]:
    """A server that only this file uses, so that its memory is this file's doing."""
    with Server(work, options=["--ssh-penalty-exempt", "127.0.0.1/32"], cluster=place) as server:
        yield server, server.create_session("plain", ssh_key=ssh_key)


class Memory:
    """Highest resident memory of a process over a while, KiB above the start."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.peak = self.start = rss_kib(pid)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            with contextlib.suppress(OSError, AssertionError):
                self.peak = max(self.peak, rss_kib(self.pid))

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(5)

    @property
    def grown_mib(self) -> float:
        return (self.peak - self.start) / 1024


def latency(ssh: Ssh, master: object = None, times: int = 5) -> float:
    """The longest of a few short commands, seconds."""
    worst = 0.0
    for number in range(times):
        started = time.monotonic()
        done = (master or ssh).run(f"echo {number}", auth="key", timeout=20)  # type: ignore[attr-defined]
        assert done.stdout == b"%d\n" % number, told(done)
        worst = max(worst, time.monotonic() - started)
    return worst


def stop(*processes: subprocess.Popen[bytes]) -> None:
    """Kills clients. Their pipes are closed and not read: a shared connection holds the other ends."""
    for process in processes:
        process.kill()
    for process in processes:
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()
        process.wait(10)


# --- there and back ----------------------------------------------------------------------------------------------


@pytest.mark.pods
def test_8_mb_of_random_bytes_come_back_the_same(session: Session) -> None:
    data = os.urandom(8 * MIB)
    done = session.ssh.run("cat", input=data, timeout=60)
    assert done.returncode == 0 and len(done.stdout) == len(data), told(done)[:300]
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(data).digest()


@pytest.mark.pods
def test_8_mb_of_random_bytes_pass_a_terminal_in_raw_mode(session: Session) -> None:
    size = 8 * MIB
    script = f"stty raw -echo; head -c {size} /dev/urandom > ~/r; sha256sum < ~/r >&2; cat ~/r; rm ~/r"
    done = session.ssh.run(script, "-tt", timeout=60, input=None)
    # On a terminal both streams are one: the sum's line comes first.
    line, body = done.stdout[:68], done.stdout[68:]
    assert len(body) == size, f"{len(body)} of {size} bytes: {told(done)[:300]}"
    assert line.split()[0].decode() == hashlib.sha256(body).hexdigest()


ECHO = """
import hashlib, subprocess, sys, threading, time
total, rate = int(sys.argv[1]), float(sys.argv[2])
ssh = subprocess.Popen(sys.argv[3:], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
block = bytes(range(256)) * 256
def feed():
    left = total
    try:
        while left:
            left -= ssh.stdin.write(block[:left])
        ssh.stdin.close()
    except BrokenPipeError:
        pass
threading.Thread(target=feed, daemon=True).start()
got, begun, right = 0, time.monotonic(), True
while data := ssh.stdout.read1(65536):
    at = got % 256
    right &= data == (block + block[:256])[at:at + len(data)]
    got += len(data)
    if rate:
        time.sleep(max(0, begun + got / rate - time.monotonic()))
print(got, int(right), ssh.wait(20), time.monotonic() - begun)
"""


def two_way(ssh: Ssh, total: int, rate: float, timeout: float) -> tuple[int, bool, int, float]:
    """Feeds `total` bytes to a remote `cat` and reads its output at `rate` bytes a second (0: as fast as it comes)."""
    argv = [sys.executable, "-c", ECHO, str(total), str(rate), *ssh.argv(auth="key"), "cat"]
    process = subprocess.Popen(argv, env=ssh.env, stdout=subprocess.PIPE, start_new_session=True)
    try:
        out, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        raise AssertionError(f"{total} bytes to `cat` and back stood still: not done within {timeout} s") from None
    got, right, status, seconds = out.split()
    return int(got), right == b"1", int(status), float(seconds)


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("total", "rate"),
    [
        pytest.param(256 * MIB, 0, id="256MiB-fast"),
        pytest.param(256 * MIB, 20e6, id="256MiB-at-20MBps"),
        pytest.param(2048 * MIB, 0, id="2GiB-fast", marks=[pytest.mark.slow, pytest.mark.timeout(240)]),
        pytest.param(2048 * MIB, 20e6, id="2GiB-at-20MBps", marks=[pytest.mark.slow, pytest.mark.timeout(240)]),
    ],
)
def test_two_way_bulk_neither_stands_still_nor_grows_memory(busy: tuple[Server, Session], total: int, rate: float) -> None:
    server, session = busy
    with Memory(server.pid) as memory:
        got, right, status, seconds = two_way(session.ssh, total, rate, timeout=180)
    assert (got, right, status) == (total, True, 0), f"{got} of {total} bytes, right: {right}, status {status}"
    print(f"{total / 1e6 / seconds:.0f} MB/s, memory +{memory.grown_mib:.1f} MiB")
    assert memory.grown_mib <= 32, f"the server grew by {memory.grown_mib:.1f} MiB"


@pytest.mark.timeout(120)
def test_output_waits_for_a_reader_that_stops_and_goes_on(busy: tuple[Server, Session]) -> None:
    server, session = busy
    with Memory(server.pid) as memory:
        client = session.ssh.popen(f"head -c {64 * MIB} /dev/zero; echo END; exit 6", auth="key", bufsize=0)
        try:
            assert client.stdout
            first = client.stdout.read(1000)
            time.sleep(8)
            rest = client.stdout.read()
            while more := client.stdout.read(MIB):
                rest += more
            assert client.wait(30) == 6
            assert len(first) + len(rest) == 64 * MIB + 4 and rest.endswith(b"END\n")
        finally:
            stop(client)
    assert memory.grown_mib <= 32, f"the server grew by {memory.grown_mib:.1f} MiB"


@pytest.mark.timeout(120)
def test_input_waits_for_a_command_that_stops_and_goes_on(busy: tuple[Server, Session]) -> None:
    server, session = busy
    with Memory(server.pid) as memory:
        done = session.ssh.run("sleep 8; sha256sum", input=b"\x5a" * (64 * MIB), timeout=90)
    assert done.stdout.split()[0].decode() == hashlib.sha256(b"\x5a" * (64 * MIB)).hexdigest(), told(done)
    assert memory.grown_mib <= 32, f"the server grew by {memory.grown_mib:.1f} MiB"


# --- stalled readers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 100, 300], ids=lambda size: f"{size}B-writes")
def test_a_stalled_reader_of_tiny_writes_harms_no_other_channel(session: Session, size: int) -> None:
    """Tiny frames that nobody takes must not end the environment's stream (h2's budget)."""
    with session.ssh.master(auth="key") as master:
        word = "x" * (size - 1)
        stalled = master.popen(f"while :; do echo {word}; done", bufsize=0)
        talker = master.popen("cat", bufsize=0)
        try:
            assert stalled.stdout and talker.stdin and talker.stdout
            assert stalled.stdout.read(1)
            deadline = time.monotonic() + 6
            while time.monotonic() < deadline:
                talker.stdin.write(b"ping\n")
                assert talker.stdout.read(5) == b"ping\n", "the neighbour's shell ended"
                time.sleep(0.05)
            assert latency(session.ssh, master) < 3
            assert latency(session.ssh) < 3, "a connection of its own is slowed"
            assert stalled.poll() is None, "the stalled command's own channel was ended"
            # And the stalled one goes on where it stopped.
            for _ in range(40):
                assert stalled.stdout.read(65536), "the stalled channel does not go on"
        finally:
            stop(stalled, talker)


@pytest.mark.parametrize("size", [1, 100, 300], ids=lambda size: f"{size}B-writes")
def test_a_stalled_command_fed_by_tiny_writes_harms_no_other_channel(session: Session, size: int) -> None:
    with session.ssh.master(auth="key") as master:
        stalled = master.popen("echo up; exec sleep 60", bufsize=0)
        assert stalled.stdin and stalled.stdout and stalled.stdout.read(3) == b"up\n"
        os.set_blocking(stalled.stdin.fileno(), False)
        try:
            deadline = time.monotonic() + 6
            sent = 0
            while time.monotonic() < deadline:
                with contextlib.suppress(BlockingIOError):
                    sent += os.write(stalled.stdin.fileno(), b"y" * size)
                if sent % (size * 2000) == 0:
                    time.sleep(0.001)
            assert latency(session.ssh, master) < 3
            assert latency(session.ssh) < 3
            assert stalled.poll() is None, "the stalled command was ended"
        finally:
            stop(stalled)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("direction", ["output", "input"])
def test_16_stalled_channels_and_one_that_types(busy: tuple[Server, Session], direction: str) -> None:
    server, session = busy
    ssh = session.ssh
    with contextlib.ExitStack() as stack, Memory(server.pid) as memory:
        masters = [stack.enter_context(ssh.master(auth="key")) for _ in range(3)]
        stalled = []
        stack.callback(lambda: stop(*stalled))
        for number in range(16):
            if direction == "output":
                client = masters[number % 3].popen("cat /dev/zero", bufsize=0)
                assert client.stdout and client.stdout.read(1)
            else:
                client = masters[number % 3].popen("echo up; exec sleep 100", bufsize=0, stdin=subprocess.PIPE)
                assert client.stdout and client.stdout.read(3) == b"up\n" and client.stdin
                os.set_blocking(client.stdin.fileno(), False)
            stalled.append(client)
        if direction == "input":
            deadline = time.monotonic() + 4
            while time.monotonic() < deadline:
                for client in stalled:
                    with contextlib.suppress(BlockingIOError):
                        os.write(client.stdin.fileno(), bytes(65536))
        else:
            time.sleep(3)
        with ssh.terminal("cat", "-S", str(masters[0].control), "-o", "ControlMaster=no", "-o", "ProxyCommand=false") as terminal:
            waits = []
            for number in range(30):
                started = time.monotonic()
                terminal.send(f"key{number}\r")
                terminal.expect(f"key{number}\r?\n.*?key{number}\r?\n", within=10)
                waits.append(time.monotonic() - started)
        assert statistics.median(waits) < 0.25 and max(waits) < 2, f"typing takes {statistics.median(waits):.3f} s, at worst {max(waits):.3f} s"
        assert latency(ssh) < 3
        assert all(client.poll() is None for client in stalled), "stalled channels were ended"
    print(f"memory +{memory.grown_mib:.1f} MiB")
    assert memory.grown_mib <= 16 * 10 + 32, f"the server grew by {memory.grown_mib:.1f} MiB for 16 stalled channels"


def test_one_stalled_channel_does_not_slow_bulk_on_another(session: Session) -> None:
    with session.ssh.master(auth="key") as master:
        stalled = master.popen("cat /dev/zero", bufsize=0)
        try:
            assert stalled.stdout and stalled.stdout.read(1)
            started = time.monotonic()
            done = master.run(f"head -c {64 * MIB} /dev/zero | sha256sum; head -c {64 * MIB} /dev/zero", timeout=60)
            assert done.returncode == 0 and len(done.stdout) > 64 * MIB
            assert time.monotonic() - started < 20
        finally:
            stop(stalled)


# --- many --------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(180)
@pytest.mark.pods
def test_200_commands_killed_at_once_harm_nobody(busy: tuple[Server, Session]) -> None:
    """Each leaves an open channel behind a dead connection: resets in bulk must not end the environment's stream."""
    server, session = busy
    ssh = session.ssh
    for _ in range(2):
        with contextlib.ExitStack() as stack:
            witness = ssh.popen("cat", auth="key", bufsize=0)
            stack.callback(lambda: stop(witness))
            assert witness.stdin and witness.stdout
            # 25 connections of 8 channels: within the limits of 32 connections and 8 channels.
            masters = []
            with ThreadPoolExecutor(5) as pool:
                managers = [ssh.master(auth="key") for _ in range(25)]
                masters = list(pool.map(stack.enter_context, managers))
            commands = [master.popen("echo up; exec sleep 300", bufsize=0) for master in masters for _ in range(8)]
            stack.callback(lambda: stop(*commands))
            assert len(commands) == 200
            for command in commands:
                assert command.stdout and command.stdout.read(3) == b"up\n", command.communicate()
            for master in masters:
                master.process.kill()
            for command in commands:
                command.kill()
            witness.stdin.write(b"still here\n")
            assert witness.stdout.read(11) == b"still here\n", "a bystander's command was ended"
            wait_until(
                "the 200 commands are gone",
                lambda: ssh.run("pgrep -xc sleep || ps ax | grep -c '[s]leep 300'", auth="key").stdout.split()[:1] == [b"0"],
                within=25,
                every=0.5,
            )
            witness.stdin.write(b"and now\n")
            assert witness.stdout.read(8) == b"and now\n"
    assert latency(ssh) < 3


@pytest.mark.pods
def test_30_connections_at_once(session: Session) -> None:
    def one(number: int) -> tuple[int, bytes]:
        done = session.ssh.run(f"sleep 1; echo {number}; exit {number}", timeout=60, auth="key" if number % 2 else "password")
        return done.returncode, done.stdout + done.stderr

    with ThreadPoolExecutor(30) as pool:
        results = list(pool.map(one, range(30)))
    assert results == [(number, b"%d\n" % number) for number in range(30)]


@pytest.mark.pods
def test_8_channels_on_one_connection_and_the_9th_is_refused(session: Session) -> None:
    with session.ssh.master(auth="key") as master:
        channels = [master.popen(f"echo up{number}; read line; echo $line; exit {number}", bufsize=0) for number in range(8)]
        try:
            for number, channel in enumerate(channels):
                assert channel.stdout and channel.stdout.read(4) == b"up%d\n" % number
            ninth = master.run("echo ninth", "-o", "LogLevel=INFO")
            assert ninth.returncode == 255 and ninth.stdout == b"", f"the ninth channel was not refused: {told(ninth)}"
            assert b"refused" in ninth.stderr or b"too many" in ninth.stderr.lower(), told(ninth)
            for number, channel in enumerate(channels):
                out, err = channel.communicate(b"line\n", timeout=10)
                assert (out, channel.returncode) == (b"line\n", number), (out, err)
            assert master.out("echo room again") == "room again"
        finally:
            stop(*channels)


@pytest.mark.pods
def test_8_channels_carry_bulk_at_once(session: Session) -> None:
    with session.ssh.master(auth="key") as master, ThreadPoolExecutor(8) as pool:
        data = os.urandom(4 * MIB)
        results = list(pool.map(lambda _: master.run("cat", input=data, timeout=90), range(8)))
    assert all(done.returncode == 0 and done.stdout == data for done in results), [told(done)[:200] for done in results]


@pytest.mark.timeout(90)
def test_more_connections_than_a_session_may_have_are_refused_with_a_reason(busy: tuple[Server, Session]) -> None:
    _, session = busy
    ssh = session.ssh
    clients: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(32):
            client = ssh.popen("echo up; exec sleep 100", auth="key", bufsize=0)
            clients.append(client)
            assert client.stdout and client.stdout.read(3) == b"up\n", f"connection {len(clients)} of 32: {client.communicate()}"
        over = ssh.run("echo in", auth="key", timeout=20)
        assert over.returncode == 255 and over.stdout == b"", f"the 33rd connection was let in: {told(over)}"
        assert over.stderr.strip(), "the 33rd connection was refused without a word"
        # One that opens no channel is not kept either: nobody would count it.
        idle = ssh.popen(None, "-N", auth="key")
        clients.append(idle)
        _, told_idle = idle.communicate(timeout=25)
        assert idle.returncode == 255 and told_idle.strip(), (idle.returncode, told_idle)
    finally:
        stop(*clients)
    wait_until("there is room again", lambda: ssh.run("echo in", auth="key").stdout == b"in\n", within=15)


def test_memory_comes_back_and_an_idle_connection_is_small(busy: tuple[Server, Session]) -> None:
    server, session = busy
    with session.ssh.master(auth="key") as warm:
        warm.out("true")
        before = rss_kib(server.pid)
        with contextlib.ExitStack() as stack:
            for _ in range(25):
                stack.enter_context(session.ssh.master(auth="key"))
            grown = rss_kib(server.pid) - before
    print(f"{grown / 25:.0f} KiB per idle connection")
    assert grown / 25 < 400, f"{grown / 25:.0f} KiB per idle connection"
