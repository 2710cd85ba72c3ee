"""Other clients than OpenSSH, unmodified: paramiko, asyncssh, ssh2, Dropbear, PuTTY, Ansible; and ssh-audit's view."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import asyncssh
import paramiko
import pytest

from harness import Session, Terminal, need, told

HERE = Path(__file__).resolve().parent
DATA = os.urandom(2_000_000)


def tool(name: str) -> str:
    """A program of the suite's own Python environment."""
    path = Path(sys.executable).parent / name
    return str(path) if path.exists() else need(name)


def host_key(session: Session) -> tuple[str, bytes]:
    """Type and blob of the host key, from the known_hosts line that the API gave."""
    words = session.ssh.known_hosts.read_text().splitlines()[0].split()
    return words[1], base64.b64decode(words[2])


def test_the_known_hosts_line_and_the_fingerprint_are_the_same_key(session: Session) -> None:
    digest = base64.b64encode(hashlib.sha256(host_key(session)[1]).digest()).decode().rstrip("=")
    assert session.ssh.fingerprint == f"SHA256:{digest}"
    host, port = session.ssh.host, session.ssh.port
    assert session.ssh.known_hosts.read_text().startswith(f"[{host}]:{port} ssh-ed25519 ")


# --- paramiko ----------------------------------------------------------------------------------------------------


def paramiko_client(session: Session, auth: str) -> paramiko.SSHClient:
    client = paramiko.SSHClient()
    client.load_host_keys(str(session.ssh.known_hosts))
    client.set_missing_host_key_policy(paramiko.RejectPolicy())
    secret = {"password": session.ssh.password} if auth == "password" else {"key_filename": str(session.ssh.key)}
    client.connect(
        session.ssh.host, session.ssh.port, session.ssh.user, timeout=20, allow_agent=False, look_for_keys=False, **secret
    )
    return client


@pytest.mark.parametrize("auth", ["password", "key"])
def test_paramiko(session: Session, auth: str, tmp_path: Path) -> None:
    with paramiko_client(session, auth) as client:
        transport = client.get_transport()
        assert transport
        transport.set_keepalive(1)
        stdin, stdout, stderr = client.exec_command("echo out; echo err >&2; cat; exit 42", timeout=20)
        stdin.write(b"input")
        stdin.channel.shutdown_write()
        assert stdout.read() == b"out\ninput" and stderr.read() == b"err\n"
        assert stdout.channel.recv_exit_status() == 42
        _, stdout, _ = client.exec_command("kill -KILL $$", timeout=20)
        assert stdout.channel.recv_exit_status() == 137
        _, stdout, _ = client.exec_command("stty size", get_pty=True, timeout=20)
        assert stdout.read().strip() == b"24 80" and stdout.channel.recv_exit_status() == 0
        _, stdout, _ = client.exec_command("echo $LANG", environment={"LANG": "C.UTF-8"}, timeout=20)
        assert stdout.read().strip() == b"C.UTF-8"
        # Silence with a keepalive each second.
        _, stdout, _ = client.exec_command("sleep 4; exit 9", timeout=20)
        assert stdout.channel.recv_exit_status() == 9
        with client.open_sftp() as sftp:
            (tmp_path / "data").write_bytes(DATA)
            sftp.put(str(tmp_path / "data"), "from-paramiko")
            assert sftp.stat("from-paramiko").st_size == len(DATA)
            sftp.get("from-paramiko", str(tmp_path / "back"))
            sftp.remove("from-paramiko")
            with pytest.raises(FileNotFoundError):
                sftp.stat("from-paramiko")
        assert (tmp_path / "back").read_bytes() == DATA


@pytest.mark.xfail(
    strict=True,
    reason="russh 0.65.1 answers the service request of a connection once; paramiko sends one before each attempt and waits 30 s",
)
def test_paramiko_tries_a_wrong_key_first(session: Session, tmp_path: Path) -> None:
    """It asks for the authentication service again before each attempt, and waits for the answer."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "wrong")], check=True, timeout=20)
    with paramiko.SSHClient() as client:
        client.load_host_keys(str(session.ssh.known_hosts))
        started = time.monotonic()
        client.connect(
            session.ssh.host,
            session.ssh.port,
            session.ssh.user,
            password=session.ssh.password,
            key_filename=str(tmp_path / "wrong"),
            allow_agent=False,
            look_for_keys=False,
        )
        assert time.monotonic() - started < 5
        _, stdout, _ = client.exec_command("echo in", timeout=20)
        assert stdout.read() == b"in\n"


def test_paramikos_shell(session: Session) -> None:
    with paramiko_client(session, "password") as client:
        channel = client.invoke_shell(term="xterm", width=91, height=29)
        channel.settimeout(15)
        channel.sendall(b"stty size; echo do''ne\n")
        seen = b""
        while b"done" not in seen:
            data = channel.recv(4096)
            assert data, f"the shell ended: {seen!r}"
            seen += data
        assert b"29 91" in seen
        channel.resize_pty(width=120, height=40)
        channel.sendall(b"stty size; exit 8\n")
        while data := channel.recv(4096):
            seen += data
        assert b"40 120" in seen, seen
        assert channel.recv_exit_status() == 8


def test_paramiko_is_told_that_forwarding_is_refused(session: Session) -> None:
    with paramiko_client(session, "key") as client:
        transport = client.get_transport()
        assert transport
        with pytest.raises(paramiko.ChannelException) as refused:
            transport.open_channel("direct-tcpip", ("127.0.0.1", 22), ("127.0.0.1", 1), timeout=15)
        assert refused.value.code == 1, f"not 'administratively prohibited': {refused.value}"
        with pytest.raises(paramiko.SSHException):
            transport.request_port_forward("127.0.0.1", 0)
        with pytest.raises(paramiko.ChannelException):
            transport.open_channel("no-such-type", timeout=15)
        _, stdout, _ = client.exec_command("echo alive", timeout=20)
        assert stdout.read() == b"alive\n"


# --- asyncssh ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("auth", ["password", "key"])
def test_asyncssh(session: Session, auth: str, tmp_path: Path) -> None:
    async def run() -> None:
        secret = {"password": session.ssh.password, "client_keys": None} if auth == "password" else {"client_keys": [str(session.ssh.key)]}
        connecting = asyncssh.connect(
            session.ssh.host,
            session.ssh.port,
            username=session.ssh.user,
            known_hosts=str(session.ssh.known_hosts),
            agent_path=None,
            config=None,
            keepalive_interval=0.5,
            keepalive_count_max=3,
            **secret,
        )
        async with connecting as connection:
            done = await connection.run("echo out; echo err >&2; cat; exit 42", input="input")
            assert (done.stdout, done.stderr, done.exit_status) == ("out\ninput", "err\n", 42)
            done = await connection.run("cat", input=DATA, encoding=None)
            assert done.stdout == DATA and done.exit_status == 0
            many = await asyncio.gather(*(connection.run(f"sleep 0.3; exit {n}") for n in range(8)))
            assert [one.exit_status for one in many] == list(range(8))
            done = await connection.run("stty size", term_type="xterm", term_size=(77, 22))
            assert done.stdout.strip() == "22 77"
            async with connection.create_process("trap 'echo got-usr1; exit 5' USR1; echo up; while :; do sleep 0.1; done") as process:
                assert (await process.stdout.readline()).strip() == "up"
                process.send_signal("USR1")
                done = await process.wait()
                assert "got-usr1" in done.stdout and done.exit_status == 5, f"the signal request did not arrive: {done}"
            async with connection.create_process("echo up; exec sleep 60") as process:
                assert (await process.stdout.readline()).strip() == "up"
                process.terminate()
                done = await process.wait()
                assert done.returncode in (143, -15), f"TERM gave {done.returncode}"
            done = await connection.run("sleep 3; exit 7")
            assert done.exit_status == 7
            async with connection.start_sftp_client() as sftp:
                (tmp_path / "data").write_bytes(DATA)
                await sftp.put(str(tmp_path / "data"), "from-asyncssh")
                await sftp.get("from-asyncssh", str(tmp_path / "back"))
                await sftp.remove("from-asyncssh")
            assert (tmp_path / "back").read_bytes() == DATA

    asyncio.run(asyncio.wait_for(run(), 60))


# --- ssh2 (npm) --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def ssh2() -> Path:
    """The script, with its package installed."""
    need("node")
    home = HERE / "node"
    if not (home / "node_modules/ssh2").is_dir():
        argv = [need("npm"), "ci", "--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund"]
        subprocess.run(argv, cwd=home, check=True, timeout=120, stdin=subprocess.DEVNULL, capture_output=True)
    return home / "check.mjs"


def run_ssh2(script: Path, session: Session, auth: str, what: str) -> dict[str, object]:
    env = {
        "PATH": os.environ["PATH"],
        "TEST_HOST": session.ssh.host,
        "TEST_PORT": str(session.ssh.port),
        "TEST_USER": session.ssh.user,
        "TEST_PASSWORD": session.ssh.password,
        "TEST_KEY": str(session.ssh.key) if auth == "key" else "",
        "TEST_HOST_KEY": session.ssh.fingerprint.removeprefix("SHA256:"),
        "TEST_WHAT": what,
    }
    done = subprocess.run(["node", str(script)], env=env, capture_output=True, timeout=100)
    assert done.returncode == 0, told(done)
    return json.loads(done.stdout)


@pytest.mark.parametrize("auth", ["password", "key"])
def test_ssh2_of_npm(session: Session, ssh2: Path, auth: str) -> None:
    seen = run_ssh2(ssh2, session, auth, "everything")
    assert (seen["code"], seen["out"], seen["err"]) == (42, "out\n", "err\n"), seen
    assert seen["killed"] == [137, None] or seen["killed"][1] == "SIGKILL", seen  # type: ignore[index]
    assert seen["echo"] is True and seen["sftp"] is True, seen
    assert "33 101" in seen["terminal"] and "/dev/pts/" in seen["terminal"], seen  # type: ignore[operator]
    assert seen["slow"] == 3 and seen["parallel"] == [1, 2, 3, 4, 5, 6], seen


@pytest.mark.parametrize("auth", ["password", "key"])
def test_86_connections_of_ssh2(session: Session, ssh2: Path, auth: str) -> None:
    assert run_ssh2(ssh2, session, auth, "grading")["wrong"] == []


# --- Dropbear ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("auth", ["password", "key"])
def test_dropbears_dbclient(session: Session, tmp_path: Path, auth: str) -> None:
    kind, blob = host_key(session)
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh/known_hosts").write_text(f"{session.ssh.host} {kind} {base64.b64encode(blob).decode()}\n")
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    words: list[str] = []
    if auth == "password":
        env["DROPBEAR_PASSWORD"] = session.ssh.password
    else:
        # dropbearconvert reads unencrypted OpenSSH keys and writes Dropbear's own form.
        convert = shutil.which("dropbearconvert") or "/usr/lib/dropbear/dropbearconvert"
        subprocess.run([convert, "openssh", "dropbear", str(session.ssh.key), str(tmp_path / "id")], check=True, capture_output=True, timeout=20)
        words = ["-i", str(tmp_path / "id")]

    def dbclient(*command: str, input: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        argv = [need("dbclient"), *words, "-p", str(session.ssh.port), "-l", session.ssh.user, *command]
        return subprocess.run(argv, env=env, input=input, capture_output=True, timeout=60)

    host = session.ssh.host
    done = dbclient(host, "echo out; echo err >&2; exit 42")
    assert done.returncode == 42 and done.stdout == b"out\n" and b"err\n" in done.stderr, told(done)
    done = dbclient(host, "cat", input=DATA)
    assert done.returncode == 0 and done.stdout == DATA, told(done)[:300]
    argv = [need("dbclient"), *words, "-t", "-p", str(session.ssh.port), "-l", session.ssh.user, host, "tty; stty size; exit 4"]
    with Terminal(argv, env | {"TERM": "xterm"}, rows=28, cols=93) as terminal:
        terminal.expect("/dev/pts/.*28 93")
        assert terminal.wait() == 4
    done = dbclient("-T", host, input=b"echo from-shell\nexit 3\n")
    assert done.returncode == 3 and b"from-shell" in done.stdout, told(done)


# --- PuTTY -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("auth", ["password", "key"])
def test_puttys_plink_and_pscp(session: Session, tmp_path: Path, auth: str) -> None:
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    words = ["-batch", "-P", str(session.ssh.port), "-l", session.ssh.user, "-hostkey", session.ssh.fingerprint, "-noagent"]
    if auth == "password":
        (tmp_path / "pw").write_text(session.ssh.password)
        words += ["-pwfile", str(tmp_path / "pw")]
    else:
        ppk = tmp_path / "key.ppk"
        subprocess.run([need("puttygen"), str(session.ssh.key), "-O", "private", "-o", str(ppk)], check=True, env=env, capture_output=True, timeout=20)
        words += ["-i", str(ppk)]

    def plink(*command: str, input: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run([need("plink"), "-ssh", *words, *command], env=env, input=input, capture_output=True, timeout=60)

    host = session.ssh.host
    done = plink(host, "echo out; echo err >&2; exit 42")
    assert (done.returncode, done.stdout, done.stderr) == (42, b"out\n", b"err\n"), told(done)
    done = plink(host, "cat", input=DATA)
    assert done.returncode == 0 and done.stdout == DATA, told(done)[:300]
    done = plink("-t", host, "tty; exit 4")
    assert done.returncode == 4 and b"/dev/pts/" in done.stdout, told(done)
    (tmp_path / "data").write_bytes(DATA)
    for mode in ("-sftp", "-scp"):
        argv = [need("pscp"), mode, *words]
        done = subprocess.run([*argv, str(tmp_path / "data"), f"{host}:from-putty"], env=env, capture_output=True, timeout=60, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, f"{mode}: {told(done)}"
        done = subprocess.run([*argv, f"{host}:from-putty", str(tmp_path / "back")], env=env, capture_output=True, timeout=60, stdin=subprocess.DEVNULL)
        assert done.returncode == 0 and (tmp_path / "back").read_bytes() == DATA, f"{mode}: {told(done)}"
    session.ssh.out("rm ~/from-putty")


# --- Ansible -----------------------------------------------------------------------------------------------------


@pytest.mark.timeout(180)
@pytest.mark.parametrize("pipelining", [False, pytest.param(True, marks=pytest.mark.pods)], ids=["files", "pipelining"])
@pytest.mark.parametrize("auth", ["password", "key"])
def test_ansible(session: Session, tmp_path: Path, auth: str, pipelining: bool) -> None:
    ssh = session.ssh
    inventory = {
        "ansible_host": ssh.host,
        "ansible_port": ssh.port,
        "ansible_user": ssh.user,
        "ansible_python_interpreter": "/usr/bin/python3",
        "ansible_ssh_common_args": f"-F none -o UserKnownHostsFile={ssh.known_hosts} -o GlobalKnownHostsFile=/dev/null -o IdentityAgent=none",
        "ansible_pipelining": pipelining,
    }
    if auth == "key":
        inventory |= {"ansible_ssh_private_key_file": str(ssh.key)}
    else:
        inventory |= {"ansible_password": ssh.password, "ansible_ssh_password_mechanism": "ssh_askpass"}
    (tmp_path / "hosts.json").write_text(json.dumps({"all": {"hosts": {"candidate": inventory}}}))
    # Ansible makes `~USER` of `~`. The image of a pod knows its own user only, a sandbox the session's name as well.
    home = "{{ ansible_facts.env.HOME }}" if session.server.namespace else "~"
    (tmp_path / "file.txt").write_text("copied by ansible\n")
    (tmp_path / "play.yml").write_text(
        f"""
- hosts: all
  gather_facts: true
  tasks:
    - ansible.builtin.ping:
    - ansible.builtin.copy: {{src: "{tmp_path}/file.txt", dest: "{home}/file.txt", mode: "0640"}}
      register: copied
    - ansible.builtin.command: cat file.txt
      args: {{chdir: "{{{{ ansible_facts.user_dir }}}}"}}
      register: read
    - ansible.builtin.assert: {{that: [copied is changed, read.stdout == "copied by ansible"]}}
    - ansible.builtin.command: sh -c 'echo wrong >&2; exit 7'
      register: failed
      failed_when: failed.rc != 7 or failed.stderr != "wrong"
    - ansible.builtin.copy: {{content: "", dest: "{home}/file.txt"}}
    - ansible.builtin.fetch: {{src: "{home}/file.txt", dest: "{tmp_path}/fetched", flat: true}}
    - ansible.builtin.file: {{path: "{home}/file.txt", state: absent}}
"""
    )
    env = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "ANSIBLE_HOME": str(tmp_path / "ansible"),
        "ANSIBLE_LOCAL_TEMP": str(tmp_path / "tmp"),
        # A control socket's path is short: at most 108 bytes.
        "ANSIBLE_SSH_CONTROL_PATH_DIR": str(ssh.work / "cp"),
        "ANSIBLE_SSH_ARGS": "-o ControlMaster=auto -o ControlPersist=5s",
        "ANSIBLE_NOCOLOR": "1",
        "LANG": "C.UTF-8",
        "LC_ALL": "C.UTF-8",
    }
    argv = [tool("ansible-playbook"), "-i", str(tmp_path / "hosts.json"), str(tmp_path / "play.yml")]
    done = subprocess.run(argv, env=env, capture_output=True, timeout=150, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, told(done)
    assert b"failed=0" in done.stdout and b"unreachable=0" in done.stdout, told(done)
    assert (tmp_path / "fetched").read_bytes() == b""


# --- ssh-audit ---------------------------------------------------------------------------------------------------


def test_ssh_audit_finds_no_failure(session: Session) -> None:
    argv = [tool("ssh-audit"), "--json", "--skip-rate-test", "-p", str(session.ssh.port), session.ssh.host]
    done = subprocess.run(argv, capture_output=True, timeout=60, stdin=subprocess.DEVNULL)
    # 0: nothing, 2: warnings; 3 would be a failure and 1 an error of the connection.
    assert done.returncode in (0, 2), told(done)
    found = json.loads(done.stdout)
    notes = [
        (kind, entry["algorithm"], entry["notes"]["fail"])
        for kind in ("kex", "key", "enc", "mac")
        for entry in found[kind]
        if entry.get("notes", {}).get("fail")
    ]
    assert not notes, f"weak algorithms are offered: {notes}"
    assert not found.get("cves"), found.get("cves")
    offered = {entry["algorithm"] for entry in found["enc"]}
    assert not any("chacha20" in name or "cbc" in name for name in offered), offered
    assert found["compression"] == ["none"], found["compression"]


def test_the_committed_ssh_audit_policy_passes(session: Session) -> None:
    argv = [tool("ssh-audit"), "--skip-rate-test", "-P", str(HERE / "ssh-audit-policy.txt"), "-p", str(session.ssh.port), session.ssh.host]
    done = subprocess.run(argv, capture_output=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and b"Passed" in done.stdout, told(done)
