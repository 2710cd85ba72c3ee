"""Drives the real `carrel` binary and real clients against it.

Nothing here knows how Carrel is built: only its command line, its HTTP API and its SSH server. Every wait has a
deadline, and everything that is started lives below one directory or carries its server's name, so that whatever is left over can be found.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import tempfile
import termios
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from cluster import Cluster, Namespace
from waiting import Late, wait_until

REPOSITORY = Path(__file__).resolve().parents[2]
BINARY = Path(os.environ.get("CARREL_BIN", REPOSITORY / "target/release/carrel")).resolve()

EXAMS = {
    "plain": "duration_minutes: 120\nreconnect_window_seconds: 60\n",
    "forward": "duration_minutes: 120\nenvironment:\n  allow_port_forward: true\n",
    "minute": "duration_minutes: 1\n",
    "unused": "duration_minutes: 60\nstart_within_seconds: 10\n",
    "window": "duration_minutes: 60\nreconnect_window_seconds: 3\n",
    "slow-start": "duration_minutes: 60\nenvironment:\n  setup: |\n    sleep 6\n",
    "slower-start": "duration_minutes: 60\nenvironment:\n  setup: |\n    sleep 40\n",
    "broken": "duration_minutes: 60\nenvironment:\n  setup: |\n    echo the-setup-said-this >&2\n    exit 3\n",
    "large": "duration_minutes: 120\nenvironment:\n  storage: 2Gi\n",
}
"""The exam files that every server of the suite has."""


def free_port() -> int:
    """A free port of 127.0.0.1, below the range that the kernel gives to clients, so that it stays free."""
    for _ in range(200):
        port = random.randrange(20000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port between 20000 and 32000")


def need(program: str) -> str:
    """The path of a program the suite cannot do without."""
    path = shutil.which(program)
    assert path, f"{program} is not installed: apt-get install the packages of tests/outside/apt-packages.txt"
    return path


def rss_kib(pid: int, field: str = "VmRSS") -> int:
    """A memory figure of a process, KiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise AssertionError(f"process {pid} has no {field}")


# --- processes ---------------------------------------------------------------------------------------------------


instances: set[str] = set()
"""The names that the run's servers and demos have given themselves; each of their environments carries its server's."""


def instance_of(data_dir: Path) -> str:
    """The name of a server with local environments. It stands in the command lines of its environments' processes."""
    name = (data_dir / "environments/instance").read_text().strip()
    assert uuid.UUID(name), name
    instances.add(name)
    return name


def processes_that_mention(*words: Path | str) -> dict[int, str]:
    """Processes with one of the words in their command line, variables, directory or mounts, but for this one and its
    parents. Give a directory, the name of a server (see [`instance_of`]) or of an environment."""
    needles = [str(word).encode() for word in words]
    spared = {os.getpid()}
    with contextlib.suppress(OSError, ValueError):
        pid = os.getpid()
        while pid > 1:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
            spared.add(pid)
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in spared:
            continue
        with contextlib.suppress(OSError):
            if entry.joinpath("stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX":
                continue
            texts = [entry.joinpath(name).read_bytes() for name in ("cmdline", "environ", "mountinfo")]
            for link in ("cwd", "exe"):
                with contextlib.suppress(OSError):
                    texts.append(os.readlink(entry / link).encode())
            if any(needle in text for text in texts for needle in needles):
                found[int(entry.name)] = texts[0].replace(b"\0", b" ").decode(errors="replace")[:200]
    return found


def end(process: subprocess.Popen[Any], within: float = 15) -> int:
    """Ends a process that the suite started: SIGTERM, then SIGKILL."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(within)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait(within)


# --- ssh ---------------------------------------------------------------------------------------------------------


class Ssh:
    """How real clients reach one session: its address, secrets and known host key, and `ssh` with them."""

    def __init__(self, info: dict[str, Any], work: Path, key: Path | None = None) -> None:
        self.host: str = info["host"]
        self.port: int = info["port"]
        self.user: str = info["username"]
        self.password: str = info["password"]
        self.fingerprint: str = info["host_key_fingerprint"]
        self.key = key
        self.work = Path(tempfile.mkdtemp(prefix="ssh-", dir=work))
        self.known_hosts = self.work / "known_hosts"
        self.known_hosts.write_text(info["known_hosts"].rstrip("\n") + "\n")
        self.askpass = self.work / "askpass"
        self.askpass.write_text("#!/bin/sh\nprintf '%s\\n' \"$ASKPASS_ANSWER\"\n")
        self.askpass.chmod(0o700)

    @property
    def env(self) -> dict[str, str]:
        """Variables with which an OpenSSH program finds the password and nothing of the developer's own."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        return kept | {
            "LANG": "C.UTF-8",
            "TERM": "xterm-256color",
            "SSH_ASKPASS": str(self.askpass),
            "SSH_ASKPASS_REQUIRE": "force",
            "ASKPASS_ANSWER": self.password,
        }

    def options(self, auth: str = "password") -> list[str]:
        """`-o` options for ssh, scp and sftp alike; `auth` is `password` or `key`."""
        chosen = {
            "UserKnownHostsFile": str(self.known_hosts),
            "GlobalKnownHostsFile": "/dev/null",
            "StrictHostKeyChecking": "yes",
            "NumberOfPasswordPrompts": "1",
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "LogLevel": "ERROR",
            "ConnectTimeout": "20",
        }
        if auth == "key":
            assert self.key, "this session was made without a public key"
            chosen |= {"PreferredAuthentications": "publickey", "IdentityFile": str(self.key)}
        else:
            chosen |= {"PreferredAuthentications": "password", "IdentityFile": "none"}
        return ["-F", "none"] + [word for name, value in chosen.items() for word in ("-o", f"{name}={value}")]

    def argv(self, *extra: str, auth: str = "password", user: str | None = None) -> list[str]:
        """`ssh` up to and with the destination; `extra` goes before it. The first `-o` of a name wins, so `extra`
        overrides."""
        login = ["-p", str(self.port), "-l", user or self.user]
        return ["ssh", *extra, *self.options(auth), *login, self.host]

    def command_line(self, auth: str = "password") -> str:
        """For `rsync -e`: without the destination."""
        return shlex.join(["ssh", *self.options(auth), "-p", str(self.port)])

    def run(
        self,
        command: str | bytes | Sequence[str | bytes] | None = None,
        *extra: str,
        input: bytes | None = b"",
        timeout: float = 30,
        auth: str = "password",
        user: str | None = None,
        password: str | None = None,
        env: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[bytes]:
        """Runs `ssh … command` to its end. `input=None` leaves stdin at /dev/null."""
        argv: list[str | bytes] = list(self.argv(*extra, auth=auth, user=user))
        if command is not None:
            argv += [command] if isinstance(command, (str, bytes)) else list(command)
        variables = self.env | (env or {})
        if password is not None:
            variables["ASKPASS_ANSWER"] = password
        stdin = {"stdin": subprocess.DEVNULL} if input is None else {"input": input}
        return subprocess.run(argv, capture_output=True, timeout=timeout, env=variables, **stdin)  # type: ignore[call-overload]

    def popen(self, command: str | bytes | None, *extra: str, auth: str = "password", **kwargs: Any) -> subprocess.Popen[bytes]:
        """Starts `ssh … command` with pipes (or what `kwargs` says)."""
        argv: list[str | bytes] = list(self.argv(*extra, auth=auth))
        if command is not None:
            argv.append(command)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(argv, env=self.env, **(pipes | kwargs))

    def out(self, command: str | bytes, *extra: str, **kwargs: Any) -> str:
        """The command's stdout, stripped; fails unless it exits with 0."""
        done = self.run(command, *extra, **kwargs)
        assert done.returncode == 0, f"{command!r} exited with {done.returncode}: {told(done)}"
        return done.stdout.decode(errors="replace").strip()

    def terminal(self, command: str | None = None, *extra: str, rows: int = 24, cols: int = 80) -> Terminal:
        """`ssh` on a terminal of our own."""
        argv = self.argv("-tt", *extra)
        return Terminal(argv + ([command] if command is not None else []), self.env, rows, cols)

    @contextlib.contextmanager
    def master(self, *extra: str, auth: str = "password") -> Iterator[Master]:
        """One connection that further clients share."""
        path = Path(tempfile.mkdtemp(prefix="cm-", dir="/tmp"))
        control = path / "s"
        options = ("-M", "-S", str(control), "-N", *extra)
        process = subprocess.Popen(
            self.argv(*options, auth=auth), env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:

            def up() -> bool:
                assert process.poll() is None, f"the shared connection ended: {process.stderr.read()!r}"  # type: ignore[union-attr]
                return control.exists()

            wait_until("the control socket of the shared connection", up)
            yield Master(self, control, process)
        finally:
            end(process)
            shutil.rmtree(path, ignore_errors=True)


class Master:
    """A ControlMaster connection. A client that cannot use it fails: it never falls back to a connection of its own."""

    def __init__(self, ssh: Ssh, control: Path, process: subprocess.Popen[bytes]) -> None:
        self.ssh = ssh
        self.control = control
        self.process = process
        self._extra = ("-S", str(control), "-o", "ControlMaster=no", "-o", "ProxyCommand=false")

    def run(self, command: str | bytes, *extra: str, **kwargs: Any) -> subprocess.CompletedProcess[bytes]:
        """As [`Ssh.run`], over the shared connection."""
        return self.ssh.run(command, *self._extra, *extra, **kwargs)

    def out(self, command: str | bytes, *extra: str, **kwargs: Any) -> str:
        """As [`Ssh.out`], over the shared connection."""
        return self.ssh.out(command, *self._extra, *extra, **kwargs)

    def popen(self, command: str | bytes | None, *extra: str, **kwargs: Any) -> subprocess.Popen[bytes]:
        """As [`Ssh.popen`], over the shared connection."""
        return self.ssh.popen(command, *self._extra, *extra, **kwargs)

    def terminal(self, command: str | None = None, *extra: str, rows: int = 24, cols: int = 80) -> Terminal:
        """As [`Ssh.terminal`], over the shared connection."""
        return self.ssh.terminal(command, *self._extra, *extra, rows=rows, cols=cols)


class Terminal:
    """A program on a pseudo-terminal that the test owns."""

    def __init__(self, argv: Sequence[str | bytes], env: dict[str, str], rows: int = 24, cols: int = 80) -> None:
        self._ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))
        self._seen = bytearray()
        self._read_to = 0
        self._changed = threading.Condition()
        self._over = False
        self.process = subprocess.Popen(
            argv,
            env=env,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._ours, 65536)
            except OSError:
                data = b""
            with self._changed:
                self._seen += data
                self._over = not data
                self._changed.notify_all()
            if not data:
                return

    @property
    def seen(self) -> bytes:
        """Everything shown so far."""
        with self._changed:
            return bytes(self._seen)

    def send(self, data: str | bytes) -> None:
        """Types."""
        os.write(self._ours, data.encode() if isinstance(data, str) else data)

    def expect(self, pattern: str | bytes, within: float = 15) -> re.Match[bytes]:
        """Waits for a regular expression in what was shown since the last match."""
        wanted = re.compile(pattern.encode() if isinstance(pattern, str) else pattern, re.DOTALL)
        deadline = time.monotonic() + within
        with self._changed:
            while True:
                match = wanted.search(bytes(self._seen), self._read_to)
                if match:
                    self._read_to = match.end()
                    return match
                left = deadline - time.monotonic()
                if self._over or left <= 0:
                    why = "the program ended" if self._over else f"nothing within {within} s"
                    shown = bytes(self._seen[self._read_to :])[-2000:]
                    raise Late(f"{wanted.pattern!r} was not shown ({why}); since the last match: {shown!r}")
                self._changed.wait(left)

    def ask(self, command: str, within: float = 15) -> str:
        """Runs a command in a shell on this terminal and returns its output, without the echo and the prompt."""
        mark = uuid.uuid4().hex[:12]
        head, tail = mark[:6], mark[6:]
        self.send(f"printf '%s%s\\n' {head} {tail}; {command}; printf '%s%s\\n' {tail} {head}\r")
        self.expect(f"{head}{tail}\r?\n", within)
        match = self.expect(f"(.*?){tail}{head}", within)
        return match.group(1).decode(errors="replace").replace("\r\n", "\n").strip()

    def resize(self, rows: int, cols: int) -> None:
        """Changes the terminal's size; the kernel sends SIGWINCH."""
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    def wait(self, within: float = 15) -> int:
        """The program's exit status. What it showed last is then in `seen`."""
        try:
            status = self.process.wait(within)
        except subprocess.TimeoutExpired:
            raise Late(f"the program did not end within {within} s; last shown: {self.seen[-2000:]!r}") from None
        # Reading ends with the terminal's last program; one that the program left behind may hold it open.
        self._reader.join(2)
        return status

    def close(self) -> None:
        """Takes the terminal away."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        self._reader.join(10)
        with contextlib.suppress(OSError):
            os.close(self._ours)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def told(done: subprocess.CompletedProcess[bytes]) -> str:
    """What a program said, short enough for a failure's message."""
    return f"status {done.returncode}, stdout {done.stdout[-1500:]!r}, stderr {done.stderr[-1500:]!r}"


# --- server ------------------------------------------------------------------------------------------------------


class Session:
    """One session, as the API's answer to its creation described it."""

    def __init__(self, server: Server, data: dict[str, Any], key: Path | None) -> None:
        self.server = server
        self.data = data
        self.id: str = data["session_id"]
        self.user_id: str = data["user_id"]
        self.ssh = Ssh(data["ssh"], server.work, key)

    def get(self) -> dict[str, Any]:
        """`GET /sessions/{id}`."""
        return self.server.ok("GET", f"/sessions/{self.id}")

    def status(self) -> dict[str, Any]:
        """`GET /sessions/{id}/status`."""
        return self.server.ok("GET", f"/sessions/{self.id}/status")

    def wait_state(self, *states: str, within: float = 30) -> dict[str, Any]:
        """Waits for one of the states and returns the session; fails early in a final state that was not asked for."""

        def probe() -> dict[str, Any] | None:
            now = self.get()
            state = now["lifecycle_state"]
            if state in states:
                return now
            assert state not in ("terminated", "failed"), f"session {self.id} ended instead of {states}: {now}"
            return None

        return wait_until(f"session {self.id} in {' or '.join(states)}", probe, within, every=0.1)

    def reason(self) -> str:
        """The code of `lifecycle_reason`."""
        reason = self.get()["lifecycle_reason"]
        return reason["code"] if isinstance(reason, dict) else reason

    def terminate(self) -> httpx.Response:
        """`POST /sessions/{id}/terminate`."""
        return self.server.http("POST", f"/sessions/{self.id}/terminate")

    def ticket(self) -> str:
        """A single-use ticket for the terminal's WebSocket."""
        return self.server.ok("POST", f"/sessions/{self.id}/terminal-ticket")["ticket"]

    def environment(self) -> dict[str, str]:
        """What there is of its environment: processes of this machine, or its pod and network policy."""
        return self.server.environments(self.get()["environment"]["environment_id"])

    def kill_environment(self) -> None:
        """As [`Server.kill_environments`], of this session."""
        self.server.kill_environments(self.get()["environment"]["environment_id"])

    @property
    def http_base(self) -> str:
        """`http://HOST:PORT` of the server."""
        return self.server.url

    @property
    def ws_base(self) -> str:
        """`ws://HOST:PORT` of the server."""
        return self.server.url.replace("http", "ws", 1)


class Server:
    """`carrel serve` with its own data directory, exams and API key; may be killed and started again.

    Its environments are sandboxes of this machine, or with a `cluster` pods in a namespace of its own.
    """

    def __init__(
        self,
        work: Path,
        database_url: str | None = None,
        exams: dict[str, str] | None = None,
        options: Sequence[str] = (),
        env: dict[str, str] | None = None,
        binary: Path | None = None,
        prefix: Sequence[str] = (),
        cluster: Cluster | None = None,
    ) -> None:
        self.work = Path(tempfile.mkdtemp(prefix="server-", dir=work))
        self.work.chmod(0o755)
        self.data_dir = self.work / "data"
        self.exams_dir = self.work / "exams"
        self.exams_dir.mkdir()
        for name, body in (EXAMS if exams is None else exams).items():
            (self.exams_dir / f"{name}.yaml").write_text(f"id: {name}\ntitle: Test exam {name}\n{body}")
        self.database_url = database_url
        self.options = list(options)
        self.variables = env or {}
        self.binary = binary or BINARY
        self.prefix = list(prefix)
        self.http_port = free_port()
        self.ssh_port = free_port()
        self.url = f"http://127.0.0.1:{self.http_port}"
        self.log = self.work / "server.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.key = ""
        self.client = httpx.Client(base_url=self.url, timeout=30, trust_env=False)
        self.sessions: list[Session] = []
        self.marks: list[Path | str] = [self.work]
        self.namespace: Namespace | None = cluster.namespace() if cluster else None

    @property
    def env(self) -> dict[str, str]:
        """The server's variables: none of the developer's own settings."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("CARREL_")}
        pods = {"KUBECONFIG": str(self.namespace.kubeconfig)} if self.namespace else {}
        return kept | {"RUST_LOG": "info"} | pods | self.variables

    def environment_options(self) -> list[str]:
        """Where sessions run. Of what a pod may use only a little is reserved, so that many fit on one node."""
        if not self.namespace:
            return ["--environment", "local"]
        chosen = {
            "namespace": self.namespace.name,
            "default-image": self.namespace.cluster.session_image,
            "cpu-request-percent": "1",
            "memory-request-percent": "5",
        }
        options = [word for name, value in chosen.items() for word in (f"--kubernetes-{name}", value)]
        return ["--environment", "kubernetes", *options]

    def argv(self) -> list[str]:
        """The command line of `serve`."""
        database = ["--database-url", self.database_url] if self.database_url else []
        return [
            *self.prefix,
            str(self.binary),
            "serve",
            *database,
            "--data-dir",
            str(self.data_dir),
            "--http-listen",
            f"127.0.0.1:{self.http_port}",
            "--ssh-listen",
            f"127.0.0.1:{self.ssh_port}",
            *self.environment_options(),
            "--exams",
            str(self.exams_dir),
            *self.options,
        ]

    def cli(self, *words: str, timeout: float = 30) -> subprocess.CompletedProcess[bytes]:
        """Another command of the same binary with the same database."""
        variables = {"CARREL_DATA_DIR": str(self.data_dir)}
        if self.database_url:
            variables["CARREL_DATABASE_URL"] = self.database_url
        return subprocess.run(
            [*self.prefix, str(self.binary), *words], env=self.env | variables, capture_output=True, timeout=timeout, stdin=subprocess.DEVNULL
        )

    def create_key(self, *scopes: str, name: str = "tests") -> str:
        """An API key with the scopes."""
        done = self.cli("api-key", "create", "--name", name, *(word for scope in scopes for word in ("--scope", scope)))
        assert done.returncode == 0, f"no API key: {told(done)}"
        return json.loads(done.stdout)["key"]

    def start(self, within: float = 30) -> Server:
        """Starts it and waits until it is ready."""
        if not self.key:
            self.key = self.create_key("platform", "operator")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.argv(), env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_until("GET /readyz answers 200", self.ready, within)
        if not self.namespace:
            self.marks = [self.work, instance_of(self.data_dir)]
        return self

    def ready(self) -> bool:
        """Is it? Fails when the process has ended."""
        assert self.process and self.process.poll() is None, f"the server ended: {self.tail()}"
        try:
            return self.client.get("/v1/readyz").status_code == 200 or self.client.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    @property
    def pid(self) -> int:
        """Of the running server."""
        assert self.process and self.process.poll() is None, f"the server is not running: {self.tail()}"
        return self.process.pid

    def tail(self, lines: int = 30) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else "(no log)"

    def sigkill(self) -> None:
        """Ends the process without a chance to tidy up."""
        assert self.process
        self.process.kill()
        self.process.wait(10)

    def stop(self, within: float = 20) -> int:
        """SIGTERM, and its exit status."""
        assert self.process
        return end(self.process, within)

    def restart(self) -> Server:
        """Ends it in order and starts it again on the same data and ports."""
        self.stop()
        return self.start()

    def http(self, method: str, path: str, json: Any = None, key: str | None = None, **kwargs: Any) -> httpx.Response:
        """A request to `/v1` + path, by default with the suite's key; `key=""` sends none."""
        token = self.key if key is None else key
        headers = kwargs.pop("headers", {}) | ({"Authorization": f"Bearer {token}"} if token else {})
        return self.client.request(method, f"/v1{path}", json=json, headers=headers, **kwargs)

    def ok(self, method: str, path: str, json: Any = None, **kwargs: Any) -> Any:
        """`data` of a successful answer."""
        answer = self.http(method, path, json, **kwargs)
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text[:1000]}\n{self.tail(10)}"
        body = answer.json()
        assert body["success"] is True, body
        return body["data"]

    def create_session(
        self, exam: str = "plain", user_id: str | None = None, ssh_key: Path | None = None, ready: bool = True
    ) -> Session:
        """A session, by default of a new user, and by default waited for until it is ready."""
        body = {"exam_id": exam, "user_id": user_id or str(uuid.uuid4())}
        if ssh_key:
            body["ssh_public_key"] = Path(f"{ssh_key}.pub").read_text().strip()
        session = Session(self, self.ok("POST", "/sessions", body), ssh_key)
        self.sessions.append(session)
        if ready:
            session.wait_state("ready")
        return session

    def environments(self, environment_id: str | None = None) -> dict[str, str]:
        """What there is of one environment or of all: processes (not the server itself), or pods and network policies."""
        if self.namespace:
            return self.namespace.environments(environment_id)
        found = processes_that_mention(*([environment_id] if environment_id else self.marks))
        return {str(pid): line for pid, line in found.items() if not self.process or pid != self.process.pid}

    def kill_environments(self, environment_id: str | None = None) -> None:
        """Ends one environment or all without a chance to tidy up, as a fault would."""
        found = self.environments(environment_id)
        assert found, "nothing of the environment is found: this test is broken"
        if self.namespace:
            pods = [name for name in found if name.startswith("Pod/")]
            self.namespace.kubectl("delete", *pods, "--grace-period=0", "--force", "--wait=false")
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def unended(self) -> set[str]:
        """Sessions of its SQLite database that have not ended, also those that somebody else has made."""
        database = self.data_dir / "carrel.db"
        if not database.is_file():
            return set()
        with contextlib.closing(sqlite3.connect(database, timeout=10)) as connection:
            rows = connection.execute("select id from session where state not in ('terminated', 'failed')")
            return {row[0] for row in rows}

    def close(self) -> None:
        """Ends all sessions, then the server, and fails when something stays."""
        try:
            if self.process and self.process.poll() is None:
                for session in {session.id for session in self.sessions} | self.unended():
                    with contextlib.suppress(httpx.HTTPError):
                        self.http("POST", f"/sessions/{session}/terminate")
                with contextlib.suppress(Late):
                    wait_until("the environments to end", lambda: not self.environments(), within=60 if self.namespace else 20)
                status = self.stop()
                assert status == 0, f"SIGTERM ended the server with {status}, not 0:\n{self.tail()}"
                if self.namespace:
                    left = self.environments()
                    assert not left, f"the server left of its environments: {left}\n{self.tail()}"
            wait_until(
                "no process of the server or of its environments is left", lambda: not processes_that_mention(*self.marks), within=10
            )
        finally:
            self.client.close()
            for pid in processes_that_mention(*self.marks):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if self.namespace:
                self.namespace.delete()

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()


class Demo:
    """`carrel demo --json`, and what its line says."""

    def __init__(self, work: Path, *options: str, prefix: Sequence[str] = (), binary: Path | None = None, within: float = 60) -> None:
        self.work = Path(tempfile.mkdtemp(prefix="demo-", dir=work))
        self.work.chmod(0o777)
        self.log = self.work / "demo.log"
        tmp = self.work / "tmp"
        tmp.mkdir()
        tmp.chmod(0o777)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("CARREL_")}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*prefix, str(binary or BINARY), "demo", "--json", *options],
                env=kept | {"TMPDIR": str(tmp)},
                cwd=self.work,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        line: list[bytes] = []
        reader = threading.Thread(target=lambda: line.append(self.process.stdout.readline()), daemon=True)  # type: ignore[union-attr]
        reader.start()
        reader.join(within)
        if not line or not line[0].strip():
            self.process.kill()
            self.process.wait(10)
            raise Late(f"`carrel demo --json` printed no line within {within} s: {self.log.read_text(errors='replace')[-3000:]}")
        self.data: dict[str, Any] = json.loads(line[0])
        self.data_dir = Path(self.data["data_dir"])
        self.marks = [self.data_dir, instance_of(self.data_dir)]
        assert len(processes_that_mention(*self.marks)) >= 2, "the demo's own processes are not found: a test for leftovers would be worth nothing"
        self.session_id: str = self.data["session_id"]
        self.ssh = Ssh(self.data["ssh"], self.work)
        self.url: str = self.data["api"]["url"]
        self.key: str = self.data["api"]["key"]

    @property
    def pid(self) -> int:
        """Of the server."""
        return self.process.pid

    def http(self, method: str, path: str, json: Any = None) -> httpx.Response:
        """A request to the demo's API with its key."""
        base = self.url.rstrip("/")
        base = base if base.endswith("/v1") else base + "/v1"
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx.request(method, base + path, json=json, headers=headers, timeout=30, trust_env=False)

    def close(self, sig: int = signal.SIGTERM, within: float = 20) -> int:
        """Ends it by a signal; fails when a process, a mount or its directory is left."""
        if self.process.poll() is None:
            self.process.send_signal(sig)
        try:
            status = self.process.wait(within)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
            raise Late(f"the demo did not end within {within} s of signal {sig}: {self.log.read_text(errors='replace')[-2000:]}") from None
        try:
            wait_until("no process of the demo is left", lambda: not processes_that_mention(*self.marks), within=10)
        finally:
            for pid in processes_that_mention(*self.marks):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(self.data_dir) in line]
        assert not mounts, f"the demo left mounts: {mounts}"
        assert not self.data_dir.exists(), f"the demo left its directory: {sorted(self.data_dir.rglob('*'))[:20]}"
        return status


# --- PostgreSQL --------------------------------------------------------------------------------------------------


class Postgres:
    """A PostgreSQL of the suite's own, made by `tests/postgres.sh`; may be stopped and started again."""

    def __init__(self, work: Path) -> None:
        script = REPOSITORY / "tests/postgres.sh"
        # Its server keeps the standard output it is given: a file, not a pipe, or reading would never end.
        told = work / "postgres.env"
        with told.open("wb") as out:
            subprocess.run([str(script), "start"], env=os.environ | {"TMPDIR": str(work)}, stdin=subprocess.DEVNULL, stdout=out, check=True, timeout=90)
        words = dict(word.split("=", 1) for line in told.read_text().splitlines() for word in shlex.split(line) if "=" in word)
        self.url: str = words["CARREL_TEST_POSTGRES_URL"]
        self.directory = Path(words["CARREL_TEST_POSTGRES_DIR"])
        self._script = script
        self._options = (self.directory / "data/postmaster.opts").read_text().split(None, 1)[1]

    def _pg_ctl(self, *words: str) -> None:
        program = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))[-1]
        user = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
        argv = [str(program), "-D", str(self.directory / "data"), "-w", "-t", "30", "-l", str(self.directory / "log"), *words]
        done = subprocess.run(argv, cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60, **user)  # type: ignore[call-overload]
        assert done.returncode == 0, f"pg_ctl {words}: {(self.directory / 'log').read_text()[-2000:]}"

    def stop(self) -> None:
        """Ends it at once, without goodbye to its clients."""
        self._pg_ctl("-m", "immediate", "stop")

    def start(self) -> None:
        """Starts it again, on the same port."""
        options = " ".join(word for word in shlex.split(self._options) if word != "-D" and not word.endswith("/data"))
        self._pg_ctl("-o", options, "start")

    def sql(self, statement: str, url: str | None = None) -> str:
        """Runs a statement and returns its rows, unaligned."""
        done = subprocess.run(["psql", "-XAtq", "-d", url or self.url, "-c", statement], capture_output=True, timeout=30)
        assert done.returncode == 0, told(done)
        return done.stdout.decode().strip()

    def database(self) -> str:
        """The URL of a new, empty database."""
        name = f"t{uuid.uuid4().hex[:12]}"
        self.sql(f"create database {name}")
        return self.url.rsplit("/", 1)[0] + f"/{name}"

    def close(self) -> None:
        """Ends it and removes its data."""
        subprocess.run([str(self._script), "stop", str(self.directory)], check=True, timeout=60)
