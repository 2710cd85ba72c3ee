"""A session's life as callers see it, and that it converges whatever dies in between."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import httpx
import pytest

from cluster import Cluster
from harness import Postgres, Server, Session, told
from waiting import wait_until


def at(text: str) -> float:
    """Seconds since 1970; fails unless it is RFC 3339 in UTC with milliseconds."""
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", text), f"not RFC 3339 in UTC with milliseconds: {text}"
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def one_line(text: bytes) -> str:
    lines = [line for line in text.decode(errors="replace").replace("\r", "").splitlines() if line.strip()]
    assert len(lines) == 1, f"not one line that says why: {lines}"
    return lines[0]


# --- states ------------------------------------------------------------------------------------------------------


@pytest.mark.pods
def test_a_session_goes_from_created_to_ready_to_running_to_terminated(server: Server) -> None:
    started = time.monotonic()
    session = server.create_session(ready=False)
    assert time.monotonic() - started < 3, "creation waits for the environment"
    assert session.data["status"] == "created" and session.data["exam_id"] == "plain"
    ready = session.wait_state("ready")
    print(f"ready after {time.monotonic() - started:.2f} s")
    assert time.monotonic() - started < 10
    assert ready["environment"]["ready"] is True and uuid.UUID(ready["environment"]["environment_id"])
    assert ready["started_at"] is None and ready["lifecycle_reason"] is None
    assert abs(at(ready["ready_at"]) - time.time()) < 15
    assert session.ssh.out("echo in") == "in"
    running = session.wait_state("running", within=5)
    assert abs(at(running["started_at"]) - time.time()) < 15
    assert abs(at(running["ends_at"]) - at(running["started_at"]) - 7200) < 1, "the clock does not run from the first connection"
    assert 7150 < running["remaining_seconds"] <= 7200
    first = session.get()["remaining_seconds"]
    time.sleep(1.2)
    assert session.get()["remaining_seconds"] < first, "the remaining time stands still"
    ended = session.terminate()
    assert ended.status_code == 200 and ended.json()["data"]["session_id"] == session.id
    assert abs(at(ended.json()["data"]["terminated_at"]) - time.time()) < 15
    assert session.get()["lifecycle_state"] == "terminated" and session.reason() == "ended_by_staff"
    wait_until("its environment is gone", lambda: not session.environment(), within=60)


def test_status_shows_numbered_progress(server: Server) -> None:
    session = server.create_session("slow-start", ready=False)
    seen = set()

    def probe() -> bool:
        status = session.status()
        progress = status["progress"]
        assert 1 <= progress["current_step"] <= progress["total_steps"] and progress["step_description"], status
        seen.add((status["display_state"], progress["current_step"]))
        at(status["updated_at"])
        return bool(status["environment_ready"])

    wait_until("the environment is ready", probe, within=30, every=0.1)
    states = {state for state, _ in seen}
    assert states <= {"creating", "initializing", "ready"} and "initializing" in states and "ready" in states, seen
    assert len({step for _, step in seen}) >= 2, f"progress does not move: {seen}"
    session.terminate()


@pytest.mark.pods
def test_a_terminal_shows_numbered_progress_until_the_shell_is_there(server: Server) -> None:
    session = server.create_session("slow-start", ready=False)
    with session.ssh.terminal() as terminal:
        terminal.expect(r"\d\s*(/|of)\s*\d", within=10)
        assert terminal.ask("echo in the shell", within=30) == "in the shell"
        terminal.send("exit 4\r")
        assert terminal.wait() == 4
    session.terminate()


@pytest.mark.pods
def test_a_failed_setup_is_one_line_and_255_and_staff_see_its_last_lines(server: Server) -> None:
    session = server.create_session("broken", ready=False)
    done = session.ssh.run("echo in", timeout=40)
    assert done.returncode == 255 and done.stdout == b"", told(done)
    assert one_line(done.stderr)
    failed = session.wait_state("failed", within=10)
    assert session.reason() == "setup_failed"
    assert "the-setup-said-this" in str(failed), f"staff do not see what the setup said: {failed}"
    status = session.status()
    assert status["display_state"] == "error" and status["error_reason"], status
    assert b"the-setup-said-this" not in done.stderr, "the candidate is shown the setup's output"


def test_a_terminal_is_told_of_a_failed_start(server: Server) -> None:
    session = server.create_session("broken", ready=False)
    with session.ssh.terminal() as terminal:
        assert terminal.wait(40) == 255
        assert terminal.seen.strip(), "no word on the terminal"


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_a_start_that_takes_longer_than_60_s_fails(new_server: Callable[..., Server]) -> None:
    server = new_server(exams={"endless": "duration_minutes: 60\nenvironment:\n  setup: |\n    sleep 1000\n"})
    session = server.create_session("endless", ready=False)
    started = time.monotonic()
    session.wait_state("failed", within=80)
    assert 50 < time.monotonic() - started < 75 and session.reason() == "start_timeout", session.get()
    wait_until("its environment is gone", lambda: not server.environments(), within=60)


@pytest.mark.timeout(60)
def test_a_session_that_nobody_uses_ends(server: Server) -> None:
    session = server.create_session("unused")
    session.wait_state("terminated", within=30)
    assert session.reason() == "never_started"
    wait_until("its environment is gone", lambda: not session.environment(), within=60)


@pytest.mark.slow
@pytest.mark.timeout(150)
@pytest.mark.pods
def test_the_deadline_is_enforced_on_the_open_connection(server: Server) -> None:
    session = server.create_session("minute")
    with session.ssh.terminal() as terminal, session.ssh.master() as master:
        terminal.ask("true")
        begun = at(session.wait_state("running")["started_at"])
        command = master.popen("while :; do echo tick; sleep 0.2; done")
        try:
            status = terminal.wait(90)
            ended = time.time()
            assert 58 < ended - begun < 65, f"the terminal was closed {ended - begun:.1f} s after the start of a one-minute exam"
            assert status == 255 and re.search(rb"time|over|expired", terminal.seen[-600:], re.I), terminal.seen[-600:]
            out, err = command.communicate(timeout=10)
            assert command.returncode == 255 and one_line(err), err
        finally:
            command.kill()
            command.wait(10)
    assert session.wait_state("terminated", within=5)["remaining_seconds"] in (0, None)
    assert session.reason() == "time_expired"
    assert session.ssh.run("echo in").returncode == 255
    wait_until("its environment is gone", lambda: not session.environment(), within=60)


# --- ends --------------------------------------------------------------------------------------------------------


@pytest.mark.pods
def test_submit_ends_the_session_and_tells_the_terminal(server: Server) -> None:
    session = server.create_session()
    with session.ssh.terminal() as terminal:
        terminal.ask("true")
        started = time.monotonic()
        server.ok("POST", f"/sessions/{session.id}/submit")
        assert terminal.wait(30) == 255
        assert time.monotonic() - started < 6, "bytes pass for more than 5 s after the end"
        assert re.search(rb"handed in|submitted", terminal.seen[-600:], re.I), terminal.seen[-600:]
    assert session.get()["lifecycle_state"] == "terminated" and session.reason() == "submitted"


@pytest.mark.pods
def test_terminate_ends_commands_with_one_line_and_255(server: Server) -> None:
    session = server.create_session()
    command = session.ssh.popen("echo up; cat")
    try:
        assert command.stdout and command.stdout.readline() == b"up\n"
        assert session.terminate().status_code == 200
        out, err = command.communicate(timeout=15)
        assert command.returncode == 255 and one_line(err), (command.returncode, err)
    finally:
        command.kill()
        command.wait(10)
    again = session.terminate()
    assert again.status_code == 400 and again.json()["error"]["code"] == "SESSION_ALREADY_TERMINATED", again.text
    assert server.http("POST", f"/sessions/{session.id}/submit").status_code == 400


def test_a_session_cancelled_before_it_is_ready_leaves_nothing(server: Server) -> None:
    session = server.create_session("slower-start", ready=False)
    session.wait_state("initializing", within=10)
    session.terminate()
    assert session.get()["lifecycle_state"] == "failed" and session.reason() == "cancelled"
    wait_until("its environment is gone", lambda: not session.environment(), within=60)


def test_a_user_has_one_session_at_a_time(server: Server) -> None:
    user = str(uuid.uuid4())
    first = server.create_session(user_id=user)
    second = server.http("POST", "/sessions", {"exam_id": "plain", "user_id": user})
    assert second.status_code == 409 and second.json()["error"]["code"] == "ACTIVE_SESSION_EXISTS", second.text
    first.terminate()
    third = server.create_session(user_id=user)
    assert third.id != first.id
    third.terminate()


def test_of_twenty_creations_at_once_exactly_one_succeeds(server: Server) -> None:
    user = str(uuid.uuid4())

    def create(_: int) -> httpx.Response:
        return httpx.post(
            f"{server.url}/v1/sessions",
            json={"exam_id": "plain", "user_id": user},
            headers={"Authorization": f"Bearer {server.key}"},
            timeout=30,
            trust_env=False,
        )

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(create, range(20)))
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses == [201] + [409] * 19, statuses
    made = next(answer.json()["data"]["session_id"] for answer in answers if answer.status_code == 201)
    server.http("POST", f"/sessions/{made}/terminate")


# --- faults ------------------------------------------------------------------------------------------------------


@pytest.mark.pods
def test_a_lost_environment_is_255_with_one_line_and_the_session_fails(server: Server) -> None:
    session = server.create_session()
    with session.ssh.terminal() as terminal:
        terminal.ask("true")
        command = session.ssh.popen("echo up; cat")
        try:
            assert command.stdout and command.stdout.readline() == b"up\n"
            session.kill_environment()
            killed = time.monotonic()
            out, err = command.communicate(timeout=20)
            assert command.returncode == 255, f"a lost environment is reported as {command.returncode}"
            assert one_line(err)
            session.wait_state("failed", within=10)
            assert time.monotonic() - killed < 10
            assert session.reason() in ("environment_crashed", "environment_lost")
            assert terminal.wait(15) == 255
        finally:
            command.kill()
            command.wait(10)


@pytest.mark.pods
def test_a_candidate_cannot_end_the_environment_by_killing_everything(fresh: Session) -> None:
    fresh.ssh.run("kill -9 -1", timeout=20)
    fresh.ssh.run("kill -9 1; kill -TERM 1; kill -HUP 1; kill -STOP 1", timeout=20)
    assert fresh.ssh.out("echo alive") == "alive"


@pytest.mark.pods
def test_a_fork_bomb_and_a_memory_hog_harm_only_themselves(server: Server, fresh: Session, session: Session) -> None:
    hog = fresh.ssh.run("perl -e '$x = \"x\" x (1<<40)' 2>&1; echo after", timeout=60)
    assert b"after" in hog.stdout, told(hog)
    bomb = fresh.ssh.popen("f() { f | f & }; f 2>/dev/null; sleep 20")
    try:
        time.sleep(3)
        started = time.monotonic()
        assert session.ssh.out("echo alive", auth="key") == "alive"
        assert time.monotonic() - started < 10
    finally:
        bomb.kill()
        bomb.communicate()
    assert fresh.terminate().status_code == 200
    wait_until("the bomb's environment is gone", lambda: not fresh.environment(), within=30)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("state", ["created", "initializing", "ready", "running", "ending"])
def test_a_server_killed_in_any_state_converges_after_its_restart(new_server: Callable[..., Server], state: str) -> None:
    server = new_server()
    exam = "slow-start" if state in ("created", "initializing") else "plain"
    session = server.create_session(exam, ready=False)
    if state != "created":
        session.wait_state({"initializing": "initializing"}.get(state, "ready"))
    if state in ("running", "ending"):
        assert session.ssh.out("echo in; echo kept > ~/kept") == "in"
        session.wait_state("running")
    if state == "ending":
        session.terminate()
    server.sigkill()
    server.start()
    if state == "ending":
        assert session.get()["lifecycle_state"] == "terminated"
        wait_until("no environment is left", lambda: not server.environments(), within=30)
        return
    now = session.wait_state(*(["running"] if state == "running" else ["ready"]), within=40)
    if state == "running":
        assert session.ssh.out("cat ~/kept") == "kept", "the environment was replaced behind the candidate's back"
    assert session.ssh.out("echo in") == "in", now
    session.terminate()
    wait_until("no environment is left", lambda: not server.environments(), within=30)


@pytest.mark.timeout(90)
@pytest.mark.parametrize("how", ["SIGTERM", pytest.param("SIGKILL", marks=pytest.mark.pods)])
def test_a_shell_is_still_there_after_a_restart_of_the_server(new_server: Callable[..., Server], how: str) -> None:
    server = new_server()
    session = server.create_session()
    with session.ssh.terminal() as terminal:
        shell = terminal.ask("echo $$")
        terminal.send("V=from-before; clear; echo on-scr''een\r")
        terminal.expect("on-screen")
        if how == "SIGTERM":
            assert server.stop() == 0
        else:
            server.sigkill()
        assert terminal.wait(20) == 255
    server.start()
    with session.ssh.terminal() as terminal:
        terminal.expect("on-screen")
        assert terminal.ask("echo $$ $V") == f"{shell} from-before"
        terminal.send("exit\r")
        terminal.wait()


@pytest.mark.timeout(90)
def test_environments_without_a_row_are_swept(new_server: Callable[..., Server]) -> None:
    server = new_server()
    session = server.create_session()
    server.sigkill()
    assert server.environments(), "the environment did not outlive its server"
    for path in server.data_dir.glob("carrel.db*"):
        path.unlink()
    server.key = ""
    server.sessions.clear()
    server.start()
    wait_until(f"the environment of {session.id} is swept", lambda: not server.environments(), within=60, every=0.5)


@pytest.mark.timeout(90)
def test_a_row_without_its_environment_fails(new_server: Callable[..., Server]) -> None:
    server = new_server()
    session = server.create_session()
    assert session.ssh.out("echo in") == "in"
    server.sigkill()
    server.kill_environments()
    wait_until("the environment is dead", lambda: not server.environments(), within=10)
    server.start()
    session.wait_state("failed", within=10)
    assert session.reason() in ("environment_lost", "environment_crashed")


@pytest.mark.timeout(90)
def test_a_deadline_that_passed_while_the_server_was_away_counts(new_server: Callable[..., Server]) -> None:
    server = new_server()
    session = server.create_session("unused")
    server.sigkill()
    time.sleep(11)
    server.start()
    session.wait_state("terminated", within=10)
    assert session.reason() == "never_started"


@pytest.mark.timeout(90)
def test_a_deleted_environment_directory_does_not_confuse_the_server(new_server: Callable[..., Server]) -> None:
    """Files in the data directory that are not ours, or half of ours, are no reason to fall over."""
    server = new_server()
    server.create_session()
    (server.data_dir / "stray-file").write_text("?")
    server.restart()
    other = server.create_session()
    assert other.ssh.out("echo in") == "in"


# --- PostgreSQL --------------------------------------------------------------------------------------------------


@pytest.fixture
def on_postgres(work: Path, postgres: Postgres, place: Cluster | None) -> Iterator[Server]:
    with Server(work, database_url=postgres.database(), cluster=place) as server:
        yield server


@pytest.mark.postgres
@pytest.mark.timeout(120)
@pytest.mark.pods
def test_a_session_on_postgresql_lives_and_survives_a_restart(on_postgres: Server) -> None:
    session = on_postgres.create_session()
    assert session.ssh.out("echo in; echo kept > ~/kept") == "in"
    session.wait_state("running")
    on_postgres.sigkill()
    on_postgres.start()
    assert session.ssh.out("cat ~/kept") == "kept"
    assert on_postgres.http("POST", "/sessions", {"exam_id": "plain", "user_id": session.user_id}).status_code == 409
    on_postgres.ok("POST", f"/sessions/{session.id}/submit")
    assert session.reason() == "submitted"
    wait_until("no environment is left", lambda: not on_postgres.environments(), within=30)


@pytest.mark.postgres
@pytest.mark.timeout(150)
def test_a_database_that_is_away_is_503_within_10_s_and_heals(on_postgres: Server, postgres: Postgres) -> None:
    server = on_postgres
    session = server.create_session()
    with session.ssh.terminal() as terminal:
        terminal.ask("true")
        session.wait_state("running")
        postgres.stop()
        try:
            for method, path, body in (
                ("GET", f"/sessions/{session.id}", None),
                ("POST", "/sessions", {"exam_id": "plain", "user_id": str(uuid.uuid4())}),
                ("POST", f"/sessions/{session.id}/terminate", None),
                ("GET", f"/sessions/{uuid.uuid4()}/status", None),
            ):
                started = time.monotonic()
                answer = server.http(method, path, body)
                assert time.monotonic() - started < 10.5, f"{method} {path} took {time.monotonic() - started:.1f} s"
                assert answer.status_code == 503 and answer.json()["error"]["code"] == "BACKEND_UNAVAILABLE", answer.text
            assert server.client.get("/readyz").status_code == 503
            assert server.client.get("/healthz").status_code == 200, "liveness fails because of the database: a restart would not help"
            assert terminal.ask("echo still here") == "still here", "an open shell suffers from the database"
            started = time.monotonic()
            login = session.ssh.run("echo in", timeout=45)
            assert login.returncode == 255 and time.monotonic() - started < 30, told(login)
        finally:
            postgres.start()
        wait_until("it is ready again", lambda: server.client.get("/readyz").status_code == 200, within=20)
        assert session.get()["lifecycle_state"] == "running", "the session suffered from the database"
        assert session.ssh.out("echo in") == "in"
        terminal.send("exit\r")
        terminal.wait()
