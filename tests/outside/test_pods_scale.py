"""Fifty sessions at once on one node of a real Kubernetes: all of them start, none sees another, and nobody who works is held up.

It measures, and stops the enforcement of network policies for a moment: run it alone.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

import pytest

from cluster import Cluster
from faults import component
from harness import Server, Session, Terminal, told
from waiting import wait_until

pytestmark = pytest.mark.cluster

SESSIONS = 50
NEIGHBOURS = 10
READY_WITHIN = 60
RELEASED_WITHIN = 60
PORT = 8080
EXAM = "duration_minutes: 60\nenvironment:\n  memory: 128Mi\n  cpu: 500m\n  processes: 64\n"

LISTENER = """
import socket, sys
listener = socket.create_server(("::", 8080), family=socket.AF_INET6, dualstack_ipv6=True, backlog=64)
while True:
    connection, _ = listener.accept()
    connection.sendall(sys.argv[1].encode())
    connection.close()
"""
"""Answers every connection with its argument."""

PROLOGUE = """
import glob, json, os, re, socket, subprocess, sys
def run(*words):
    return subprocess.run(words, capture_output=True, text=True).stdout
def ask(host, family, within):
    try:
        with socket.socket(family) as client:
            client.settimeout(within)
            client.connect((host, 8080) if family == socket.AF_INET else socket.getaddrinfo(host, 8080, family)[0][4])
            return client.recv(100).decode()
    except OSError as error:
        return "closed: %s" % error
"""

LOOK = (
    PROLOGUE
    + """
places = [os.path.expanduser("~"), "/tmp", "/var/tmp", "/dev/shm"]
def read(path):
    try:
        return open(path, "rb").read().decode(errors="replace")
    except OSError:
        return ""
processes = {pid: read("/proc/%s/cmdline" % pid).replace("\\0", " ") for pid in os.listdir("/proc") if pid.isdigit()}
print(json.dumps({
    "host": socket.gethostname(),
    "ipv4": re.findall(r"inet (\\S+)/", run("ip", "-4", "-o", "addr", "show", "dev", "eth0"))[0],
    "ipv6": re.findall(r"inet6 (fe80\\S+)/", run("ip", "-6", "-o", "addr", "show", "dev", "eth0"))[0],
    "markers": sorted(path for place in places for path in glob.glob(place + "/marker-*")),
    "processes": processes,
    "ps": run("ps", "-eo", "args"),
    "variables": dict(os.environ),
    "environment": "\\n".join(read("/proc/%s/environ" % pid) for pid in processes),
    "hosts": read("/etc/hosts") + read("/etc/resolv.conf"),
    "neighbours": read("/proc/net/arp") + run("ip", "neigh"),
    "secrets": glob.glob("/var/run/secrets/*") + glob.glob("/run/secrets/*"),
    "tokens": run("find", "/", "-xdev", "-name", "token", "-path", "*serviceaccount*"),
    "mounts": read("/proc/self/mountinfo"),
    "own": [ask("127.0.0.1", socket.AF_INET, 3)],
}))
"""
)
"""What can be seen without asking the network for anything but oneself."""

REACH = (
    PROLOGUE
    + """
import concurrent.futures
own4, own6, *others = sys.argv[1:]
families = [socket.AF_INET6 if ":" in other else socket.AF_INET for other in others]
with concurrent.futures.ThreadPoolExecutor(8) as pool:
    answers = list(pool.map(lambda other, family: ask(other + ("%eth0" if ":" in other else ""), family, 2), others, families))
print(json.dumps({
    "own": [ask(own4, socket.AF_INET, 3), ask(own6 + "%eth0", socket.AF_INET6, 3)],
    "others": dict(zip(others, answers)),
}))
"""
)
"""Asks the addresses given, the first two of which are one's own."""


def python(session: Session, program: str, *words: str) -> dict[str, Any]:
    """What a Python program in the environment prints."""
    done = session.ssh.run(f"exec python3 - {' '.join(words)}", input=program.encode(), timeout=90)
    assert done.returncode == 0, told(done)
    return json.loads(done.stdout)


def at(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def spread(values: Sequence[float], unit: float = 1) -> str:
    ordered = sorted(values)
    return f"min {ordered[0] * unit:.2f}, median {statistics.median(ordered) * unit:.2f}, max {ordered[-1] * unit:.2f}"


class Keystrokes:
    """Types into an open terminal and measures how long each echo takes."""

    def __init__(self, terminal: Terminal) -> None:
        self.terminal = terminal
        self.taken: list[float] = []
        self._over = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            while not self._over.is_set():
                key = uuid.uuid4().hex[0]
                begun = time.perf_counter()
                self.terminal.send(key)
                self.terminal.expect(key, within=20)
                self.taken.append(time.perf_counter() - begun)
                # The terminal's line has a limit.
                self.terminal.send("\x15")
                self._over.wait(0.05)
        except BaseException as error:
            self._error = error

    def __enter__(self) -> Keystrokes:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(30)
        assert self._error is None, self._error

    def __str__(self) -> str:
        ordered = sorted(self.taken)
        p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
        return f"p50 {statistics.median(ordered) * 1000:.2f} ms, p99 {p99 * 1000:.2f} ms, most {ordered[-1] * 1000:.1f} ms, {len(ordered)} keys"


def all_at_once(sessions: Sequence[Any], act: Callable[[Any], Any], parallel: int = 8) -> list[Any]:
    with ThreadPoolExecutor(parallel) as pool:
        return list(pool.map(act, sessions))


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_fifty_sessions_at_once_are_ready_in_a_minute_and_none_sees_another(cluster: Cluster, new_server: Callable[..., Server]) -> None:
    server = new_server(cluster=cluster, exams={"plain": EXAM})
    assert server.namespace
    alone = []
    for _ in range(3):
        begun = time.time()
        first = server.create_session()
        alone.append(at(first.get()["ready_at"]) - begun)
    with first.ssh.terminal() as terminal:
        terminal.ask("true")
        terminal.send("stty -echoctl -echok -echoke -echoe; exec cat >/dev/null\r")
        time.sleep(0.5)
        with Keystrokes(terminal) as before:
            time.sleep(5)
        created: dict[str, float] = {}
        again: list[str] = []

        def create(_: int) -> Session:
            for _ in range(20):
                asked = time.time()
                answer = server.http("POST", "/sessions", {"exam_id": "plain", "user_id": str(uuid.uuid4())})
                if answer.status_code != 503:
                    break
                # A slow machine asks a platform to come again when it has too many passwords to hash.
                again.append(answer.json()["error"]["code"])
                time.sleep(float(answer.headers["retry-after"]))
            assert answer.status_code == 201, answer.text
            session = Session(server, answer.json()["data"], None)
            created[session.id] = asked
            server.sessions.append(session)
            return session

        with Keystrokes(terminal) as during:
            begun = time.time()
            sessions = all_at_once(range(SESSIONS), create, SESSIONS)
            accepted = time.time() - begun

            def waited_for() -> list[Session]:
                return [session for session in sessions if not ready(session)]

            def ready(session: Session) -> bool:
                now = session.get()
                assert now["lifecycle_state"] in ("created", "initializing", "ready"), now
                return now["lifecycle_state"] == "ready"

            wait_until(f"{SESSIONS} sessions are ready", lambda: not waited_for(), READY_WITHIN + 10, every=0.5)
    pods: dict[str, Any] = {}

    def all_shown() -> bool:
        """A session is ready a moment before the API shows its containers as running."""
        pods.update((item["metadata"]["labels"].get("carrel.dev/session"), item) for item in server.namespace.pods().values())
        return all("running" in one["state"] for id in created for one in pods[id]["status"].get("containerStatuses", [{"state": {}}]))

    wait_until("the API shows all containers as running", all_shown, within=30)
    taken = {session.id: at(session.get()["ready_at"]) - created[session.id] for session in sessions}
    ran = [max(at(one["state"]["running"]["startedAt"]) for one in pods[id]["status"]["containerStatuses"]) - created[id] for id in taken]
    median = statistics.median(alone)
    print(f"\ncreate to ready, one alone: {spread(alone)} s")
    print(f"create to ready, {SESSIONS} at once: {spread(list(taken.values()))} s; all accepted within {accepted:.2f} s, told to come again: {again}")
    assert set(again) <= {"OVERLOADED"}, again
    print(f"create to the start of the last container, as the cluster says it: {spread(ran)} s")
    print(f"the last of {SESSIONS} took {max(taken.values()) / median:.1f} times as long as one alone, {max(taken.values()) / SESSIONS * 1000:.0f} ms a session")
    print(f"keystrokes of an open session before: {before}\nkeystrokes meanwhile: {during}")
    assert max(taken.values()) <= READY_WITHIN, f"the slowest was ready after {max(taken.values()):.1f} s"
    assert len(during.taken) >= 10, "an open terminal stood still"

    marks = {session.id: "marker-" + uuid.uuid4().hex for session in sessions}

    def settle_in(session: Session) -> None:
        mark = marks[session.id]
        places = f"~/{mark} /tmp/{mark} /var/tmp/{mark} /dev/shm/{mark}"
        session.ssh.out(
            f"touch {places}; cat >/tmp/listener.py; "
            f"setsid nohup python3 /tmp/listener.py {mark} >/tmp/listener.log 2>&1 </dev/null & "
            f"for n in $(seq 100); do nc -z 127.0.0.1 {PORT} && exit 0; sleep 0.1; done; cat /tmp/listener.log; exit 1",
            input=LISTENER.encode(),
            timeout=60,
        )

    all_at_once(sessions, settle_in)
    seen = dict(zip([session.id for session in sessions], all_at_once(sessions, lambda session: python(session, LOOK)), strict=True))
    addresses = {one["ipv4"] for one in seen.values()} | {one["ipv6"] for one in seen.values()}
    assert len(addresses) == 2 * SESSIONS, "two environments have one address"
    for session in sessions:
        own, one = marks[session.id], seen[session.id]
        others = {mark for mark in marks.values() if mark != own}
        assert {path.rsplit("/", 1)[1] for path in one["markers"]} == {own} and len(one["markers"]) == 4, one["markers"]
        commands = " ".join(one["processes"].values()) + one["ps"]
        assert own in commands, "its own listener is not seen: the test would see no others either"
        assert sum("agent serve" in command for command in one["processes"].values()) == 1, one["processes"]
        assert len(one["processes"]) < 12, one["processes"]
        assert one["own"] == [own], f"the listener does not answer in its own environment: {one['own']}"
        text = json.dumps(one)
        assert not [mark for mark in others if mark in text], "it sees a neighbour's files or processes"
        assert one["secrets"] == [] and one["tokens"] == "" and "serviceaccount" not in text, (one["secrets"], one["tokens"])
        assert not [name for name in one["variables"] if "KUBERNETES" in name or "SERVICE" in name], one["variables"]
        told_of = one["environment"] + one["hosts"] + one["neighbours"] + one["host"]
        foreign = {other.id for other in sessions if other is not session} | {other.user_id for other in sessions if other is not session}
        foreign |= addresses - {one["ipv4"], one["ipv6"]}
        assert not [name for name in foreign if f"{name} " in f"{told_of} ".replace("\n", " ").replace("\0", " ")], told_of
        assert not [name for name in foreign if len(name) == 36 and name in text], "it sees a neighbour's identity"

    def reach(n: int) -> dict[str, Any]:
        around = [sessions[(n + 1 + k * (SESSIONS // NEIGHBOURS)) % SESSIONS] for k in range(NEIGHBOURS)]
        targets = [seen[other.id][family] for other in around if other is not sessions[n] for family in ("ipv4", "ipv6")]
        own = seen[sessions[n].id]
        return python(sessions[n], REACH, own["ipv4"], own["ipv6"], *targets)

    for n, found in enumerate(all_at_once(range(SESSIONS), reach)):
        own = marks[sessions[n].id]
        assert found["own"] == [own, own], f"the listener does not answer at its own addresses: {found['own']}"
        assert len(found["others"]) >= 2 * (NEIGHBOURS - 1), found
        reached = {address: answer for address, answer in found["others"].items() if not answer.startswith("closed")}
        assert not reached, f"session {n} reaches its neighbours: {reached}"
    # What has just been closed is open without the policies: so they are what closed it.
    component("stop", "policy-standin")
    try:
        open_now = reach(0)["others"]
        assert all(answer.startswith("marker-") for answer in open_now.values()), f"the test measures nothing: {open_now}"
    finally:
        component("start", "policy-standin")

    begun = time.monotonic()
    all_at_once([*sessions, *server.sessions[:3]], lambda session: session.terminate(), 16)
    wait_until("no pod and no policy is left", lambda: not server.environments(), RELEASED_WITHIN, every=0.5)
    print(f"{SESSIONS + 3} sessions released {time.monotonic() - begun:.1f} s after their end")
