"""Files: scp, sftp, rsync and tar, both ways, with awkward names and sizes."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from harness import Server, Session, Ssh, need, told

NAMES = ["plain.txt", "two words.txt", "Ünïcödé — 文件 🎓.txt", "quote's \"and\" $dollar.txt", "-dash.txt", "new\nline.txt"]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Files of many sizes, awkward names, a subdirectory and a link."""
    root = tmp_path / "tree"
    (root / "sub dir").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        (root / name).write_bytes(os.urandom(1000 * number + 1))
    (root / "empty").write_bytes(b"")
    (root / "sub dir" / "large.bin").write_bytes(os.urandom(3_000_001))
    (root / "script.sh").write_text("#!/bin/sh\necho ran\n")
    (root / "script.sh").chmod(0o755)
    return root


def sums(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*") if path.is_file()}


def remote_sums(ssh: Ssh, directory: str) -> dict[str, str]:
    out = ssh.run(f"cd {directory} && find . -type f -exec sha256sum -z {{}} +", auth="key").stdout
    found = {}
    for line in out.decode().split("\0"):
        if line:
            digest, name = line.split("  ", 1)
            found[name.removeprefix("./")] = digest
    return found


def scp(ssh: Ssh, *words: str | Path, timeout: float = 90) -> subprocess.CompletedProcess[bytes]:
    argv = ["scp", *ssh.options("key"), "-P", str(ssh.port), *map(str, words)]
    return subprocess.run(argv, env=ssh.env, capture_output=True, timeout=timeout, stdin=subprocess.DEVNULL)


def at(ssh: Ssh, path: str) -> str:
    return f"{ssh.user}@{ssh.host}:{path}"


MODES = [pytest.param((), id="sftp-mode"), pytest.param(("-O",), id="scp-mode")]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.pods
def test_scp_of_a_tree_there_and_back(session: Session, tree: Path, tmp_path: Path, mode: tuple[str, ...]) -> None:
    ssh = session.ssh
    ssh.out("rm -rf ~/tree")
    # The legacy protocol has no way to say a line break in a name.
    (tree / "new\nline.txt").unlink()
    done = scp(ssh, *mode, "-rp", tree, at(ssh, ""))
    assert done.returncode == 0, told(done)
    assert remote_sums(ssh, "~/tree") == sums(tree)
    assert ssh.out("~/tree/script.sh", auth="key") == "ran"
    done = scp(ssh, *mode, "-rp", at(ssh, "tree"), tmp_path / "back")
    assert done.returncode == 0, told(done)
    assert sums(tmp_path / "back") == sums(tree)
    assert (tmp_path / "back/script.sh").stat().st_mode & 0o111
    ssh.out("rm -rf ~/tree")


@pytest.mark.parametrize("mode", MODES)
def test_scp_of_an_empty_file_and_of_a_missing_one(session: Session, tmp_path: Path, mode: tuple[str, ...]) -> None:
    ssh = session.ssh
    (tmp_path / "none").write_bytes(b"")
    assert scp(ssh, *mode, tmp_path / "none", at(ssh, "empty")).returncode == 0
    assert ssh.out("stat -c %s ~/empty; rm ~/empty") == "0"
    missing = scp(ssh, *mode, at(ssh, "no-such-file"), tmp_path)
    assert missing.returncode == 1 and b"o such file" in missing.stderr, told(missing)
    nowhere = scp(ssh, *mode, tmp_path / "none", at(ssh, "/usr/bin/none"))
    assert nowhere.returncode == 1 and nowhere.stderr, told(nowhere)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("mode", MODES)
def test_scp_of_300_mb_there_and_back(server: Server, ssh_key: Path, tmp_path: Path, mode: tuple[str, ...]) -> None:
    session = server.create_session("large", ssh_key=ssh_key)
    ssh = session.ssh
    big = tmp_path / "big"
    with big.open("wb") as file:
        for _ in range(300):
            file.write(os.urandom(1_000_000))
    digest = hashlib.sha256(big.read_bytes()).hexdigest()
    done = scp(ssh, *mode, big, at(ssh, "big"), timeout=100)
    assert done.returncode == 0, told(done)
    assert ssh.out("sha256sum < ~/big", auth="key").split()[0] == digest
    done = scp(ssh, *mode, at(ssh, "big"), tmp_path / "back", timeout=100)
    assert done.returncode == 0, told(done)
    assert hashlib.sha256((tmp_path / "back").read_bytes()).hexdigest() == digest
    session.terminate()


@pytest.mark.pods
def test_sftp_in_batch(session: Session, tree: Path, tmp_path: Path) -> None:
    ssh = session.ssh
    ssh.out("rm -rf ~/s")
    batch = tmp_path / "batch"
    lines = ["mkdir s", "cd s", f"put -p {tree}/script.sh", f'put "{tree}/{NAMES[2]}"', "rename script.sh renamed", "chmod 600 renamed"]
    lines += ["ln -s renamed link", "ls -la", f"get -p renamed {tmp_path}/renamed", "df", "mkdir gone", "rmdir gone", "pwd", "-rm not-there"]
    batch.write_text("\n".join(lines) + "\n")
    argv = ["sftp", *ssh.options("key"), "-P", str(ssh.port), "-b", str(batch), f"{ssh.user}@{ssh.host}"]
    done = subprocess.run(argv, env=ssh.env, capture_output=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, told(done)
    assert (tmp_path / "renamed").read_text() == "#!/bin/sh\necho ran\n"
    assert ssh.out("stat -c %a ~/s/renamed; readlink ~/s/link", auth="key") == "600\nrenamed"
    assert remote_sums(ssh, "~/s")[NAMES[2]] == sums(tree)[NAMES[2]]
    home = ssh.out("echo $HOME; rm -rf ~/s", auth="key")
    assert f"{home}/s".encode() in done.stdout, told(done)
    batch.write_text("get no-such-file\n")
    done = subprocess.run(argv, env=ssh.env, capture_output=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 1 and b"not found" in done.stderr, told(done)


def test_sftp_resumes_a_broken_upload(session: Session, tmp_path: Path) -> None:
    ssh = session.ssh
    data = os.urandom(2_000_000)
    (tmp_path / "whole").write_bytes(data)
    ssh.run("cat > ~/whole", input=data[:700_000], auth="key")
    batch = tmp_path / "batch"
    batch.write_text(f"reput {tmp_path}/whole whole\n")
    argv = ["sftp", *ssh.options("key"), "-P", str(ssh.port), "-b", str(batch), f"{ssh.user}@{ssh.host}"]
    done = subprocess.run(argv, env=ssh.env, capture_output=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, told(done)
    assert ssh.out("sha256sum < ~/whole; rm ~/whole", auth="key").split()[0] == hashlib.sha256(data).hexdigest()


@pytest.mark.pods
def test_rsync_there_again_and_back(session: Session, tree: Path, tmp_path: Path) -> None:
    need("rsync")
    ssh = session.ssh
    ssh.out("rm -rf ~/r")

    def rsync(*words: str | Path) -> subprocess.CompletedProcess[bytes]:
        argv = ["rsync", "-az", "--stats", "--timeout=60", "-e", ssh.command_line("key"), *map(str, words)]
        return subprocess.run(argv, env=ssh.env, capture_output=True, timeout=90, stdin=subprocess.DEVNULL)

    done = rsync(f"{tree}/", at(ssh, "r/"))
    assert done.returncode == 0, told(done)
    assert remote_sums(ssh, "~/r") == sums(tree)
    (tree / "plain.txt").write_bytes(b"changed")
    (tree / "two words.txt").unlink()
    done = rsync("--delete", "--checksum", f"{tree}/", at(ssh, "r/"))
    assert done.returncode == 0 and b"Number of regular files transferred: 1" in done.stdout, told(done)
    assert remote_sums(ssh, "~/r") == sums(tree)
    done = rsync(at(ssh, "r/"), f"{tmp_path}/back/")
    assert done.returncode == 0, told(done)
    assert sums(tmp_path / "back") == sums(tree)
    failed = rsync(at(ssh, "not-there/"), f"{tmp_path}/x/")
    assert failed.returncode == 23, f"rsync of a missing directory is a partial transfer (23): {told(failed)}"
    ssh.out("rm -rf ~/r")


@pytest.mark.pods
def test_tar_through_ssh_through_tar(session: Session, tree: Path, tmp_path: Path) -> None:
    ssh = session.ssh
    ssh.out("rm -rf ~/t && mkdir ~/t")
    line = shlex.join(ssh.argv(auth="key"))
    there = f"tar -C {shlex.quote(str(tree))} -cf - . | {line} 'tar -C ~/t -xf -'"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", there], env=ssh.env, capture_output=True, timeout=60)
    assert done.returncode == 0, told(done)
    assert remote_sums(ssh, "~/t") == sums(tree)
    (tmp_path / "back").mkdir()
    back = f"{line} 'tar -C ~/t -cf - .' </dev/null | tar -C {shlex.quote(str(tmp_path / 'back'))} -xf -"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", back], env=ssh.env, capture_output=True, timeout=60)
    assert done.returncode == 0, told(done)
    assert sums(tmp_path / "back") == sums(tree)
    ssh.out("rm -rf ~/t")


@pytest.mark.pods
def test_a_full_disk_is_an_error_and_not_a_silent_truncation(fresh: Session) -> None:
    """The home has a limit; what does not fit fails loudly. In a sandbox room comes back; a pod is evicted by its node."""
    done = fresh.ssh.run("head -c 40000000000 /dev/zero > ~/full; echo status $?; rm -f ~/full", timeout=110)
    if fresh.server.namespace:
        assert (done.returncode, done.stdout) == (255, b"") and done.stderr, f"40 GB fitted into the pod: {told(done)}"
        fresh.wait_state("failed", within=20)
        assert fresh.reason() == "environment_lost"
        return
    assert b"status 0" not in done.stdout and b"status" in done.stdout, f"40 GB fitted into the home: {told(done)}"
    assert fresh.ssh.out("echo room > ~/room && cat ~/room && rm ~/room") == "room"


@pytest.mark.parametrize("auth", ["password", "key"])
@pytest.mark.pods
def test_input_sent_before_the_environment_is_ready_is_kept(server: Server, ssh_key: Path, auth: str) -> None:
    session = server.create_session("slow-start", ssh_key=ssh_key, ready=False)
    data = os.urandom(2_000_000)
    assert session.get()["lifecycle_state"] in ("created", "initializing")
    done = session.ssh.run("sha256sum; echo err >&2; exit 21", input=data, timeout=60, auth=auth)
    assert done.returncode == 21 and done.stdout.split()[0].decode() == hashlib.sha256(data).hexdigest(), told(done)
    assert done.stderr == b"err\n", f"a command without a terminal was shown more than its own stderr: {told(done)}"
    session.terminate()


def test_scp_waits_for_an_environment_that_is_not_ready(server: Server, ssh_key: Path, tmp_path: Path) -> None:
    session = server.create_session("slow-start", ssh_key=ssh_key, ready=False)
    (tmp_path / "early").write_bytes(b"early bird" * 1000)
    done = scp(session.ssh, tmp_path / "early", at(session.ssh, "early"))
    assert done.returncode == 0, told(done)
    assert session.ssh.out("wc -c < ~/early") == "10000"
    session.terminate()


def test_the_suites_own_copies_are_whole(tree: Path, tmp_path: Path) -> None:
    """The comparison above is worth something: a changed byte shows."""
    shutil.copytree(tree, tmp_path / "copy")
    assert sums(tmp_path / "copy") == sums(tree)
    (tmp_path / "copy/empty").write_bytes(b"x")
    assert sums(tmp_path / "copy") != sums(tree)
