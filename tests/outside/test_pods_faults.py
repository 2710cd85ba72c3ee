"""Sessions on a real Kubernetes whose parts fail: pods, images, quotas, the API server, kubelet, containerd, Carrel itself.

Each test has a server and a namespace of its own; closing the server fails when a pod or a policy stays. Those that stop a part of the
cluster stop it for all who use it: run them alone.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed

from cluster import Cluster
from faults import away, node_ready, recover
from harness import Server, Session, Ssh, Terminal
from test_websocket import ATTACHED, TERMINATION, BinaryClient, binary_client
from waiting import Late, wait_until

pytestmark = pytest.mark.cluster

SMALL = "duration_minutes: 120\nreconnect_window_seconds: 300\nenvironment:\n  memory: 128Mi\n"
RELEASED_WITHIN = 60
"""Seconds from the end of a session until nothing of it is left."""
SHOWN_WITHIN = 10
"""Seconds from the cause of a failure until the session shows it."""
READY_WITHIN = 65
"""Seconds from the creation until a session is ready or has failed: 60, and what the test needs to see it."""
CUT = rb"carrel: [^\r\n]*connection[^\r\n]*"
"""What a terminal is told when the connection to its environment is lost."""

Servers = Callable[..., Server]


def exams(**setups: str) -> dict[str, str]:
    """`plain`, and exams with a setup script or other fields of `environment`, each as lines of YAML."""
    start = SMALL.removesuffix("  memory: 128Mi\n")
    small = {name: lines if "memory:" in lines else f"  memory: 128Mi\n{lines}" for name, lines in setups.items()}
    return {"plain": SMALL} | {name.replace("_", "-"): start + lines for name, lines in small.items()}


def setup(*lines: str) -> str:
    return "  setup: |\n" + "".join(f"    {line}\n" for line in lines)


def kept_warm(server: Server) -> int:
    """How many environments the next sessions could take."""
    told = server.client.get("/metrics").text
    found = re.search(r'^carrel_warm_environments\{state="ready"\} (\d+)$', told, re.MULTILINE)
    assert found, told
    return int(found[1])


def pod_of(session: Session) -> str:
    return f"carrel-{session.get()['environment']['environment_id']}"


def of(session: Session) -> list[str]:
    """What there is in the namespace of a session's environment."""
    assert session.server.namespace
    name = pod_of(session)
    return [found for found in session.server.namespace.environments() if found.endswith(f"/{name}")]


def kill_pod(session: Session) -> None:
    """As if its node had forgotten it."""
    assert session.server.namespace
    session.server.namespace.kubectl("delete", "pod", pod_of(session), "--force", "--grace-period=0", "--wait=false")


def failed(session: Session, code: str, within: float) -> dict[str, Any]:
    """Waits for the failure and returns the session."""
    now = session.wait_state("failed", within=within)
    assert now["lifecycle_reason"]["code"] == code, now
    status = session.status()
    assert status["display_state"] == "error" and status["error_reason"] == code, status
    return now


def one_line(text: bytes) -> str:
    lines = [line for line in text.decode(errors="replace").replace("\r", "").splitlines() if line.strip()]
    assert len(lines) == 1, f"not one line that says why: {lines}"
    return lines[0]


def released(*sessions: Session) -> None:
    """Waits until nothing is left of ended sessions."""
    wait_until("nothing is left of the ended sessions", lambda: not [name for one in sessions for name in of(one)], RELEASED_WITHIN, 0.3)


def in_setup(session: Session) -> None:
    """Waits until the setup script runs."""
    wait_until("the setup script runs", lambda: session.status()["progress"]["current_step"] == 4, within=READY_WITHIN)


def post(server: Server, exam: str = "plain") -> tuple[Session | None, dict[str, Any]]:
    """Asks for a session: the session, or the error with its status and `Retry-After`."""
    answer = server.http("POST", "/sessions", {"exam_id": exam, "user_id": str(uuid.uuid4())})
    if answer.status_code == 201:
        session = Session(server, answer.json()["data"], None)
        server.sessions.append(session)
        return session, {}
    return None, answer.json()["error"] | {"status": answer.status_code, "retry_after": answer.headers.get("retry-after")}


class Command:
    """A command over `ssh` without a terminal, whose end is noted."""

    def __init__(self, ssh: Ssh, command: str) -> None:
        self.process = ssh.popen(command)
        assert self.process.stdout and self.process.stdout.readline() == b"up\n", "the command does not run"

    def lost(self, within: float) -> str:
        """Waits for its end, which must be the one of a lost environment; returns the line that says why."""
        try:
            out, err = self.process.communicate(timeout=within)
        finally:
            self.process.kill()
        assert self.process.returncode == 255, (self.process.returncode, out, err)
        return one_line(err)


COUNTER = "i=0; while :; do i=$((i+1)); echo tick-$i-; sleep 0.2; done"


def last_tick(text: bytes) -> int:
    ticks = re.findall(rb"tick-(\d+)-", text)
    return int(ticks[-1]) if ticks else 0


@contextlib.contextmanager
def counting(session: Session) -> Iterator[Terminal]:
    """A shell on a terminal in which a program counts, five numbers a second."""
    with session.ssh.terminal() as terminal:
        terminal.ask("true", within=30)
        terminal.send(COUNTER + "\r")
        terminal.expect(r"tick-3-", within=15)
        yield terminal


def counts_on(terminal: Terminal, since: int, seconds: float, within: float) -> None:
    """The program on the terminal has counted without a pause, as far as a slow machine can, and shows it."""
    least = since + int(2 * seconds)
    wait_until(f"the terminal shows a number above {least}", lambda: last_tick(terminal.seen) > least, within)


# --- pods --------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
def test_a_pod_killed_under_a_command_a_terminal_or_its_setup_fails_its_session(cluster: Cluster, new_server: Servers) -> None:
    server = new_server(cluster=cluster, exams=exams(slow=setup("sleep 45")))
    starting = server.create_session("slow", ready=False)
    command_of, terminal_of, browser_of, other = (server.create_session(ready=False) for _ in range(4))
    for session in (command_of, terminal_of, browser_of, other):
        session.wait_state("ready", within=READY_WITHIN)
    in_setup(starting)
    command = Command(command_of.ssh, "echo up; sleep 300")
    waiting = starting.ssh.popen("echo in")
    with counting(terminal_of) as terminal, binary_client(browser_of) as browser, counting(other) as spared:
        for session in (starting, command_of, terminal_of, browser_of):
            kill_pod(session)
        assert "lost" in command.lost(within=SHOWN_WITHIN + 5)
        out, err = waiting.communicate(timeout=SHOWN_WITHIN + 5)
        assert waiting.returncode == 255 and out == b"" and one_line(err), (waiting.returncode, out, err)
        assert terminal.wait(SHOWN_WITHIN + 5) == 255
        assert re.search(rb"carrel: [^\r\n]*lost", terminal.seen[-400:]), terminal.seen[-400:]
        assert browser.until(TERMINATION, SHOWN_WITHIN + 5)["reason"] == "environment_lost"
        for session in (starting, command_of, terminal_of, browser_of):
            failed(session, "environment_lost", SHOWN_WITHIN)
        seen = last_tick(spared.seen)
        counts_on(spared, seen, 1, within=10)
    released(starting, command_of, terminal_of, browser_of)


@pytest.mark.timeout(150)
def test_the_end_of_a_session_takes_its_client_pod_and_policy(cluster: Cluster, new_server: Servers) -> None:
    server = new_server(cluster=cluster, exams={"internet": SMALL + "  network: internet\n"})
    session = server.create_session("internet", ready=False)
    session.wait_state("ready", within=READY_WITHIN)
    name = pod_of(session)
    assert sorted(of(session)) == [f"NetworkPolicy/{name}", f"Pod/{name}"]
    command = Command(session.ssh, "trap '' HUP TERM; echo up; sleep 300")
    with counting(session) as terminal:
        begun = time.monotonic()
        assert session.terminate().status_code == 200
        assert terminal.wait(10) == 255
        cut = time.monotonic() - begun
        assert re.search(rb"carrel: [^\r\n]*ended", terminal.seen[-400:]), terminal.seen[-400:]
        assert "ended" in command.lost(within=10)
    released(session)
    print(f"terminal closed {cut:.2f} s, pod and policy gone {time.monotonic() - begun:.1f} s after the session's end")
    assert cut < 5, f"bytes pass for {cut:.1f} s after the end"
    assert session.ssh.run("echo in").returncode == 255


# --- what cannot start -------------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
def test_what_cannot_start_says_why_to_staff_and_what_to_do_to_candidates(cluster: Cluster, new_server: Servers) -> None:
    files = exams(
        no_image="  image: registry.invalid/no/such-image:1\n",
        large="  cpu: 256\n  memory: 4Ti\n",
        broken=setup("for n in $(seq 40); do echo secret-answer-$n; done", "echo the-setup-said-this >&2", "exit 3"),
        killed=setup("echo before-the-end", "kill -9 $$"),
    )
    server = new_server(cluster=cluster, exams=files)
    sessions = {exam: server.create_session(exam, ready=False) for exam in files if exam != "plain"}
    begun = time.monotonic()
    commands = {exam: session.ssh.popen("echo in") for exam, session in sessions.items()}
    plain = server.create_session()
    expected = {
        "no-image": ("image_pull_failed", "registry.invalid/no/such-image:1"),
        "large": ("unschedulable", "nsufficient memory"),
        "broken": ("setup_failed", "the-setup-said-this"),
        "killed": ("setup_failed", "before-the-end"),
    }
    for exam, (code, details) in expected.items():
        reason = failed(sessions[exam], code, within=25)["lifecycle_reason"]
        print(f"{exam}: {code} after {time.monotonic() - begun:.1f} s: {reason['technical_details'][:200]!r}")
        assert details in reason["technical_details"] and details not in reason["message"], reason
        out, err = commands[exam].communicate(timeout=15)
        assert commands[exam].returncode == 255 and out == b"", (exam, commands[exam].returncode, out, err)
        assert reason["message"] in one_line(err), f"{exam}: ssh says {err!r}, not {reason['message']!r}"
        with sessions[exam].ssh.terminal() as terminal:
            assert terminal.wait(15) == 255 and reason["message"].encode() in terminal.seen, terminal.seen
        assert not re.search(rb"secret-answer|before-the-end|the-setup-said|invalid|nsufficient", err + terminal.seen), err + terminal.seen
    lines = sessions["broken"].get()["lifecycle_reason"]["technical_details"]
    assert "secret-answer-40" in lines and len(lines) < 10_000, lines
    assert plain.ssh.out("echo in") == "in", "others are held up by what cannot start"
    released(*sessions.values())


@pytest.mark.timeout(120)
def test_a_full_quota_is_told_and_a_freed_place_is_taken(cluster: Cluster, new_server: Servers) -> None:
    server = new_server(cluster=cluster, exams={"internet": SMALL + "  network: internet\n"})
    assert server.namespace
    first = server.create_session("internet")
    hard = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "one-only"}, "spec": {"hard": {"pods": "1"}}}
    server.namespace.kubectl("create", "-f", "-", input=json.dumps(hard).encode())
    counted = ("get", "resourcequota", "one-only", "-o", "jsonpath={.status.used.pods}")
    wait_until("the quota counts the pod", lambda: server.namespace and server.namespace.kubectl(*counted) == "1", within=30)
    second = server.create_session("internet", ready=False)
    reason = failed(second, "quota_exceeded", SHOWN_WITHIN)["lifecycle_reason"]
    assert "one-only" in reason["technical_details"] and "one-only" not in reason["message"], reason
    released(second)
    assert server.ready(), "a full quota is no fault of the server"
    assert first.ssh.out("echo in") == "in"
    first.terminate()
    released(first)
    third, error = post(server, "internet")
    assert third, error
    third.wait_state("ready", within=READY_WITHIN)


# --- the API server ----------------------------------------------------------------------------------------------


class BrowserLike:
    """The page's side of `carrel.v1`: reads all the time, and connects again when it is told that the backend is away."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.output = b""
        self.closes: list[int] = []
        self.error: BaseException | None = None
        self._over = threading.Event()
        self._typed: list[bytes] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def type(self, data: bytes) -> None:
        self._typed.append(data)

    def _run(self) -> None:
        try:
            while not self._over.is_set():
                try:
                    with binary_client(self.session) as client:
                        self._follow(client)
                except ConnectionClosed as closed:
                    code = closed.rcvd.code if closed.rcvd else 1006
                    self.closes.append(code)
                    assert code in (1001, 1011), f"closed with {code}: a page does not come back from that"
                except (TimeoutError, AssertionError) as late:
                    # A ticket is not to be had, or the terminal is not attached in time.
                    self.closes.append(0)
                    if len(self.closes) > 60:
                        raise late
                self._over.wait(1)
        except BaseException as error:
            self.error = error

    def _follow(self, client: BinaryClient) -> None:
        while not self._over.is_set():
            if self._typed:
                client.type(self._typed.pop(0))
            with contextlib.suppress(TimeoutError):
                client.read(time.monotonic() + 0.2)
            self.output += bytes(client.output)
            client.output.clear()

    def shows(self, pattern: bytes, within: float) -> None:
        def probe() -> bool:
            assert self.error is None, self.error
            return re.search(pattern, self.output) is not None

        wait_until(f"the browser shows {pattern!r} (closed with {self.closes})", probe, within)

    def close(self) -> None:
        self._over.set()
        self._thread.join(20)

    def __enter__(self) -> BrowserLike:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_shells_outlive_an_api_server_that_is_away_for_20_seconds(cluster: Cluster, new_server: Servers) -> None:
    server = new_server(cluster=cluster, exams=exams())
    counted, quiet, browsed, graded = (server.create_session(ready=False) for _ in range(4))
    for session in (counted, quiet, browsed, graded):
        session.wait_state("ready", within=READY_WITHIN)
    with counting(counted) as terminal, quiet.ssh.terminal() as shell, BrowserLike(browsed) as browser:
        shell.ask("kept=in-$((40+2)); clear; echo on-the-screen-$((1+1))", within=30)
        browser.type(COUNTER.encode() + b"\r")
        browser.shows(rb"tick-3-", within=30)
        long, short = Command(graded.ssh, "echo up; sleep 300"), Command(graded.ssh, "echo up; sleep 8; exit 0")
        shown = len(shell.seen)
        with away(cluster, "kube-apiserver", "kill") as fault:
            before, at = last_tick(terminal.seen), time.monotonic()
            browser_before = last_tick(browser.output)
            for _ in range(5):
                fault.stay(fault.seconds + 3)
                begun = time.monotonic()
                session, error = post(server)
                assert session or (error["status"], error["code"]) == (503, "BACKEND_UNAVAILABLE") and error["retry_after"], error
                assert counted.get()["lifecycle_state"] == "running" and counted.status()["environment_ready"] is True
                assert time.monotonic() - begun < 10, "the API takes longer than 10 s while the cluster is away"
            # Their ends cannot be known any more.
            assert "connection" in long.lost(within=30) and "connection" in short.lost(within=30)
            fault.stay(20)
            fault.back()
            wait_until("the server is ready again", server.ready, within=60)
            for name, open_terminal in (("counting", terminal), ("quiet", shell)):
                status = open_terminal.process.poll()
                assert status is None, f"the {name} client ended with {status}: {open_terminal.seen[-600:]}"
            counts_on(terminal, before, time.monotonic() - at, within=45)
            assert re.search(CUT, terminal.seen), f"the terminal was not told: {terminal.seen[-1500:]}"
            wait_until("the quiet screen is drawn again", lambda: b"on-the-screen-2" in shell.seen[shown:], within=45)
            assert re.search(CUT, shell.seen[shown:]), f"the terminal was not told: {shell.seen[shown:]}"
            assert shell.ask("echo $kept") == "in-42", "it is another shell"
            counted_on = browser_before + int(2 * (time.monotonic() - at))
            wait_until("the browser's terminal counts on", lambda: last_tick(browser.output) > counted_on, within=45)
            print(f"the browser's connection was closed with {browser.closes}")
            assert counted.ssh.out("echo in", timeout=40) == "in"
            recover(cluster)
            new, error = post(server)
            assert new, error
            new.wait_state("ready", within=READY_WITHIN)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_frozen_api_server_fails_starts_with_its_reason_and_nothing_else(cluster: Cluster, new_server: Servers) -> None:
    server = new_server(cluster=cluster, exams=exams(slow=setup("sleep 20")))
    running, preparing = server.create_session(ready=False), server.create_session("slow", ready=False)
    running.wait_state("ready", within=READY_WITHIN)
    in_setup(preparing)
    with counting(running) as terminal:
        with away(cluster, "kube-apiserver", "freeze") as fault:
            before, at = last_tick(terminal.seen), time.monotonic()
            # The server does not know yet.
            started, error = post(server)
            assert started, error
            wait_until("the server says that it is not ready", lambda: not server.ready(), within=20)
            said = server.client.get("/readyz")
            assert said.status_code == 503 and re.search(r"no answer|not answer|connect", said.text), said.text
            print(f"/readyz after {fault.seconds:.1f} s: {said.text}")
            assert server.client.get("/healthz").status_code == 200
            begun = time.monotonic()
            session, error = post(server)
            assert session is None and (error["status"], error["code"]) == (503, "BACKEND_UNAVAILABLE") and error["retry_after"], error
            assert running.get()["lifecycle_state"] == "running" and running.status()["remaining_seconds"] > 0
            assert server.ok("GET", f"/sessions/active?user_id={running.user_id}")["session_id"] == running.id
            assert time.monotonic() - begun < 10, "the API takes longer than 10 s while the cluster is away"
            failed(started, "cluster_unavailable", within=READY_WITHIN)
            print(f"the start failed after {fault.seconds:.1f} s")
            assert started.ssh.run("echo in").returncode == 255
            fault.stay(45)
            # Its setup script has come to its end in the pod; what cannot be learned now is no fault of the exam.
            assert preparing.get()["lifecycle_reason"] is None or preparing.reason() == "cluster_unavailable", preparing.get()
            assert running.get()["lifecycle_state"] == "running"
            fault.back()
            wait_until("the server is ready again", server.ready, within=60)
            assert running.ssh.out("echo in", timeout=40) == "in"
            goes_on(running, terminal, before, at)
            end = preparing.wait_state("ready", "failed", within=60)
            assert end["lifecycle_state"] == "ready" or end["lifecycle_reason"]["code"] in ("cluster_unavailable", "start_timeout"), end
            # Also when the frozen API server took the request to make it after all.
            released(started)
            recover(cluster)
            new, error = post(server)
            assert new, error
            new.wait_state("ready", within=READY_WITHIN)


# --- the node ----------------------------------------------------------------------------------------------------


def goes_on(session: Session, terminal: Terminal, before: int, at: float) -> None:
    """The shell that counts has been told of the fault, and is still there for whoever comes back."""
    assert session.get()["lifecycle_state"] == "running"
    if terminal.process.poll() is None:
        counts_on(terminal, before, time.monotonic() - at, within=60)
    else:
        assert terminal.process.poll() == 255 and re.search(CUT, terminal.seen), (terminal.process.poll(), terminal.seen[-600:])
        found(session, before, at)


def found(session: Session, before: int, at: float) -> None:
    """Who comes back by hand finds the shell that counts, as soon as the agent knows that the lost client is gone: 50 s at most."""
    begun = time.monotonic()
    while True:
        with session.ssh.terminal() as again:
            try:
                counts_on(again, before, time.monotonic() - at, within=3)
                break
            except Late:
                assert time.monotonic() - begun < 60, f"it is another shell: {again.seen[-600:]}"
        time.sleep(2)
    print(f"the shell was found again {time.monotonic() - begun:.1f} s after the cluster was back, {time.monotonic() - at:.1f} s after the fault")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_sessions_outlive_a_kubelet_that_is_away_until_the_node_is_not_ready(cluster: Cluster, new_server: Servers) -> None:
    server = new_server(cluster=cluster, exams=exams() | {"kept": f"warm: 1\n{SMALL}"})
    running, ended = server.create_session(ready=False), server.create_session(ready=False)
    for session in (running, ended):
        session.wait_state("ready", within=READY_WITHIN)
    wait_until("one is kept warm", lambda: kept_warm(server) == 1, READY_WITHIN)
    # Of one that the cluster does not yet say to run, it could not say either that its node is lost.
    pods = server.environments()
    kept = pods.keys() - {*of(running), *of(ended)}
    assert [pods[name] for name in kept] == ["Running"], pods
    graded = Command(running.ssh, "echo up; sleep 300")
    with counting(running) as terminal:
        with away(cluster, "kubelet", "stop") as fault:
            before, at = last_tick(terminal.seen), time.monotonic()
            # Its pod gets the node, and nobody there who starts it.
            waiting, error = post(server)
            assert waiting, error
            assert ended.terminate().status_code == 200
            line = graded.lost(within=45)
            print(f"without a terminal: {line!r}")
            wait_until("the node is not ready", lambda: not node_ready(cluster), within=60, every=0.5)
            print(f"the node is not ready after {fault.seconds:.1f} s")
            wait_until("what was kept warm there is given to nobody", lambda: kept_warm(server) == 0, SHOWN_WITHIN, every=0.5)
            refused, error = post(server)
            assert refused, error
            reason = failed(refused, "unschedulable", within=8 + SHOWN_WITHIN)["lifecycle_reason"]
            print(f"a new session meanwhile: {reason['technical_details']!r}")
            released(ended, refused)
            print(f"the ended session was released after {fault.seconds:.1f} s")
            assert running.get()["lifecycle_state"] == "running"
            fault.stay(32)
            fault.back()
            end = waiting.wait_state("ready", "failed", within=READY_WITHIN)
            assert end["lifecycle_state"] == "ready" or end["lifecycle_reason"]["code"] == "start_timeout", end
            print(f"the session that waited: {end['lifecycle_state']} after {fault.seconds:.1f} s")
            wait_until("the node is ready", lambda: node_ready(cluster), within=60, every=0.5)
            goes_on(running, terminal, before, at)
            new, error = post(server)
            assert new, error
            new.wait_state("ready", within=READY_WITHIN)
            wait_until("one is kept warm again", lambda: kept_warm(server) == 1, 90, every=0.5)
            server.ok("PUT", "/exams/kept", server.ok("GET", "/exams/kept") | {"warm": 0})


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_sessions_outlive_a_containerd_that_is_away(cluster: Cluster, new_server: Servers) -> None:
    server = new_server(cluster=cluster, exams=exams(slow=setup("sleep 8", "echo once >>~/prepared")))
    running, preparing = server.create_session(ready=False), server.create_session("slow", ready=False)
    running.wait_state("ready", within=READY_WITHIN)
    in_setup(preparing)
    graded = Command(running.ssh, "echo up; sleep 300")
    with counting(running) as terminal:
        with away(cluster, "containerd", "stop") as fault:
            before, at = last_tick(terminal.seen), time.monotonic()
            waiting, error = post(server)
            assert waiting, error
            line = graded.lost(within=45)
            print(f"without a terminal: {line!r}")
            fault.stay(12)
            assert running.get()["lifecycle_state"] == "running"
            fault.back()
            end = waiting.wait_state("ready", "failed", within=READY_WITHIN)
            print(f"the session that waited: {end['lifecycle_state']}, {end['lifecycle_reason']} after {fault.seconds:.1f} s")
            assert end["lifecycle_state"] == "ready" or end["lifecycle_reason"]["code"] in ("start_timeout", "unschedulable"), end
            prepared = preparing.wait_state("ready", "failed", within=READY_WITHIN)
            assert prepared["lifecycle_state"] == "ready" or prepared["lifecycle_reason"]["code"] == "start_timeout", prepared
            wait_until("the node is ready", lambda: node_ready(cluster), within=60, every=0.5)
            goes_on(running, terminal, before, at)
            if prepared["lifecycle_state"] == "ready":
                assert preparing.ssh.out("cat prepared") == "once"
            new, error = post(server)
            assert new, error
            new.wait_state("ready", within=READY_WITHIN)


# --- Carrel itself -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def mute_registry() -> Iterator[int]:
    """A registry of images that takes connections and requests, and never answers: its port of the loopback interface."""
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as taken:
        listener.settimeout(0.2)
        over = threading.Event()

        def take() -> None:
            while not over.is_set():
                with contextlib.suppress(TimeoutError):
                    taken.enter_context(listener.accept()[0])

        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            over.set()
            thread.join(5)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_server_killed_at_any_point_of_a_start_converges(cluster: Cluster, new_server: Servers) -> None:
    with mute_registry() as port:
        server = new_server(
            cluster=cluster,
            exams=exams(prepared=setup("sleep 3", "echo once >>~/prepared"), endless_image=f"  image: 127.0.0.1:{port}/never/ends:1\n"),
        )
        converges(server)


def converges(server: Server) -> None:
    assert server.namespace
    endless = server.create_session("endless-image", ready=False)
    created = time.monotonic()
    running, ending = server.create_session(ready=False), server.create_session(ready=False)
    for session in (running, ending):
        session.wait_state("ready", within=READY_WITHIN)
    begun: list[Session] = []
    with counting(running) as terminal:
        before, at = last_tick(terminal.seen), time.monotonic()
        for pause in (0.0, 0.05, 0.6, 2.0):
            begun += [server.create_session(exam, ready=False) for exam in ("plain", "prepared")]
            if pause == 0.6:
                assert ending.terminate().status_code == 200
            time.sleep(pause)
            server.sigkill()
            server.start()
        assert terminal.wait(15) == 255, terminal.seen[-300:]
    for session in begun:
        session.wait_state("ready", within=READY_WITHIN)
        if session.data["exam_id"] == "prepared":
            assert session.ssh.out("cat prepared") == "once"
    with running.ssh.terminal() as again:
        counts_on(again, before, time.monotonic() - at, within=30)
    released(ending)
    pods = {pod_of(session) for session in (running, endless, *begun)}

    def exactly() -> bool:
        assert server.namespace
        return set(server.namespace.pods()) == pods

    wait_until("there are the pods of the sessions and no others", exactly, within=RELEASED_WITHIN)
    for session in begun:
        assert session.terminate().status_code == 200
    server.sigkill()
    server.start()
    # The pull of its image never ends; the restarts give it no more time.
    failed(endless, "start_timeout", within=READY_WITHIN)
    print(f"the session without an image failed {time.monotonic() - created:.1f} s after its creation")
    released(endless, *begun)
    print(f"and nothing was left of it {time.monotonic() - created:.1f} s after its creation")
    assert set(server.namespace.pods()) == {pod_of(running)}
