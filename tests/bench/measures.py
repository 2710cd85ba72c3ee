"""What both comparisons measure, through the OpenSSH client, and how they print it. Knows no environment."""

from __future__ import annotations

import contextlib
import os
import pathlib
import pwd
import select
import shutil
import signal
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[2]
CARREL = os.environ.get("CARREL_BIN", str(ROOT / "target/release/carrel"))
MIB = 1 << 20

Figures = dict[str, dict[str, float]]
"""The rows of each server, by its name."""


class Aim(NamedTuple):
    """What a row is to reach: at most `limit`, or at least; in its ratio to the peer's figure, or by itself."""

    limit: float
    at_least: bool = False
    ratio: bool = True

    def text(self, value: float | None) -> str:
        """The aim, and whether it is reached."""
        aim = f"{'>=' if self.at_least else '<='} {self.limit:g}"
        if value is None:
            return aim
        reached = value >= self.limit if self.at_least else value <= self.limit
        return f"{aim} {'yes' if reached else 'NO'}"


class Server:
    """A running server: how to reach it, and which processes are it."""

    def __init__(self, name: str, pid: int, target: str, options: Sequence[str]) -> None:
        self.name, self.pid, self.target = name, pid, target
        self.options = options

    def ssh(self, *arguments: str, options: Sequence[str] = ()) -> list[str]:
        return ["ssh", *self.options, *options, self.target, *arguments]

    def pss(self) -> int:
        """Proportional memory of the server and its children that are not the environment, bytes."""
        total, waiting = 0, [self.pid]
        while waiting:
            pid = waiting.pop()
            try:
                rollup = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
                name = pathlib.Path(f"/proc/{pid}/comm").read_text().strip()
                children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            except OSError:
                continue
            if name in ("bwrap", "carrel-agent"):
                continue
            total += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
            waiting += map(int, children)
        return total * 1024


# --- servers -----------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for_port(port: int, deadline: float = 10) -> None:
    end = time.monotonic() + deadline
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.02)
    raise SystemExit(f"nothing listens on port {port}")


@contextlib.contextmanager
def ended(process: subprocess.Popen[Any]) -> Iterator[subprocess.Popen[Any]]:
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def workplace() -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
    """A directory for the run, and a client's key in it. SIGTERM ends the run in order, as Ctrl-C does."""
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(SystemExit(143)))
    with tempfile.TemporaryDirectory(prefix="carrel-bench-") as folder:
        work = pathlib.Path(folder)
        key = work / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        yield work, key


def client_options(key: pathlib.Path, known_hosts: pathlib.Path, port: int) -> list[str]:
    return ["-F", "none", "-o", "IdentitiesOnly=yes", "-o", "LogLevel=ERROR", "-o", "PreferredAuthentications=publickey",
            "-o", "StrictHostKeyChecking=yes", "-i", str(key), "-o", f"UserKnownHostsFile={known_hosts}", "-p", str(port)]


@contextlib.contextmanager
def sshd(work: pathlib.Path, key: pathlib.Path, name: str = "sshd", settings: str = "") -> Iterator[Server]:
    """Debian's sshd on a port of its own, with key login; `settings` are further lines of its configuration."""
    folder = work / "sshd"
    (folder / "home").mkdir(parents=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "host"], check=True)
    port = free_port()
    if os.getuid() == 0:
        pathlib.Path("/run/sshd").mkdir(exist_ok=True)
    (folder / "authorized").write_text(key.with_suffix(".pub").read_text())
    # A home without a developer's .bashrc, which costs a login whatever is in it.
    (folder / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile none\nUsePAM no\nStrictModes no\n"
        f"AuthorizedKeysFile {folder}/authorized\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
        f"MaxStartups 1000\nMaxSessions 100\nSetEnv HOME={folder}/home\n{settings}"
    )
    (folder / "known").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    daemon = subprocess.Popen([shutil.which("sshd") or "/usr/sbin/sshd", "-D", "-e", "-f", folder / "config"],
                              stderr=(folder / "log").open("w"))
    with ended(daemon):
        wait_for_port(port)
        user = pwd.getpwuid(os.getuid()).pw_name
        yield Server(name, daemon.pid, f"{user}@127.0.0.1", client_options(key, folder / "known", port))


def carrel_server(work: pathlib.Path, key: pathlib.Path, pid: int, ssh: dict[str, Any]) -> Server:
    """A session, by the `ssh` that the API told of it; returned when its environment answers."""
    known = work / "known"
    known.write_text(ssh["known_hosts"].rstrip("\n") + "\n")
    server = Server("carrel", pid, f"{ssh['username']}@{ssh['host']}", client_options(key, known, ssh["port"]))
    subprocess.run(server.ssh("true"), check=True, timeout=90, stdin=subprocess.DEVNULL)
    return server


class Cut(Exception):
    """A transfer that ended before its end."""


# --- measures ----------------------------------------------------------------------------------------------------


def check_ms(server: Server, command: str = "true") -> float:
    """The whole client process, which must exit with 0."""
    start = time.perf_counter()
    subprocess.run(server.ssh(command), check=True, stdin=subprocess.DEVNULL)
    return (time.perf_counter() - start) * 1000


def connections_a_second(server: Server, count: int) -> float:
    left = iter(range(count))
    lock = threading.Lock()
    failures: list[Exception] = []

    def work() -> None:
        while True:
            with lock:
                if next(left, None) is None:
                    return
            try:
                check_ms(server)
            except subprocess.CalledProcessError as error:
                failures.append(error)
                return

    start = time.perf_counter()
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return count / (time.perf_counter() - start)


@contextlib.contextmanager
def echo(server: Server) -> Iterator[subprocess.Popen[bytes]]:
    """A raw `cat` on a terminal."""
    client = subprocess.Popen(server.ssh("stty raw -echo; echo ready; exec cat", options=["-tt"]), stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, bufsize=0)
    try:
        seen = b""
        while b"ready" not in seen:
            got = client.stdout.read(100)
            assert got, f"{server.name}: the terminal ended: {seen!r}"
            seen += got
        select.select([client.stdout], [], [], 0.2)
        os.set_blocking(client.stdout.fileno(), False)
        client.stdout.read(1000)
        os.set_blocking(client.stdout.fileno(), True)
        yield client
    finally:
        client.kill()
        client.wait()


def keystrokes(client: subprocess.Popen[bytes], count: int) -> list[float]:
    """From a key to its echo, ms."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        client.stdin.write(b"x")
        client.stdout.read(1)
        times.append((time.perf_counter() - start) * 1000)
        time.sleep(0.002)
    return times


def down(server: Server, size: int, command: str) -> float:
    """MB/s of what the command writes, which must be `size` bytes."""
    start = time.perf_counter()
    client = subprocess.Popen(server.ssh(command), stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    got = 0
    while chunk := client.stdout.read1(MIB):
        got += len(chunk)
    if client.wait() != 0 or got != size:
        raise Cut(f"{server.name}: {got} of {size} bytes down, status {client.returncode}")
    return size / (time.perf_counter() - start) / 1e6


def up(server: Server, size: int, block: bytes = bytes(MIB)) -> float:
    """MB/s of a block that is sent again and again until `size` bytes are there."""
    start = time.perf_counter()
    client = subprocess.Popen(server.ssh("wc -c"), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    left = size
    with contextlib.suppress(BrokenPipeError):
        while left:
            left -= client.stdin.write(block[:left])
        client.stdin.close()
    counted = client.stdout.read().strip()
    if client.wait() != 0 or counted != b"%d" % size:
        raise Cut(f"{server.name}: {counted!r} of {size} bytes up, status {client.returncode}")
    return size / (time.perf_counter() - start) / 1e6


class Comparison:
    """Figures of servers that are measured in turn."""

    def __init__(self, servers: Sequence[Server]) -> None:
        self.servers = servers
        self.figures: Figures = {server.name: {} for server in servers}

    def interleaved(self, row: str, times: int, function: Callable[[Server], float],
                    summary: Callable[[list[float]], float] = statistics.median) -> None:
        """One value of each server in turn, so many times; the row is their summary."""
        values: dict[str, list[float]] = {server.name: [] for server in self.servers}
        for _ in range(times):
            for server in self.servers:
                values[server.name].append(function(server))
        for name, got in values.items():
            self.figures[name][row] = summary(got)

    def echo(self, rounds: int) -> None:
        """Keystrokes, a hundred at each server in turn, each on a terminal that stays open."""
        with contextlib.ExitStack() as stack:
            clients = {server.name: stack.enter_context(echo(server)) for server in self.servers}
            times: dict[str, list[float]] = {name: [] for name in clients}
            for _ in range(rounds):
                for name, client in clients.items():
                    times[name] += keystrokes(client, 100)
        for name, values in times.items():
            values.sort()
            self.figures[name]["echo p50, ms"] = values[len(values) // 2]
            self.figures[name]["echo p99, ms"] = values[len(values) * 99 // 100]


def print_table(figures: Figures, peer: str, ours: str, aims: dict[str, Aim] | None = None) -> None:
    """A row a line: the peer's figure, ours, our part of the peer's, and the aim. What was not measured is a dash."""

    def cell(value: float | None, width: int) -> str:
        return f"{'-':>{width}}" if value is None else f"{value:{width}.2f}"

    print(f"{'':48}{peer:>14}{ours:>10}{'ratio':>8}{'  aim' if aims else ''}")
    for row in dict.fromkeys([*figures[peer], *figures[ours]]):
        theirs, mine = figures[peer].get(row), figures[ours].get(row)
        ratio = mine / theirs if mine is not None and theirs else None
        aim = (aims or {}).get(row)
        told = f"  {aim.text(ratio if aim.ratio else mine)}" if aim else ""
        print(f"{row:48}{cell(theirs, 14)}{cell(mine, 10)}{cell(ratio, 8)}{told}")
