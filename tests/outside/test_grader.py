"""A grading run: 86 checks, one `ssh` each, one after the other."""

from __future__ import annotations

import time

import pytest

from harness import Server, Session, told

pytestmark = pytest.mark.pods

CHECKS = 86


@pytest.mark.timeout(120)
@pytest.mark.parametrize("auth", ["password", "key"])
def test_86_checks_report_86_right_statuses(session: Session, auth: str) -> None:
    wrong = {}
    started = time.monotonic()
    for number in range(CHECKS):
        status = 0 if number % 3 == 0 else number
        done = session.ssh.run(f"test -d /usr && echo check-{number}; exit {status}", auth=auth)
        if (done.returncode, done.stdout, done.stderr) != (status, b"check-%d\n" % number, b""):
            wrong[number] = told(done)
    seconds = time.monotonic() - started
    print(f"{CHECKS} checks by {auth}: {seconds:.1f} s, {1000 * seconds / CHECKS:.0f} ms each")
    assert not wrong, f"{len(wrong)} of {CHECKS} checks were wrong: {dict(list(wrong.items())[:3])}"
    assert seconds < 40, f"{CHECKS} checks took {seconds:.1f} s"


@pytest.mark.timeout(120)
def test_a_grading_run_while_the_candidate_works(server: Server, session: Session) -> None:
    with session.ssh.terminal("cat") as terminal:
        for number in range(20):
            assert session.ssh.run(f"exit {number}").returncode == number
            terminal.send(f"line{number}\r")
            terminal.expect(f"line{number}\r?\n.*?line{number}\r?\n")
