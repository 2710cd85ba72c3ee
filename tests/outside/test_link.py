"""The connection between the server and an environment is lost while both live: shells stay, commands report it.

The connection of a local environment is a unix socket of the server's: the test takes a copy of its descriptor and shuts it down, as
if the stream had been cut on the way. While the agent's socket has another name, no new connection can be opened.
"""

from __future__ import annotations

import ctypes
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from harness import Server, Session, Terminal
from test_browser import browser, connected  # noqa: F401 the fixture
from test_websocket import ATTACHED, EXIT, binary_client, json_client
from waiting import wait_until

pytestmark = pytest.mark.local("cuts the unix socket of a sandbox")

CUT = rb"carrel: the connection to your environment was lost; reconnecting"
PIDFD_GETFD = 438
"""Of x86_64 and aarch64 alike."""


def links(server: Server) -> Iterator[socket.socket]:
    """Copies of the server's ends of its connections to environments."""
    libc = ctypes.CDLL(None, use_errno=True)
    process = os.pidfd_open(server.pid)
    try:
        for entry in Path(f"/proc/{server.pid}/fd").iterdir():
            with suppress(OSError):
                if not os.readlink(entry).startswith("socket:"):
                    continue
                copy = libc.syscall(PIDFD_GETFD, process, int(entry.name), 0)
                if copy < 0:
                    raise OSError(ctypes.get_errno(), "pidfd_getfd")
                with socket.socket(fileno=copy) as end:
                    if end.family == socket.AF_UNIX and str(end.getpeername()).endswith("agent.sock"):
                        yield end
    finally:
        os.close(process)


def cut(server: Server) -> None:
    """Ends them all."""
    count = 0
    for link in links(server):
        link.shutdown(socket.SHUT_RDWR)
        count += 1
    assert count, "the server has no connection to an environment"


@contextmanager
def unreachable(session: Session) -> Iterator[None]:
    """Cuts the connection, and no other can be opened meanwhile."""
    directory = session.server.data_dir / "environments" / session.get()["environment"]["environment_id"]
    agent, hidden = directory / "agent.sock", directory / "hidden.sock"
    agent.rename(hidden)
    try:
        cut(session.server)
        yield
    finally:
        # The environment may have been destroyed meanwhile.
        with suppress(FileNotFoundError):
            hidden.rename(agent)


@pytest.fixture
def alone(new_server: Callable[..., Server], ssh_key: Path) -> Session:
    """A session alone on its server."""
    return new_server().create_session("plain", ssh_key=ssh_key)


def comes_back(terminal: Terminal, text: str) -> None:
    """Waits until the client is told of the loss and then sees the screen again, with `text` on it."""
    terminal.expect(CUT)
    terminal.expect(text)


def test_a_shell_stays_when_its_connection_is_cut_and_is_drawn_again(alone: Session) -> None:
    with alone.ssh.terminal() as terminal:
        shell = terminal.ask("kept=in-$((40+2)); echo $$")
        for turn in range(3):
            terminal.send(f"clear; echo on-the-scr''een-{turn}\r")
            terminal.expect(f"on-the-screen-{turn}\r?\n")
            cut(alone.server)
            comes_back(terminal, f"on-the-screen-{turn}")
            assert terminal.ask("echo $$ $kept") == f"{shell} in-42", "it is another shell"
        terminal.send("exit 3\r")
        assert terminal.wait() == 3


def test_a_full_screen_program_goes_on(alone: Session) -> None:
    alone.ssh.out("seq 1 500 | sed 's/^/line-/' > ~/lines.txt")
    with alone.ssh.terminal() as terminal:
        terminal.ask("true")
        terminal.send("vi -u NONE ~/lines.txt\r")
        terminal.expect("line-5")
        terminal.send("300G\x0c")
        terminal.expect("line-300")
        cut(alone.server)
        comes_back(terminal, "line-300")
        terminal.send("ochanged-here\x1b:wq\r")
        terminal.expect(r"written.*\$ ")
        assert terminal.ask("grep -n changed-here ~/lines.txt") == "301:changed-here"


def test_what_happens_meanwhile(alone: Session) -> None:
    with alone.ssh.terminal(rows=24, cols=80) as terminal:
        terminal.ask("for i in 1 2 3; do sleep 1; echo step-$i; done > ~/steps & disown; echo")
        with unreachable(alone):
            terminal.expect(CUT)
            terminal.send("touch ~/typed-meanwhile\r")
            terminal.resize(33, 101)
            # Longer than the first tries.
            time.sleep(4)
            assert terminal.process.poll() is None
        wait_until("the shell answers again", lambda: "33 101" in again(terminal, "stty size"), within=20, every=0.5)
        assert terminal.ask("cat ~/steps | tail -1") == "step-3"
        assert terminal.ask("ls ~/typed-meanwhile 2>&1 | tail -1").endswith("No such file or directory"), "keys arrived that nobody saw"
        terminal.resize(30, 90)
        wait_until("a later resize arrives", lambda: terminal.ask("stty size") == "30 90", within=10, every=0.3)


def again(terminal: Terminal, command: str) -> str:
    """What a command says, or nothing: keys are dropped until the terminal is there again."""
    try:
        return terminal.ask(command, within=2)
    except AssertionError:
        return ""


def test_the_end_of_a_shell_meanwhile_is_reported(alone: Session) -> None:
    with alone.ssh.terminal() as terminal:
        terminal.ask("true")
        terminal.send("trap '' HUP; sleep 2; exit 7\r")
        time.sleep(0.5)
        with unreachable(alone):
            terminal.expect(CUT)
            time.sleep(3)
        assert terminal.wait(20) == 7


def test_the_end_of_the_session_meanwhile_is_told_as_always(alone: Session) -> None:
    with alone.ssh.terminal() as terminal:
        terminal.ask("true")
        with unreachable(alone):
            terminal.expect(CUT)
            assert alone.terminate().status_code == 200
            terminal.expect(rb"carrel: [^\r\n]+")
            assert terminal.wait(15) == 255


def test_a_session_that_ends_is_not_called_a_lost_connection(alone: Session) -> None:
    with alone.ssh.terminal() as terminal, binary_client(alone) as browser:
        terminal.ask("true")
        assert alone.terminate().status_code == 200
        assert terminal.wait(15) == 255
        assert b"lost" not in terminal.seen, terminal.seen[-500:]
        with suppress(Exception):
            while True:
                browser.read(time.monotonic() + 10)
        assert b"lost" not in browser.output, bytes(browser.output)


def test_commands_report_their_loss_and_the_same_connection_takes_new_ones(alone: Session) -> None:
    with alone.ssh.master() as master:
        running = [master.popen("echo up; exec sleep 300"), master.popen("echo up; cat; exit 0")]
        upload = master.popen(None, "-s", "sftp")
        with master.terminal("echo up; exec sleep 300") as at_a_terminal:
            at_a_terminal.expect("up")
            for process in running:
                assert process.stdout and process.stdout.readline() == b"up\n"
            with unreachable(alone):
                for process in running:
                    out, err = process.communicate(timeout=20)
                    lines = err.decode().strip().splitlines()
                    assert process.returncode == 255 and len(lines) == 1 and "lost" in lines[0], (process.returncode, out, err)
                upload.communicate(timeout=20)
                assert upload.returncode == 255
                at_a_terminal.expect(rb"carrel: [^\r\n]*lost", 20)
                assert at_a_terminal.wait(20) == 255
                waiting = master.popen("echo waited; exit 4")
                time.sleep(3)
                assert waiting.poll() is None, f"it has ended with {waiting.returncode}"
            out, err = waiting.communicate(timeout=20)
            assert (out, waiting.returncode) == (b"waited\n", 4), err
        for _ in range(3):
            cut(alone.server)
            assert master.out("echo in") == "in"


def test_a_shell_that_is_asked_for_meanwhile_waits(alone: Session) -> None:
    alone.ssh.out("true")
    with unreachable(alone):
        terminal = alone.ssh.terminal()
        terminal.expect("carrel: your environment cannot be reached at this moment; waiting")
    with terminal:
        assert terminal.ask("echo in", within=20) == "in"


def test_both_clients_of_one_terminal_come_back(alone: Session) -> None:
    with alone.ssh.terminal() as terminal, binary_client(alone) as binary, json_client(alone) as plain:
        shell = terminal.ask("kept=in-$((40+2)); echo $$")
        terminal.send("clear; echo on-the-scr''een\r")
        for expect in (terminal.expect, binary.expect):
            expect(b"on-the-screen\r?\n")
        plain.expect(r"on-the-screen\r?\n")
        attached = len(binary.json[ATTACHED])
        with unreachable(alone):
            terminal.expect(CUT)
            binary.expect(CUT)
            plain.expect(CUT.decode())
            binary.type(b"touch ~/typed-meanwhile\r")
            time.sleep(1)
        for expect in (terminal.expect, binary.expect):
            expect(b"on-the-screen")
        plain.expect("on-the-screen")
        assert binary.json[ATTACHED][attached:] == [{"resumed": True, "watching": False}]
        binary.type(b"echo pid-$$-$kept\r")
        for expect in (terminal.expect, binary.expect):
            expect(f"pid-{shell}-in-42".encode())
        plain.expect(f"pid-{shell}-in-42")
        assert binary.under_way == 0, "input was not reported as taken"
        plain.type("ls ~/typed-meanwhile; exit 5\r")
        plain.expect("No such file")
        assert binary.until(EXIT) == {"code": 5}
        assert terminal.wait() == 5


def test_the_page_draws_its_terminal_again(alone: Session, browser: Browser) -> None:
    with connected(browser, alone) as page:
        page.enter("kept=in-$((40+2)); clear; seq 1 3 | sed s/^/row-/")
        page.shows("row-3")
        with unreachable(alone):
            page.shows("the connection to your environment was lost; reconnecting")
            page.enter("touch ~/typed-meanwhile")
            page.wait("connected")
        page.shows(r"\Arow-1\nrow-2\nrow-3\n[^\n]*\$\Z")
        page.enter("echo $kept; ls ~/typed-meanwhile")
        page.shows("^in-42\n.*No such file")


def test_a_browser_with_much_output_under_way_comes_back(alone: Session) -> None:
    with binary_client(alone) as browser:
        browser.acknowledge = False
        browser.type(b"seq 1 1000000\r")
        wait_for = time.monotonic() + 20
        while browser.received < 512 << 10:
            browser.read(wait_for)
        cut(alone.server)
        browser.ack(browser.received)
        browser.acknowledge = True
        browser.expect(CUT, within=30)
        browser.expect(rb"1000000\r\n", within=60)
        browser.type(b"echo al''ive\r")
        browser.expect(b"alive")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_shell_whose_environment_stays_away_ends_with_255(new_server: Callable[..., Server]) -> None:
    session = new_server().create_session("window")
    with session.ssh.terminal() as terminal:
        terminal.ask("true")
        with unreachable(session):
            terminal.expect(CUT)
            told_at = time.monotonic()
            terminal.expect(rb"carrel: [^\r\n]*connect again", 130)
            assert terminal.wait(15) == 255
            assert time.monotonic() - told_at > 60, "it was given up too early"
