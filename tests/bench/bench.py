"""One interleaved comparison of sshd and carrel. See README.md."""

import argparse
import contextlib
import json
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

ROOT = pathlib.Path(__file__).resolve().parents[2]
CARREL = os.environ.get("CARREL_BIN", str(ROOT / "target/release/carrel"))
MIB = 1 << 20


class Server:
    """A running server: how to reach it, and which processes are it."""

    def __init__(self, name, pid, target, options):
        self.name, self.pid, self.target = name, pid, target
        self.options = options

    def ssh(self, *arguments, options=()):
        return ["ssh", *self.options, *options, self.target, *arguments]

    def pss(self):
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


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for_port(port, deadline=10):
    end = time.monotonic() + deadline
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.02)
    raise SystemExit(f"nothing listens on port {port}")


@contextlib.contextmanager
def ended(process):
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


COMMON = ["-F", "none", "-o", "IdentitiesOnly=yes", "-o", "LogLevel=ERROR", "-o", "PreferredAuthentications=publickey",
          "-o", "StrictHostKeyChecking=yes"]


@contextlib.contextmanager
def sshd(work, key):
    folder = work / "sshd"
    folder.mkdir()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "host"], check=True)
    port = free_port()
    if os.getuid() == 0:
        pathlib.Path("/run/sshd").mkdir(exist_ok=True)
    (folder / "authorized").write_text(key.with_suffix(".pub").read_text())
    (folder / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile none\nUsePAM no\nStrictModes no\n"
        f"AuthorizedKeysFile {folder}/authorized\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
        "MaxStartups 1000\nMaxSessions 100\n"
    )
    (folder / "known").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    daemon = subprocess.Popen([shutil.which("sshd") or "/usr/sbin/sshd", "-D", "-e", "-f", folder / "config"],
                              stderr=(folder / "log").open("w"))
    with ended(daemon):
        wait_for_port(port)
        user = pwd.getpwuid(os.getuid()).pw_name
        options = [*COMMON, "-i", str(key), "-o", f"UserKnownHostsFile={folder}/known", "-p", str(port)]
        yield Server("sshd", daemon.pid, f"{user}@127.0.0.1", options)


@contextlib.contextmanager
def carrel(work, key):
    environment = {**os.environ, "TMPDIR": str(work)}
    demo = subprocess.Popen([CARREL, "demo", "--json"], stdout=subprocess.PIPE, text=True, env=environment)
    with ended(demo):
        told = json.loads(demo.stdout.readline())
        # The demo's own session has a password only: a second one gets the key.
        body = json.dumps({"exam_id": told["exam_id"], "user_id": "00000000-0000-4000-8000-000000000001",
                           "ssh_public_key": key.with_suffix(".pub").read_text().strip()})
        answer = subprocess.run(
            ["curl", "-sS", "-K", "-", "-H", "Content-Type: application/json", "--data-binary", body,
             told["api"]["url"].rstrip("/") + "/v1/sessions"],
            input=f'header = "Authorization: Bearer {told["api"]["key"]}"\n', capture_output=True, text=True, check=True)
        ssh = json.loads(answer.stdout)["data"]["ssh"]
        (work / "known").write_text(ssh["known_hosts"] + "\n")
        options = [*COMMON, "-i", str(key), "-o", f"UserKnownHostsFile={work}/known", "-p", str(ssh["port"])]
        server = Server("carrel", demo.pid, f"{ssh['username']}@{ssh['host']}", options)
        # Waits until the environment is ready.
        subprocess.run(server.ssh("true"), check=True, timeout=60)
        yield server


def true_ms(server):
    start = time.perf_counter()
    subprocess.run(server.ssh("true"), check=True, stdin=subprocess.DEVNULL)
    return (time.perf_counter() - start) * 1000


def connections_a_second(server, count):
    left = iter(range(count))
    lock = threading.Lock()

    def work():
        while True:
            with lock:
                if next(left, None) is None:
                    return
            subprocess.run(server.ssh("true"), check=True, stdin=subprocess.DEVNULL)

    start = time.perf_counter()
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return count / (time.perf_counter() - start)


@contextlib.contextmanager
def echo(server):
    client = subprocess.Popen(server.ssh("stty raw -echo; echo ready; exec cat", options=["-tt"]), stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, bufsize=0)
    try:
        seen = b""
        while b"ready" not in seen:
            seen += client.stdout.read(100)
        select.select([client.stdout], [], [], 0.2)
        os.set_blocking(client.stdout.fileno(), False)
        client.stdout.read(1000)
        os.set_blocking(client.stdout.fileno(), True)
        yield client
    finally:
        client.kill()
        client.wait()


def keystrokes(client, count):
    times = []
    for _ in range(count):
        start = time.perf_counter()
        client.stdin.write(b"x")
        client.stdout.read(1)
        times.append((time.perf_counter() - start) * 1000)
        time.sleep(0.002)
    return times


def down(server, size):
    start = time.perf_counter()
    client = subprocess.Popen(server.ssh(f"head -c {size} /dev/zero"), stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    got = 0
    while chunk := client.stdout.read1(MIB):
        got += len(chunk)
    assert client.wait() == 0 and got == size, (server.name, got)
    return size / (time.perf_counter() - start) / 1e6


def up(server, size):
    start = time.perf_counter()
    client = subprocess.Popen(server.ssh("wc -c"), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    block = bytes(MIB)
    for _ in range(size // MIB):
        client.stdin.write(block)
    client.stdin.close()
    assert int(client.stdout.read()) == size, server.name
    assert client.wait() == 0
    return size / (time.perf_counter() - start) / 1e6


def idle_kilobytes(server, count):
    before = server.pss()
    clients = []
    try:
        for _ in range(count):
            clients.append(subprocess.Popen(server.ssh("echo in; exec sleep 60"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE))
        for client in clients:
            assert client.stdout.readline() == b"in\n"
        return (server.pss() - before) / count / 1024
    finally:
        for client in clients:
            client.kill()
            client.wait()


def two_way_peak(server, size, rate=20e6):
    before = peak = server.pss()
    client = subprocess.Popen(server.ssh("cat"), stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def feed():
        block = bytes(MIB)
        for _ in range(size // MIB):
            client.stdin.write(block)
        client.stdin.close()

    feeder = threading.Thread(target=feed, daemon=True)
    feeder.start()
    got, start, looked = 0, time.perf_counter(), 0.0
    while chunk := client.stdout.read1(256 * 1024):
        got += len(chunk)
        ahead = got / rate - (time.perf_counter() - start)
        if ahead > 0:
            time.sleep(ahead)
        if time.perf_counter() - looked > 0.1:
            looked = time.perf_counter()
            peak = max(peak, server.pss())
    feeder.join()
    assert client.wait() == 0 and got == size, (server.name, got)
    return (peak - before) / MIB


def measure(servers, quick):
    rounds, size = (5, 64 * MIB) if quick else (40, 1024 * MIB)
    figures = {server.name: {} for server in servers}

    def interleaved(row, times, function):
        values = {server.name: [] for server in servers}
        for _ in range(times):
            for server in servers:
                values[server.name].append(function(server))
        for name, got in values.items():
            figures[name][row] = statistics.median(got)

    for server in servers:
        true_ms(server)
    # First: memory that bulk transfers have freed would be used again.
    interleaved("memory per idle connection, kB", 1, lambda server: idle_kilobytes(server, 10 if quick else 30))
    interleaved("ssh true, ms", rounds, true_ms)
    interleaved("connections/s, 8 at a time", 3, lambda server: connections_a_second(server, 24 if quick else 96))
    with contextlib.ExitStack() as stack:
        clients = {server.name: stack.enter_context(echo(server)) for server in servers}
        times = {server.name: [] for server in servers}
        for _ in range(2 if quick else 10):
            for name, client in clients.items():
                times[name] += keystrokes(client, 100)
        for name, values in times.items():
            values.sort()
            figures[name]["echo p50, ms"] = values[len(values) // 2]
            figures[name]["echo p99, ms"] = values[len(values) * 99 // 100]
    interleaved("down, MB/s", 1 if quick else 3, lambda server: down(server, size))
    interleaved("up, MB/s", 1 if quick else 3, lambda server: up(server, size))
    interleaved("two-way bulk, slow reader: peak over idle, MiB", 1, lambda server: two_way_peak(server, size // 4))
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller transfers")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="carrel-bench-") as folder, contextlib.ExitStack() as stack:
        work = pathlib.Path(folder)
        key = work / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        servers = [stack.enter_context(sshd(work, key)), stack.enter_context(carrel(work, key))]
        figures = measure(servers, arguments.quick)
    print(f"{'':48}{'sshd':>10}{'carrel':>10}{'ratio':>8}")
    for row, peer in figures["sshd"].items():
        ours = figures["carrel"][row]
        ratio = f"{ours / peer:8.2f}" if peer else "       -"
        print(f"{row:48}{peer:10.2f}{ours:10.2f}{ratio}")


if __name__ == "__main__":
    main()
