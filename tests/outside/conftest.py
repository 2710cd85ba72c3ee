"""Fixtures of the suite. What they hand out is in `harness.py`."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import Cluster
from harness import BINARY, Demo, Postgres, Server, Session, instances, need, processes_that_mention
from waiting import wait_until


PODS = os.environ.get("CARREL_TEST_ENVIRONMENT", "local") == "kubernetes"
"""Are the environments of the shared fixtures pods?"""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On pods, leaves out what is about the sandboxes of this machine."""
    if PODS:
        local = [item for item in items if item.get_closest_marker("local")]
        config.hook.pytest_deselected(items=local)
        items[:] = [item for item in items if item not in set(local)]


@pytest.fixture(scope="session")
def work() -> Iterator[Path]:
    """The directory below which everything of a run lives. At the end no process and no mount may refer to it."""
    assert BINARY.is_file(), f"there is no {BINARY}: run `make build`, or set CARREL_BIN"
    need("ssh")
    if not PODS:
        need("bwrap")
    path = Path(tempfile.mkdtemp(prefix="carrel-outside-", dir="/tmp"))
    path.chmod(0o755)
    yield path
    left: dict[int, str] = {}

    def nothing_left() -> bool:
        left.clear()
        left.update(processes_that_mention(path, *instances))
        return not left

    try:
        with contextlib.suppress(AssertionError):
            wait_until("no process is left", nothing_left, within=10)
        mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(path) in line]
        assert not left, f"the run left processes: {left}"
        assert not mounts, f"the run left mounts: {mounts}"
    finally:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not os.environ.get("CARREL_KEEP"):
            shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The Kubernetes that is up; without one its tests are skipped. At the end no namespace of the run may be there."""
    lacking = Cluster.lacking()
    if lacking and (PODS or os.environ.get("CARREL_TEST_REQUIRE_ALL")):
        pytest.fail(lacking)
    if lacking:
        pytest.skip(lacking)
    cluster = Cluster()
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def place(request: pytest.FixtureRequest) -> Cluster | None:
    """Where the environments of the run's servers are: a cluster, or None for sandboxes of this machine."""
    return request.getfixturevalue("cluster") if PODS else None


@pytest.fixture(scope="session")
def demo(work: Path) -> Iterator[Demo]:
    """A running `carrel demo --json`: one exam, one ready session."""
    demo = Demo(work)
    yield demo
    demo.close()


@pytest.fixture(scope="session")
def ssh_key(work: Path) -> Path:
    """An Ed25519 key pair; the public half has `.pub` added."""
    path = work / "id_ed25519"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "tests", "-f", str(path)], check=True, timeout=30)
    return path


@pytest.fixture(scope="session")
def server(work: Path, place: Cluster | None) -> Iterator[Server]:
    """A server on SQLite that the whole run shares: it is never stopped or flooded by a test."""
    with Server(work, options=["--ssh-penalty-exempt", "127.0.0.1/32"], cluster=place) as server:
        yield server


@pytest.fixture(scope="session")
def postgres(work: Path) -> Iterator[Postgres]:
    """A running PostgreSQL with no database of ours yet."""
    postgres = Postgres(work)
    yield postgres
    postgres.close()


@pytest.fixture
def new_server(work: Path, place: Cluster | None) -> Iterator[Callable[..., Server]]:
    """Starts servers of the test's own, which it may kill; takes what [`Server`] takes."""
    with contextlib.ExitStack() as stack:

        def make(**kwargs: Any) -> Server:
            server = Server(work, **({"cluster": place} | kwargs))
            stack.callback(server.close)
            return server.start()

        yield make


@pytest.fixture(scope="session")
def session(server: Server, ssh_key: Path) -> Session:
    """A ready session of the shared server, for tests that leave it as they found it."""
    return server.create_session("plain", ssh_key=ssh_key)


@pytest.fixture
def fresh(server: Server, ssh_key: Path) -> Iterator[Session]:
    """A ready session of the test's own on the shared server."""
    session = server.create_session("plain", ssh_key=ssh_key)
    yield session
    session.terminate()
