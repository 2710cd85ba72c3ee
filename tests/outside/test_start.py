"""Starting and ending the binary: what is wrong is said in one clear sentence, and nothing is left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import BINARY, Demo, Server, Session, free_port, processes_that_mention, told
from waiting import wait_until

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")


def carrel(*words: str, timeout: float = 20, env: dict[str, str] | None = None, **kwargs: Any) -> subprocess.CompletedProcess[bytes]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CARREL_")}
    return subprocess.run([str(BINARY), *words], env=kept | (env or {}), capture_output=True, timeout=timeout, stdin=subprocess.DEVNULL, **kwargs)


def serve(data: Path, *words: str, **kwargs: Any) -> subprocess.CompletedProcess[bytes]:
    """A `serve` that should not start; fails after 20 s if it does."""
    listen = [] if any("--http-listen" in word for word in words) else ["--http-listen", "127.0.0.1:0"]
    listen += [] if any("--ssh-listen" in word for word in words) else ["--ssh-listen", "127.0.0.1:0"]
    try:
        return carrel("serve", "--data-dir", str(data), *listen, *words, **kwargs)
    except subprocess.TimeoutExpired as late:
        raise AssertionError(f"it started (or hangs) instead of refusing: {(late.stderr or b'')[-2000:]!r}") from None


def refused(done: subprocess.CompletedProcess[bytes], *patterns: str, status: int | None = None) -> str:
    """The one sentence on stderr; each pattern must stand in it."""
    assert done.returncode not in (0, 101) and done.returncode > 0, f"no proper refusal: {told(done)}"
    if status is not None:
        assert done.returncode == status, told(done)
    text = done.stderr.decode(errors="replace")
    assert "panicked" not in text and "RUST_BACKTRACE" not in text, text
    for pattern in patterns:
        assert re.search(pattern, text, re.I), f"nothing like {pattern!r} in: {text!r}"
    lines = [line for line in text.splitlines() if line.strip()]
    assert 1 <= len(lines) <= 8, f"not a clear sentence but {len(lines)} lines: {text!r}"
    return text


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--http-listen", "--ssh-listen"])
def test_a_port_in_use_is_named_with_its_flag(tmp_path: Path, taken: int, flag: str) -> None:
    refused(serve(tmp_path / "data", flag, f"127.0.0.1:{taken}"), str(taken), flag, "in use", status=1)


@as_root
def test_an_unwritable_data_directory_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o755)
    done = as_nobody("serve", "--data-dir", str(locked), "--http-listen", "127.0.0.1:0", "--ssh-listen", "127.0.0.1:0")
    refused(done, re.escape(str(locked)), "--data-dir", status=1)


def test_a_data_directory_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(serve(tmp_path / "file"), re.escape(str(tmp_path / "file")), status=1)


def test_a_data_directory_on_a_read_only_place_is_named() -> None:
    refused(serve(Path("/proc/carrel-data")), "/proc/carrel-data", status=1)


def test_a_second_serve_on_the_same_sqlite_file_is_refused(server: Server, tmp_path: Path) -> None:
    done = serve(server.data_dir)
    refused(done, "another|already|in use|running", "carrel.db|PostgreSQL|data", status=1)
    done = serve(tmp_path / "data", "--database-url", f"sqlite:{server.data_dir / 'carrel.db'}")
    refused(done, "another|already|in use|running", status=1)
    assert server.ready(), "the first one suffered"


BAD_EXAMS = {
    "unknown-field": ("id: x\ntitle: X\nduration_minutes: 5\nduratoin: 5\n", r"x\.yaml:4|duratoin"),
    "impossible-value": ("id: x\ntitle: X\nduration_minutes: 0\n", r"duration_minutes"),
    "no-yaml": ("id: [x\n", r"x\.yaml"),
    "missing": ("id: x\ntitle: X\n", r"duration_minutes"),
    "bad-id": ("id: '../x'\ntitle: X\nduration_minutes: 5\n", r"\bid\b"),
    "wrong-type": ("id: x\ntitle: X\nduration_minutes: soon\n", r"duration_minutes"),
    "bad-quantity": ("id: x\ntitle: X\nduration_minutes: 5\nenvironment:\n  memory: lots\n", r"memory"),
    "bad-network": ("id: x\ntitle: X\nduration_minutes: 5\nenvironment:\n  network: [10.0.0.0/99]\n", r"network"),
    "empty": ("", r"x\.yaml"),
    "binary": ("\0\1\2", r"x\.yaml"),
    "bomb": ("a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{c}: &{c} [" + ",".join(["*" + p] * 9) + "]\n" for p, c in zip("abcdefgh", "bcdefghi")), r"x\.yaml"),
}


@pytest.mark.parametrize(("text", "pattern"), BAD_EXAMS.values(), ids=BAD_EXAMS.keys())
def test_a_bad_exam_file_is_named_with_the_place_of_the_fault(tmp_path: Path, text: str, pattern: str) -> None:
    exams = tmp_path / "exams"
    exams.mkdir()
    (exams / "x.yaml").write_text(text)
    refused(serve(tmp_path / "data", "--exams", str(exams)), r"x\.yaml", pattern, status=1)


def test_two_exams_of_one_id_are_both_named(tmp_path: Path) -> None:
    exams = tmp_path / "exams"
    exams.mkdir()
    for name in ("one", "two"):
        (exams / f"{name}.yaml").write_text("id: same\ntitle: X\nduration_minutes: 5\n")
    refused(serve(tmp_path / "data", "--exams", str(exams)), r"one\.yaml", r"two\.yaml", status=1)


def test_a_missing_exam_directory_is_named(tmp_path: Path) -> None:
    refused(serve(tmp_path / "data", "--exams", str(tmp_path / "nowhere")), "nowhere", status=1)


@pytest.mark.parametrize(
    "words",
    [
        ("--http-listen", "not-an-address"),
        ("--ssh-listen", "127.0.0.1:99999"),
        ("--environment", "docker"),
        ("--public-ssh", "no-port"),
        ("--ssh-penalty-exempt", "10.0.0.0/99"),
        ("--no-such-flag",),
        ("--log-format", "xml"),
    ],
    ids=lambda words: words[0].lstrip("-"),
)
def test_a_bad_flag_is_status_2_and_named(tmp_path: Path, words: tuple[str, ...]) -> None:
    refused(serve(tmp_path / "data", *words), words[0], status=2)


def test_a_bad_variable_is_status_2_and_named(tmp_path: Path) -> None:
    done = carrel("serve", "--data-dir", str(tmp_path / "d"), env={"CARREL_SSH_LISTEN": "nonsense"})
    refused(done, "ssh-listen|CARREL_SSH_LISTEN", status=2)


@pytest.mark.parametrize("url", ["mysql://x/y", "sqlite", "postgres://", "nonsense"])
def test_a_bad_database_url_is_refused_without_being_shown_whole(tmp_path: Path, url: str) -> None:
    refused(serve(tmp_path / "data", "--database-url", url, timeout=40), "database|sqlite|postgres")


def test_a_database_that_does_not_answer_is_named_without_its_password(tmp_path: Path) -> None:
    url = f"postgres://carrel:hunter2-secret@127.0.0.1:{free_port()}/x"
    said = refused(serve(tmp_path / "data", "--database-url", url, timeout=40), "database|postgres", status=1)
    assert "hunter2-secret" not in said


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "not.db").write_bytes(os.urandom(8192))
    refused(serve(tmp_path / "data", "--database-url", f"sqlite:{tmp_path / 'not.db'}"), "database", status=1)


def test_a_host_key_that_is_no_key_or_open_to_others_is_refused(tmp_path: Path) -> None:
    bad = tmp_path / "key"
    bad.write_text("no key\n")
    bad.chmod(0o600)
    refused(serve(tmp_path / "data", "--ssh-host-key-file", str(bad)), re.escape(str(bad)), status=1)


@pytest.mark.local("pods need no bubblewrap")
@as_root
def test_without_bubblewrap_it_refuses_and_says_what_to_install(tmp_path: Path) -> None:
    # In a mount namespace of its own the program is hidden; nobody else sees that.
    hide = 'for p in /usr/bin/bwrap /bin/bwrap /usr/local/bin/bwrap; do [ ! -e $p ] || mount --bind /dev/null $p; done; exec "$@"'
    words = [str(BINARY), "serve", "--data-dir", str(tmp_path / "d"), "--http-listen", "127.0.0.1:0", "--ssh-listen", "127.0.0.1:0"]
    done = subprocess.run(["unshare", "-m", "sh", "-c", hide, "sh", *words], capture_output=True, timeout=20, stdin=subprocess.DEVNULL)
    refused(done, "bubblewrap|bwrap", "apt|install", status=1)


@pytest.mark.local("pods need no user namespaces of this machine")
@as_root
def test_without_user_namespaces_it_refuses_and_says_what_to_do() -> None:
    # As an ordinary user in a user namespace that may have no further ones. Its identities are the machine's own.
    with tempfile.TemporaryDirectory(prefix="carrel-bin-", dir="/tmp") as place:
        Path(place).chmod(0o755)
        binary = Path(place) / "carrel"
        shutil.copy2(BINARY, binary)
        binary.chmod(0o755)
        drop = "exec setpriv --reuid=65534 --regid=65534 --clear-groups --ambient-caps=-all --inh-caps=-all --bounding-set=-all"
        words = [str(binary), "serve", "--data-dir", str(Path(place) / "d"), "--http-listen", "127.0.0.1:0", "--ssh-listen", "127.0.0.1:0"]
        Path(place, "d").mkdir()
        shutil.chown(Path(place, "d"), "nobody", "nogroup")
        script = f'read go; echo 0 > /proc/sys/user/max_user_namespaces && {drop} "$@"'
        process = subprocess.Popen(
            ["unshare", "-U", "--keep-caps", "sh", "-c", script, "sh", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        ours = os.readlink("/proc/self/ns/user")
        wait_until("its namespace", lambda: os.readlink(f"/proc/{process.pid}/ns/user") != ours)
        for kind in ("uid_map", "gid_map"):
            Path(f"/proc/{process.pid}/{kind}").write_text("0 0 65536\n")
        out, err = process.communicate(b"go\n", timeout=20)
        done = subprocess.CompletedProcess(words, process.returncode, out, err)
    refused(done, "namespace", status=1)


def test_help_and_version_and_no_command() -> None:
    for words in (("--help",), ("serve", "--help"), ("demo", "--help"), ("api-key", "--help"), ("--version",)):
        done = carrel(*words)
        assert done.returncode == 0 and done.stdout, told(done)
    text = carrel("serve", "--help").stdout.decode()
    for flag in ("database-url", "data-dir", "http-listen", "ssh-listen", "public-url", "public-ssh", "environment", "exams", "kubernetes-namespace"):
        assert f"--{flag}" in text and f"CARREL_{flag.upper().replace('-', '_')}" in text, f"--{flag} or its variable is missing from the help"
    assert carrel().returncode == 2
    assert carrel("no-such-command").returncode == 2


# --- API keys ----------------------------------------------------------------------------------------------------


def test_api_keys_are_made_listed_and_revoked(server: Server) -> None:
    done = server.cli("api-key", "create", "--name", "short-lived", "--scope", "platform")
    made = json.loads(done.stdout)
    assert set(made) == {"id", "key", "scopes"} and made["scopes"] == ["platform"], made
    assert server.http("GET", "/exams", key=made["key"]).status_code == 200
    listed = server.cli("api-key", "list")
    assert listed.returncode == 0 and made["id"].encode() in listed.stdout and b"short-lived" in listed.stdout, told(listed)
    assert made["key"].encode() not in listed.stdout, "the list shows the secret"
    assert server.cli("api-key", "revoke", "--id", made["id"]).returncode == 0
    wait_until("the revoked key is refused", lambda: server.http("GET", "/exams", key=made["key"]).status_code == 401, within=10)
    unknown = server.cli("api-key", "revoke", "--id", "no-such-id")
    assert unknown.returncode != 0, told(unknown)
    bad = server.cli("api-key", "create", "--name", "x", "--scope", "almighty")
    refused(bad, "almighty|scope")


def test_errors_of_the_command_line_are_json(server: Server) -> None:
    done = server.cli("api-key", "revoke", "--id", "no-such-id")
    error = json.loads(done.stderr)
    assert error["error"] is True and error["code"] and error["message"] and isinstance(error["details"], dict), error
    assert done.returncode in (3, 4), told(done)


def test_a_command_with_other_settings_than_the_server_is_refused(session: Session, tmp_path: Path) -> None:
    database = f"sqlite:{session.server.data_dir}/carrel.db"
    words = ("--session-id", session.id, "--database-url", database)
    for settings in (("--data-dir", str(tmp_path)), ("--environment", "kubernetes", "--kubernetes-kubeconfig", str(kubeconfig(tmp_path)))):
        for verb in ("status", "destroy", "create"):
            done = session.server.cli("execution-environment", verb, *words, *settings)
            assert done.returncode == 1, told(done)
            error = json.loads(done.stderr)
            assert error["code"] == "BACKEND_UNAVAILABLE", error
            assert str(session.server.data_dir) in error["message"] and "session-lifecycle transition" in error["message"], error
    assert session.get()["lifecycle_state"] in ("ready", "running")
    assert session.ssh.out("echo here") == "here"


def kubeconfig(directory: Path) -> Path:
    """Of a cluster that is not there."""
    file = directory / "kubeconfig"
    file.write_text(json.dumps({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:1"}}],
        "users": [{"name": "u", "user": {}}],
    }))
    return file


# --- ending ------------------------------------------------------------------------------------------------------


@pytest.mark.local("`carrel demo` is about this machine")
@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_demo_leaves_nothing_behind(work: Path, sig: int) -> None:
    demo = Demo(work)
    try:
        assert demo.ssh.out("echo in") == "in"
        assert stat.S_IMODE(demo.data_dir.stat().st_mode) & 0o077 == 0
        shell = demo.ssh.popen("echo up; (setsid sleep 1000 &) ; cat")
        assert shell.stdout and shell.stdout.readline() == b"up\n"
    finally:
        status = demo.close(sig)
    assert status == 0, f"the demo ended with {status}"
    assert shell.wait(10) == 255
    shell.communicate()
    left = list((demo.work / "tmp").iterdir())
    assert not left, f"temporary files are left: {left}"


@pytest.mark.local("`carrel demo` is about this machine")
def test_a_demos_line_is_the_contracts(demo: Demo) -> None:
    assert set(demo.data) == {"session_id", "user_id", "exam_id", "environment_id", "data_dir", "ssh", "browser_url", "api"}, set(demo.data)
    assert set(demo.data["ssh"]) == {"host", "port", "username", "password", "command", "host_key_fingerprint", "known_hosts"}
    assert set(demo.data["api"]) == {"url", "key"}
    assert "#" in demo.data["browser_url"], "the ticket is not in the fragment"
    before, ticket = demo.data["browser_url"].split("#", 1)
    assert ticket and "ticket" not in before and "?" not in before, demo.data["browser_url"]
    assert demo.ssh.out("echo in") == "in"
    session = demo.http("GET", f"/sessions/{demo.session_id}")
    assert session.status_code == 200 and session.json()["data"]["environment"]["environment_id"] == demo.data["environment_id"]


@pytest.mark.local("`carrel demo` is about this machine")
def test_a_demo_for_people_says_what_to_paste(work: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CARREL_")}
    process = subprocess.Popen([str(BINARY), "demo"], env=kept, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=work)
    seen = b""
    try:
        assert process.stdout

        def probe() -> bool:
            nonlocal seen
            os.set_blocking(process.stdout.fileno(), False)  # type: ignore[union-attr]
            seen += process.stdout.read() or b""  # type: ignore[union-attr]
            return b"ssh -p" in seen and b"SHA256:" in seen and b"http://" in seen

        wait_until("the command, the fingerprint and the address", probe, within=60)
        assert re.search(rb"password", seen, re.I), seen
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        process.stdout.close()  # type: ignore[union-attr]


@pytest.mark.local("`carrel demo` is about this machine")
def test_a_demo_interrupted_while_it_starts_leaves_nothing(work: Path) -> None:
    for wait in (0.02, 0.1, 0.3, 0.6):
        tmp = Path(tempfile.mkdtemp(prefix="demo-tmp-", dir=work))
        kept = {name: value for name, value in os.environ.items() if not name.startswith("CARREL_")}
        process = subprocess.Popen(
            [str(BINARY), "demo", "--json"], env=kept | {"TMPDIR": str(tmp)}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
        process.wait(20)
        wait_until("no process is left", lambda tmp=tmp: not processes_that_mention(tmp), within=10)
        assert not list(tmp.iterdir()), f"interrupted after {wait} s it left {list(tmp.iterdir())}"


def test_sigterm_ends_a_server_in_order(new_server: Callable[..., Server]) -> None:
    server = new_server()
    session = server.create_session()
    with session.ssh.terminal() as terminal:
        terminal.ask("true")
        assert server.stop() == 0
        assert terminal.wait(10) == 255
        assert re.search(rb"restart|connect again|again", terminal.seen[-800:], re.I), f"no word of goodbye: {terminal.seen[-500:]!r}"
    server.start()


# --- an ordinary user --------------------------------------------------------------------------------------------


def as_nobody(*words: str) -> subprocess.CompletedProcess[bytes]:
    copy = Path(tempfile.mkdtemp(prefix="carrel-bin-", dir="/tmp"))
    try:
        copy.chmod(0o755)
        shutil.copy2(BINARY, copy / "carrel")
        (copy / "carrel").chmod(0o755)
        return subprocess.run(
            [str(copy / "carrel"), *words], user="nobody", group="nogroup", extra_groups=[], capture_output=True, timeout=30, stdin=subprocess.DEVNULL, cwd="/"
        )
    finally:
        shutil.rmtree(copy)


@pytest.mark.local("`carrel demo` is about this machine")
@as_root
@pytest.mark.timeout(120)
def test_an_ordinary_user_runs_a_demo(work: Path) -> None:
    binary = work / "carrel-for-all"
    shutil.copy2(BINARY, binary)
    binary.chmod(0o755)
    prefix = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "env", "HOME=/nonexistent"]
    demo = Demo(work, prefix=prefix, binary=binary)
    try:
        assert demo.ssh.out("echo in; id -u").splitlines()[0] == "in"
        assert demo.ssh.run("exit 42").returncode == 42
        assert demo.ssh.run("touch /usr/x").returncode != 0
        with demo.ssh.terminal() as terminal:
            assert terminal.ask("test -t 0 && echo tty") == "tty"
            terminal.send("exit\r")
            terminal.wait()
        owners = {Path(f"/proc/{demo.pid}").stat().st_uid}
        assert owners == {65534}, "the server does not run as nobody: this test is broken"
    finally:
        assert demo.close() == 0
