"""One interleaved comparison of sshd and carrel. See README.md."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import subprocess
import threading
import time
from collections.abc import Iterator

from measures import (
    CARREL, MIB, Comparison, Server, carrel_server, check_ms, connections_a_second, down, ended, print_table, sshd, up, workplace,
)


@contextlib.contextmanager
def carrel(work: pathlib.Path, key: pathlib.Path) -> Iterator[Server]:
    """`carrel demo` and a session in it."""
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
        yield carrel_server(work, key, demo.pid, json.loads(answer.stdout)["data"]["ssh"])


def idle_kilobytes(server: Server, count: int) -> float:
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


def two_way_peak(server: Server, size: int, rate: float = 20e6) -> float:
    before = peak = server.pss()
    client = subprocess.Popen(server.ssh("cat"), stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def feed() -> None:
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


def measure(compared: Comparison, quick: bool) -> None:
    rounds, size = (5, 64 * MIB) if quick else (40, 1024 * MIB)
    for server in compared.servers:
        check_ms(server)
    # First: memory that bulk transfers have freed would be used again.
    compared.interleaved("memory per idle connection, kB", 1, lambda server: idle_kilobytes(server, 10 if quick else 30))
    compared.interleaved("ssh true, ms", rounds, check_ms)
    compared.interleaved("connections/s, 8 at a time", 3, lambda server: connections_a_second(server, 24 if quick else 96))
    compared.echo(2 if quick else 10)
    compared.interleaved("down, MB/s", 1 if quick else 3, lambda server: down(server, size, f"head -c {size} /dev/zero"))
    compared.interleaved("up, MB/s", 1 if quick else 3, lambda server: up(server, size))
    compared.interleaved("two-way bulk, slow reader: peak over idle, MiB", 1, lambda server: two_way_peak(server, size // 4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller transfers")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        work, key = stack.enter_context(workplace())
        compared = Comparison([stack.enter_context(sshd(work, key)), stack.enter_context(carrel(work, key))])
        measure(compared, arguments.quick)
    print_table(compared.figures, "sshd", "carrel")


if __name__ == "__main__":
    main()
