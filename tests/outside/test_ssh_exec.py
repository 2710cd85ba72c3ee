"""OpenSSH's `ssh`: commands, statuses, signals, terminals and variables."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import Master, Server, Session, free_port, told
from waiting import wait_until

pytestmark = pytest.mark.pods


@pytest.fixture(scope="module")
def shared(session: Session) -> Iterator[Master]:
    with session.ssh.master(auth="key") as master:
        yield master


def marked_processes(master: Master, mark: str) -> str:
    """Processes inside the environment with a word in their command line, but for the one that looks."""
    hidden = mark[:3] + "''" + mark[3:]
    return master.out(
        f"for p in /proc/[0-9]*; do [ $p = /proc/$$ ] && continue; tr '\\0' ' ' <$p/cmdline 2>/dev/null | grep -q {hidden} && echo $p; done; true"
    )


def a_mark() -> str:
    return "m" + uuid.uuid4().hex[:10]


# --- exit statuses -----------------------------------------------------------------------------------------------


def test_every_exit_status_from_0_to_255_arrives(shared: Master) -> None:
    wrong = {}
    for status in range(256):
        done = shared.run(f"exit {status}")
        if done.returncode != status:
            wrong[status] = told(done)
    assert not wrong, f"{len(wrong)} exit statuses arrived wrongly: {dict(list(wrong.items())[:5])}"


@pytest.mark.parametrize("status", [0, 1, 127, 254, 255])
def test_an_exit_status_arrives_over_a_connection_of_its_own(session: Session, status: int) -> None:
    done = session.ssh.run(f"exit {status}")
    assert done.returncode == status, told(done)


@pytest.mark.parametrize(("name", "status"), [("INT", 130), ("KILL", 137), ("TERM", 143), ("HUP", 129), ("SEGV", 139)])
@pytest.mark.parametrize("terminal", [False, True], ids=["plain", "pty"])
def test_a_command_killed_by_a_signal_exits_with_128_and_its_number(
    shared: Master, name: str, status: int, terminal: bool
) -> None:
    done = shared.run(f"kill -{name} $$; sleep 20", *(["-tt"] if terminal else []))
    assert done.returncode == status, told(done)


def test_an_unknown_command_is_127_and_says_so(shared: Master) -> None:
    done = shared.run("no-such-command-here")
    assert done.returncode == 127 and b"no-such-command-here" in done.stderr, told(done)


def test_the_exit_status_follows_the_last_byte(shared: Master) -> None:
    for _ in range(20):
        done = shared.run("head -c 300000 /dev/zero; printf END; exit 7")
        assert done.returncode == 7, told(done)
        assert len(done.stdout) == 300_003 and done.stdout.endswith(b"END"), f"{len(done.stdout)} bytes arrived, not 300003"


@pytest.mark.parametrize("command", ["exit 7", "kill -USR1 $$; sleep 20"])
def test_the_exit_status_of_a_terminal_is_never_lost(shared: Master, command: str) -> None:
    expected = 7 if command.startswith("exit") else 138
    wrong = [told(done) for done in (shared.run(command, "-tt") for _ in range(100)) if done.returncode != expected]
    assert not wrong, f"{len(wrong)} of 100 statuses were lost: {wrong[:2]}"


# --- input and output --------------------------------------------------------------------------------------------


def test_stdout_and_stderr_stay_apart(session: Session) -> None:
    done = session.ssh.run("echo out; echo err >&2; echo out2; exit 3")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"out\nout2\n", b"err\n"), told(done)


def test_bulk_on_stdout_and_stderr_at_once_is_whole(shared: Master) -> None:
    done = shared.run("head -c 3000000 /dev/zero | tr '\\0' o & head -c 3000000 /dev/zero | tr '\\0' e >&2; wait")
    assert (done.returncode, len(done.stdout), len(done.stderr)) == (0, 3_000_000, 3_000_000), told(done)[:300]
    assert set(done.stdout) == {ord("o")} and set(done.stderr) == {ord("e")}


def test_stdin_eof_lets_the_command_finish_and_report(shared: Master) -> None:
    done = shared.run("cat; echo after; exit 9", input=b"some input\n")
    assert (done.returncode, done.stdout) == (9, b"some input\nafter\n"), told(done)


def test_output_after_stdin_eof_and_a_pause_arrives(shared: Master) -> None:
    done = shared.run("cat >/dev/null; sleep 1; echo late", input=b"x" * 100_000)
    assert (done.returncode, done.stdout) == (0, b"late\n"), told(done)


def test_a_command_that_closes_its_output_still_reports_its_status(shared: Master) -> None:
    done = shared.run("exec >&- 2>&-; sleep 1; exit 5")
    assert done.returncode == 5, told(done)


def test_input_that_a_command_does_not_read_does_no_harm(shared: Master) -> None:
    done = shared.run("echo done; exit 4", input=b"x" * 3_000_000)
    assert (done.returncode, done.stdout) == (4, b"done\n"), told(done)


def test_stdin_from_dev_null(shared: Master) -> None:
    assert shared.out("cat; echo read", "-n", input=None) == "read"


# --- the command's text ------------------------------------------------------------------------------------------


def test_the_shell_sees_the_whole_command(session: Session) -> None:
    direct = int(session.ssh.out("/bin/ls /usr/bin | wc -l"))
    assert direct > 50, f"`/bin/ls /usr/bin | wc -l` answered {direct}: was the pipe dropped?"


def test_quotes_variables_and_lines_reach_the_shell_unchanged(shared: Master) -> None:
    command = "a='two  words'\nprintf '%s|' \"$a\" $a\nif true; then\n  echo yes\nfi # comment"
    assert shared.out(command) == "two  words|two|words|yes"


def test_a_command_of_one_blank_is_answered_and_harms_nobody(session: Session) -> None:
    with session.ssh.master() as other:
        done = session.ssh.run(" ")
        assert done.returncode == 0, told(done)
        assert other.out("echo alive") == "alive"
    assert session.ssh.out("echo alive") == "alive"


def test_a_command_that_is_no_utf_8_is_run_as_it_is(shared: Master) -> None:
    done = shared.run(b"printf %s '\xff\xfe\xe4' | od -An -tx1")
    assert done.returncode == 0 and done.stdout.split() == [b"ff", b"fe", b"e4"], told(done)


def test_a_command_of_100_kb_runs(shared: Master) -> None:
    text = "x" * 100_000
    done = shared.run(f"a={text}; echo ${{#a}}")
    assert (done.returncode, done.stdout) == (0, b"100000\n"), told(done)


def test_a_command_of_200_kb_gets_a_clear_answer_and_the_connection_lives(session: Session) -> None:
    # Linux takes at most 128 KiB in one argument, and `sh -c` needs the command in one. OpenSSH's own client sends
    # such a command in one message, for which 256 KiB are allowed.
    script = f"a={'x' * 200_000}; echo ${{#a}}"
    argument = f"@{script}"
    with session.ssh.master() as master:
        ssh = session.ssh
        # execve on this side has the same limit, so the command goes by the client's configuration file.
        config = ssh.work / "long-command.conf"
        words = ssh.argv("-S", str(master.control), "-o", "ControlMaster=no", "-o", "ProxyCommand=false")
        config.write_text(f"RemoteCommand {argument[1:]}\n")
        at = words.index("none")
        words[at] = str(config)
        done = subprocess.run(words, env=ssh.env, capture_output=True, input=b"", timeout=30)
        assert master.out("echo alive") == "alive", "the connection did not survive"
    assert done.returncode not in (None, -signal.SIGKILL)
    if done.returncode == 0:
        assert done.stdout == b"200000\n", told(done)
    else:
        said = done.stderr.decode(errors="replace")
        assert re.search(r"too long|too large|longer than|at most|limit", said, re.I), f"no clear answer: {told(done)}"


# --- variables ---------------------------------------------------------------------------------------------------


def test_a_command_has_its_variables_and_runs_in_its_home(session: Session) -> None:
    lines = session.ssh.out("pwd; env").splitlines()
    variables = dict(line.split("=", 1) for line in lines[1:] if "=" in line)
    for name in ("HOME", "USER", "LOGNAME", "SHELL", "PATH", "SSH_CLIENT", "SSH_CONNECTION"):
        assert variables.get(name), f"{name} is not set: {variables}"
    assert lines[0] == variables["HOME"], f"runs in {lines[0]}, not in {variables['HOME']}"
    assert variables["USER"] == variables["LOGNAME"]
    assert variables["SHELL"].startswith("/") and "/usr/bin" in variables["PATH"]
    client = variables["SSH_CONNECTION"].split()
    assert len(client) == 4 and client[0] == "127.0.0.1" and client[3] == str(session.ssh.port), client
    assert variables["SSH_CLIENT"].split() == [client[0], client[1], client[3]]
    assert "SSH_TTY" not in variables, "a command without a terminal has SSH_TTY"
    secrets = [name for name in variables if name.startswith("CARREL")]
    assert not secrets, f"the server's own variables are inside: {secrets}"


def test_the_user_inside_has_a_name_and_owns_the_home(shared: Master) -> None:
    name, user, home, writable = shared.out("id -un; echo $USER; echo $HOME; touch ~/.probe && rm ~/.probe && echo yes").splitlines()
    assert name == user and writable == "yes", (name, user, home, writable)
    assert shared.out("getent passwd $(id -u) | cut -d: -f6") == home


def test_a_command_with_a_terminal_has_ssh_tty_and_term(shared: Master) -> None:
    done = shared.run("echo $SSH_TTY; echo $TERM; tty", "-tt")
    tty, term, named = done.stdout.decode().replace("\r", "").splitlines()[:3]
    assert tty.startswith("/dev/") and tty == named, told(done)
    assert term == "xterm-256color", told(done)


def test_allowed_variables_are_taken_and_others_refused(session: Session) -> None:
    env = {"LANG": "de_DE.UTF-8", "LC_TIME": "C.UTF-8", "EVIL": "x", "LD_PRELOAD_X": "x", "BASH_ENV": "/nowhere"}
    options = ("-o", "SendEnv=LANG LC_* EVIL LD_PRELOAD_X BASH_ENV")
    done = session.ssh.run('echo "$LANG|$LC_TIME|$EVIL|$LD_PRELOAD_X|$BASH_ENV"', *options, env=env)
    assert (done.returncode, done.stdout.strip()) == (0, b"de_DE.UTF-8|C.UTF-8|||"), told(done)


def test_setenv_of_the_client_follows_the_same_list(session: Session) -> None:
    done = session.ssh.run('echo "$LC_ALL|$PATH"', "-o", "SetEnv=LC_ALL=C PATH=/nowhere")
    lang, path = done.stdout.decode().strip().split("|")
    assert lang == "C" and "/nowhere" not in path, told(done)


# --- terminals ---------------------------------------------------------------------------------------------------


def test_a_terminal_has_the_clients_size_and_follows_it(session: Session) -> None:
    with session.ssh.terminal("bash --norc", rows=31, cols=97) as terminal:
        assert terminal.ask("stty size") == "31 97"
        terminal.send("trap 'echo re''sized $(stty size)' WINCH; echo re''ady\r")
        terminal.expect("ready\r?\n")
        terminal.resize(44, 122)
        # Bash runs a trap when the foreground command ends, or at the next key.
        terminal.send("\r")
        terminal.expect("resized 44 122")
        assert terminal.ask("stty size") == "44 122"
        terminal.send("exit 5\r")
        assert terminal.wait() == 5


def test_a_foreground_program_gets_sigwinch(session: Session) -> None:
    program = "perl -e '$|=1; $SIG{WINCH}=sub{print \"winch\\n\"}; print \"up\\n\"; sleep 1 while 1'"
    with session.ssh.terminal(program) as terminal:
        terminal.expect("up")
        terminal.resize(50, 100)
        terminal.expect("winch")


def test_a_terminal_is_asked_for_with_t_only_where_there_is_one(session: Session) -> None:
    done = session.ssh.run("tty", "-t")
    assert done.returncode == 1 and b"not a tty" in done.stdout, told(done)
    done = session.ssh.run("tty", "-tt")
    assert done.returncode == 0 and b"/dev/pts/" in done.stdout, told(done)


def test_stderr_joins_stdout_on_a_terminal(session: Session) -> None:
    done = session.ssh.run("echo out; echo err >&2", "-tt")
    assert done.stdout.replace(b"\r", b"") == b"out\nerr\n" and done.stderr == b"", told(done)


def test_ctrl_c_interrupts_the_command_on_a_terminal(session: Session) -> None:
    with session.ssh.terminal("sh -c 'echo st\"\"arted; exec sleep 60'") as terminal:
        terminal.expect("started")
        terminal.send("\x03")
        assert terminal.wait() == 130


def test_ctrl_c_in_a_shell_leaves_the_shell(session: Session) -> None:
    with session.ssh.terminal() as terminal:
        terminal.ask("true")
        # The child says so itself: before that the interrupt could hit the shell.
        terminal.send("sh -c 'echo st\"\"arted; exec sleep 60'\r")
        terminal.expect("started\r?\n")
        terminal.send("\x03")
        terminal.send("echo sta''tus $?\r")
        terminal.expect("status 130\r?\n")
        terminal.send("exit\r")
        terminal.wait()


def test_a_shell_is_a_login_shell_in_the_home(fresh: Session) -> None:
    fresh.ssh.out("echo 'export FROM_PROFILE=yes' >> ~/.profile; rm -f ~/.bash_profile ~/.bash_login")
    with fresh.ssh.terminal() as terminal:
        assert terminal.ask("echo $0").startswith("-")
        assert terminal.ask("shopt -q login_shell && echo login") == "login"
        assert terminal.ask("echo $FROM_PROFILE") == "yes"
        assert terminal.ask('[ "$PWD" = "$HOME" ] && echo home') == "home"
        assert terminal.ask("test -t 0 && test -t 1 && test -t 2 && echo tty") == "tty"
        terminal.send("exit 17\r")
        assert terminal.wait() == 17


def test_a_shell_without_a_terminal_reads_commands(session: Session) -> None:
    done = session.ssh.run(None, "-T", input=b"echo $0; echo two\nexit 6\n")
    assert done.returncode == 6 and done.stdout.splitlines()[-1] == b"two", told(done)


def test_job_control_works(session: Session) -> None:
    with session.ssh.terminal("bash --norc -i") as terminal:
        terminal.send("sh -c 'echo st\"\"arted; exec sleep 300'\r")
        terminal.expect("started\r?\n")
        terminal.send("\x1a")
        terminal.expect("Stopped")
        assert "exec sleep 300" in terminal.ask("jobs")
        assert terminal.ask("kill %1; wait %1 2>/dev/null; echo gone") .endswith("gone")
        assert b"no job control" not in terminal.seen
        terminal.send("exit\r")
        terminal.wait()


def test_the_escape_tilde_dot_ends_the_client(session: Session) -> None:
    mark = a_mark()
    with session.ssh.master() as master:
        with session.ssh.terminal(f"echo st''arted; exec perl -e 'sleep 300' {mark}", "-e", "~") as terminal:
            terminal.expect("started")
            wait_until("the command is seen", lambda: marked_processes(master, mark), within=5)
            terminal.send("\r~.")
            assert terminal.wait() == 255
        wait_until("the command ended with its client", lambda: not marked_processes(master, mark), within=15)


def test_a_background_process_does_not_hold_a_terminal_open(session: Session) -> None:
    started = time.monotonic()
    done = session.ssh.run("sleep 20 & echo back; exit 3", "-tt", timeout=15)
    assert done.returncode == 3 and b"back" in done.stdout, told(done)
    assert time.monotonic() - started < 8, "the channel waited for the background process"


def test_a_detached_background_process_does_not_hold_a_command_open(session: Session) -> None:
    done = session.ssh.run("(setsid sleep 20 </dev/null >/dev/null 2>&1 &) ; exit 3", timeout=15)
    assert done.returncode == 3, told(done)


@pytest.mark.parametrize("size", [(1, 1), (300, 500)])
def test_the_smallest_and_the_largest_terminal_work(session: Session, size: tuple[int, int]) -> None:
    with session.ssh.terminal("stty size; echo do''ne", rows=size[0], cols=size[1]) as terminal:
        terminal.expect(f"{size[0]} {size[1]}")
        assert terminal.wait() == 0


def test_an_impossible_terminal_size_harms_nobody(session: Session) -> None:
    with session.ssh.terminal("stty size; echo a''live", rows=65535, cols=65535) as terminal:
        terminal.wait()
    with session.ssh.terminal("echo a''live", rows=0, cols=0) as terminal:
        terminal.expect("alive")
    assert session.ssh.out("echo alive") == "alive"


def test_the_editor_draws_on_the_terminal(session: Session) -> None:
    with session.ssh.terminal("vi -u NONE ~/drawn.txt") as terminal:
        terminal.expect(r"drawn\.txt")
        terminal.send("ihello from vi\x1b:wq\r")
        assert terminal.wait() == 0
    assert session.ssh.out("cat ~/drawn.txt; rm ~/drawn.txt") == "hello from vi"


# --- dead clients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terminal", [False, True], ids=["plain", "pty"])
@pytest.mark.parametrize("stubborn", [False, True], ids=["", "ignores-hup"])
def test_a_dead_clients_command_is_ended(session: Session, terminal: bool, stubborn: bool) -> None:
    mark = a_mark()
    trap = "trap '' HUP TERM PIPE; " if stubborn else ""
    command = f"bash -c '{trap}echo started; while :; do sleep 1; done' {mark}"
    with session.ssh.master() as master:
        client = session.ssh.popen(command, *(["-tt"] if terminal else []))
        try:
            assert client.stdout and client.stdout.readline().strip() == b"started"
            assert marked_processes(master, mark), "the command is not seen while it runs: this test is broken"
            client.kill()
            client.wait(10)
            wait_until("the dead client's command is gone", lambda: not marked_processes(master, mark), within=15, every=0.3)
        finally:
            client.kill()
            client.communicate()


def test_a_dead_clients_whole_pipeline_is_ended(session: Session) -> None:
    mark = a_mark()
    with session.ssh.master() as master:
        client = session.ssh.popen(f"echo started; sh -c 'cat; :' {mark} | sh -c 'sleep 300; :' {mark} | sh -c 'cat >/dev/null; :' {mark}")
        assert client.stdout and client.stdout.readline().strip() == b"started"
        wait_until("the pipeline is up", lambda: len(marked_processes(master, mark).split()) >= 3, within=5)
        client.kill()
        client.communicate()
        wait_until("the pipeline is gone", lambda: not marked_processes(master, mark), within=15, every=0.3)


def test_a_closed_channel_ends_its_command_and_not_its_neighbours(session: Session) -> None:
    mark, other = a_mark(), a_mark()
    with session.ssh.master() as master:
        stays = master.popen(f"bash -c 'echo started; read line; echo got $line' {other}")
        goes = master.popen(f"bash -c 'echo started; sleep 300; :' {mark}")
        assert stays.stdout and goes.stdout
        assert stays.stdout.readline() == goes.stdout.readline() == b"started\n"
        goes.kill()
        goes.communicate()
        wait_until("the closed channel's command is gone", lambda: not marked_processes(master, mark), within=15, every=0.3)
        out, err = stays.communicate(b"hello\n", timeout=10)
        assert out == b"got hello\n" and stays.returncode == 0, (out, err)


# --- a kept shell ------------------------------------------------------------------------------------------------


def test_an_interactive_shell_is_kept_for_its_client_and_redrawn(fresh: Session) -> None:
    with fresh.ssh.terminal(rows=30, cols=90) as first:
        shell = first.ask("echo $$")
        first.send("cd /usr; VALUE=kept-$((40+2)); clear; echo on-the-scr''een\r")
        first.expect("on-the-screen\r?\n")
        first.process.kill()
        first.process.wait(10)
    with fresh.ssh.terminal(rows=30, cols=90) as second:
        second.expect("on-the-screen")
        assert second.ask("echo $$") == shell, "a new shell was started instead of the kept one"
        assert second.ask("echo $VALUE; pwd") == "kept-42\n/usr"
        second.send("exit 3\r")
        assert second.wait() == 3
    with fresh.ssh.terminal(rows=30, cols=90) as third:
        assert third.ask("echo $$") != shell
        third.send("exit\r")
        third.wait()


def test_a_full_screen_program_is_redrawn_for_a_client_that_comes_back(fresh: Session) -> None:
    fresh.ssh.out("seq 1 500 | sed 's/^/line-/' > ~/lines.txt")
    with fresh.ssh.terminal(rows=24, cols=80) as first:
        first.ask("true")
        first.send("vi -u NONE ~/lines.txt\r")
        first.expect("line-5")
        # Control-L: the editor draws whole lines, not only what changed.
        first.send("300G\x0c")
        first.expect("line-300")
        first.process.kill()
        first.process.wait(10)
    with fresh.ssh.terminal(rows=24, cols=80) as second:
        second.expect("line-300")
        assert b"line-450" not in second.seen
        second.send("ochanged-here\x1b:wq\r")
        # What is typed before the editor has ended is the editor's.
        second.expect(r"written.*\$ ")
        assert second.ask("grep -n changed-here ~/lines.txt") == "301:changed-here"
        second.send("exit\r")
        second.wait()


def test_a_kept_shell_goes_on_working_meanwhile(fresh: Session) -> None:
    with fresh.ssh.terminal() as first:
        first.ask("true")
        first.send("for i in 1 2 3 4; do sleep 0.5; echo step-$i; done; echo all-do''ne > ~/finished\r")
        first.expect("step-1")
        first.process.kill()
        first.process.wait(10)
    wait_until("the kept shell finished its loop", lambda: fresh.ssh.run("cat ~/finished", auth="key").stdout == b"all-done\n", within=10, every=0.5)
    with fresh.ssh.terminal() as second:
        second.expect("step-4")


def test_a_shell_is_ended_after_the_reconnect_window(server: Server, ssh_key: Path) -> None:
    mark = a_mark()
    session = server.create_session("window", ssh_key=ssh_key)
    with session.ssh.master() as master:
        with session.ssh.terminal() as first:
            first.ask("true")
            first.send(f"bash -c 'echo st''arted; sleep 300; :' {mark}\r")
            first.expect("started")
            first.process.kill()
            first.process.wait(10)
        assert marked_processes(master, mark), "the shell was not kept at all"
        wait_until("the shell ended after 3 s + 5 s", lambda: not marked_processes(master, mark), within=20, every=0.3)
    session.terminate()


# --- agent, subsystems, forwarding -------------------------------------------------------------------------------


def test_the_last_of_five_keys_in_an_agent_is_found(session: Session, ssh_key: Path) -> None:
    home = Path(tempfile.mkdtemp(prefix="agent-", dir="/tmp"))
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(home / "a")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until("ssh-agent is up", (home / "a").exists)
        env = {"SSH_AUTH_SOCK": str(home / "a"), "PATH": os.environ["PATH"]}
        for number in range(5):
            key = home / f"k{number}"
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True, timeout=20)
            subprocess.run(["ssh-add", "-q", str(key)], env=env, check=True, timeout=20)
        subprocess.run(["ssh-add", "-q", str(ssh_key)], env=env, check=True, timeout=20)
        listed = subprocess.run(["ssh-add", "-l"], env=env, capture_output=True, text=True, timeout=20).stdout
        assert len(listed.splitlines()) == 6
        overrides = ("-o", "IdentitiesOnly=no", "-o", f"IdentityAgent={home / 'a'}", "-o", "PreferredAuthentications=publickey")
        started = time.monotonic()
        done = session.ssh.run("echo in", *overrides)
        assert done.stdout == b"in\n", told(done)
        assert time.monotonic() - started < 4, "five wrong keys cost too much time"
    finally:
        agent.terminate()
        agent.wait(10)
        shutil.rmtree(home)


def test_the_sftp_subsystem_is_there(session: Session) -> None:
    # A version packet: length 5, type 1 (SSH_FXP_INIT), version 3.
    # Its stdin stays open until the answer is there: sftp-server gives up unsent answers at its end.
    client = session.ssh.popen("sftp", "-s")
    try:
        assert client.stdin and client.stdout
        client.stdin.write(b"\0\0\0\x05\x01\0\0\0\x03")
        client.stdin.flush()
        assert client.stdout.read(5)[4:5] == b"\x02", "no SSH_FXP_VERSION"
        client.stdin.close()
        assert client.wait(20) == 0
    finally:
        client.kill()
        client.wait()


def test_an_unknown_subsystem_is_refused(session: Session) -> None:
    done = session.ssh.run("no-such-subsystem", "-s")
    assert done.returncode == 255 and b"subsystem" in done.stderr.lower(), told(done)


def test_x11_and_agent_forwarding_are_refused(session: Session, tmp_path: Path) -> None:
    env = {"DISPLAY": "127.0.0.1:97"}
    done = session.ssh.run("echo \"[$DISPLAY]\"", "-X", "-o", "LogLevel=INFO", "-o", "ForwardX11Trusted=yes", env=env)
    assert done.stdout.strip() == b"[]" and done.returncode == 0, told(done)
    assert b"X11 forwarding request failed" in done.stderr, told(done)
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(tmp_path / "a")], stdout=subprocess.DEVNULL)
    try:
        wait_until("ssh-agent is up", (tmp_path / "a").exists)
        done = session.ssh.run(
            "echo \"[$SSH_AUTH_SOCK]\"", "-A", "-o", f"IdentityAgent={tmp_path / 'a'}", env={"SSH_AUTH_SOCK": str(tmp_path / "a")}
        )
        assert done.stdout.strip() == b"[]" and done.returncode == 0, told(done)
    finally:
        agent.terminate()
        agent.wait(10)


def test_tcp_forwarding_is_refused_in_both_directions(session: Session) -> None:
    done = session.ssh.run(None, "-W", "127.0.0.1:22", timeout=20)
    assert done.returncode == 255 and re.search(b"prohibited|refused|forward", done.stderr, re.I), told(done)
    done = session.ssh.run("echo no", "-R", "0:127.0.0.1:9", "-o", "ExitOnForwardFailure=yes")
    assert done.returncode == 255 and b"forwarding" in done.stderr, told(done)
    assert session.ssh.out("echo alive") == "alive"


def test_forwarding_to_the_own_loopback_works_where_the_exam_allows_it(server: Server, ssh_key: Path) -> None:
    session = server.create_session("forward", ssh_key=ssh_key)
    with session.ssh.master() as master:
        web = master.popen(
            "perl -MIO::Socket::INET -e '$s=IO::Socket::INET->new(LocalAddr=>\"127.0.0.1:8000\",Listen=>5,ReuseAddr=>1) or die;"
            "$|=1;print\"up\\n\"; while($c=$s->accept){$l=<$c>; print $c \"answer to $l\"; close $c}'"
        )
        assert web.stdout and web.stdout.readline() == b"up\n"
        done = session.ssh.run(None, "-W", "127.0.0.1:8000", input=b"hello\n", timeout=20)
        assert done.stdout == b"answer to hello\n", told(done)
        done = session.ssh.run(None, "-W", "localhost:8000", input=b"again\n", timeout=20)
        assert done.stdout == b"answer to again\n", told(done)
        # As an editor does: one connection with shells, commands and many forwarded connections.
        port = free_port()
        with session.ssh.master("-L", f"127.0.0.1:{port}:127.0.0.1:8000") as editor:
            for number in range(30):
                with socket.create_connection(("127.0.0.1", port), timeout=10) as one:
                    one.sendall(b"line %d\n" % number)
                    answer = b""
                    while data := one.recv(4096):
                        answer += data
                assert answer == b"answer to line %d\n" % number
                if number % 10 == 0:
                    assert editor.out(f"echo {number}") == str(number)
        nobody = session.ssh.run(None, "-W", "127.0.0.1:8001", "-o", "LogLevel=INFO", timeout=20)
        assert nobody.returncode == 255 and b"connect failed" in nobody.stderr, f"nobody listens there: {told(nobody)}"
        for target in (f"127.0.0.1:{server.http_port}", "192.0.2.1:80", "[2001:db8::1]:80", "example.org:80", "0.0.0.0:8000"):
            away = session.ssh.run(None, "-W", target, timeout=20)
            assert away.returncode == 255 and away.stdout == b"", f"{target}: {told(away)}"
        web.kill()
        web.communicate()
    session.terminate()


def test_the_servers_own_ports_are_not_reached_from_inside(session: Session, server: Server) -> None:
    done = session.ssh.run(f"exec 3<>/dev/tcp/127.0.0.1/{server.http_port}")
    assert done.returncode != 0, "the server's API is reached from inside the environment"
    assert session.ssh.out("ls /sys/class/net 2>/dev/null || cut -d: -f1 -s /proc/net/dev | tail -n +1").split()[-1:] in (["lo"], [])


def test_the_host_is_not_seen_from_inside(session: Session, server: Server) -> None:
    data = str(server.data_dir)
    assert session.ssh.run(f"ls {data}").returncode != 0, "the data directory is seen from inside"
    assert session.ssh.run("cat /etc/shadow").stdout == b"", "/etc/shadow is read from inside"
    processes = session.ssh.out("for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline 2>/dev/null; echo; done")
    assert "carrel serve" not in processes and str(os.getpid()) not in session.ssh.out("ls /proc").split()
    assert session.ssh.run("touch /usr/x /etc/x /x").returncode != 0, "the system is writable from inside"
    assert session.ssh.run("test \"$(id -u)\" = 0").returncode == 1, "the candidate is root inside"


def test_two_sessions_share_nothing(server: Server, session: Session, fresh: Session) -> None:
    session.ssh.out("echo mine > /tmp/shared-probe; echo mine > ~/shared-probe")
    assert fresh.ssh.run("cat /tmp/shared-probe ~/shared-probe").stdout == b""
    session.ssh.out("rm /tmp/shared-probe ~/shared-probe")


def test_two_connections_of_one_session_share_the_environment(fresh: Session) -> None:
    fresh.ssh.out("echo here > /tmp/probe")
    assert fresh.ssh.out("cat /tmp/probe", auth="key") == "here"


def test_a_keepalive_of_the_client_is_answered(session: Session) -> None:
    done = session.ssh.run("sleep 5; echo still", "-o", "ServerAliveInterval=1", "-o", "ServerAliveCountMax=1")
    assert done.stdout == b"still\n", told(done)


def test_an_idle_frozen_client_is_noticed_only_by_itself(session: Session) -> None:
    """A client that stops (SIGSTOP) does not slow anybody else."""
    frozen = session.ssh.popen("while :; do echo line; done")
    try:
        time.sleep(1)
        frozen.send_signal(signal.SIGSTOP)
        for _ in range(5):
            started = time.monotonic()
            assert session.ssh.out("echo alive", auth="key") == "alive"
            assert time.monotonic() - started < 3
    finally:
        with contextlib.suppress(ProcessLookupError):
            frozen.send_signal(signal.SIGCONT)
        frozen.kill()
        frozen.communicate()
