"""One interleaved comparison of sshd with a forced `kubectl exec` and carrel, into equal pods. See README.md."""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import itertools
import json
import os
import pathlib
import random
import ssl
import statistics
import subprocess
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import websockets
import yaml

from measures import (
    CARREL, MIB, ROOT, Aim, Comparison, Cut, Server, carrel_server, check_ms, connections_a_second, down, ended, free_port, print_table,
    sshd, up, wait_for_port, workplace,
)

PEER, OURS = "sshd+kubectl", "carrel"
TRUE, ECHO = "ssh true, ms", "echo p50, ms"
DOWN, UP = "down, {}, MB/s", "up, {}, MB/s"
KINDS = ("zeros", "listing", "noise")
COLD, WARM, MANY = "create to ready, cold, s", "create to ready, warm, s", "create to ready, {} at once, s"
AIMS = {
    TRUE: Aim(0.16),
    ECHO: Aim(0.9),
    **{DOWN.format(kind): Aim(2.2, at_least=True) for kind in KINDS},
    **{UP.format(kind): Aim(2.1, at_least=True) for kind in KINDS},
    COLD: Aim(0.85),
    WARM: Aim(0.1, ratio=False),
    MANY.format(50): Aim(1.1),
}
PARTS = ("login", "echo", "bulk", "grader", "cold", "warm", "many")
MANAGED = "app.kubernetes.io/managed-by=carrel"
BARE = "carrel.test/bare=true"
EXAM = {
    "id": "bench",
    "title": "Benchmark",
    "duration_minutes": 120,
    "environment": {"memory": "128Mi", "storage": "64Mi", "processes": 256},
}
A_CHECK = 'test "$(id -un)" = candidate && cd ~ && echo graded > result && grep -qx graded result'


# --- the cluster's API -------------------------------------------------------------------------------------------


class Cluster:
    """The API server, with the rights of a kubeconfig that holds a client certificate, in one namespace."""

    def __init__(self, kubeconfig: pathlib.Path, namespace: str, work: pathlib.Path) -> None:
        config = yaml.safe_load(kubeconfig.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        self.server: str = cluster["server"]
        self.pods = f"/api/v1/namespaces/{namespace}/pods"
        decoded = {}
        for name, text in (("crt", user["client-certificate-data"]), ("key", user["client-key-data"])):
            decoded[name] = work / f"admin.{name}"
            decoded[name].write_bytes(base64.b64decode(text))
            decoded[name].chmod(0o600)
        self.tls = ssl.create_default_context(cadata=base64.b64decode(cluster["certificate-authority-data"]).decode())
        self.tls.load_cert_chain(decoded["crt"], decoded["key"])

    def client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=64, max_keepalive_connections=64)
        return httpx.AsyncClient(base_url=self.server, verify=self.tls, timeout=30, limits=limits, trust_env=False)


class Watch:
    """When the API showed each pod of a label first as running; follows the watch for as long as it is open."""

    def __init__(self, api: httpx.AsyncClient, pods: str, selector: str) -> None:
        self.api, self.pods, self.selector = api, pods, selector
        self.there: dict[str, dict[str, Any]] = {}
        self.running: dict[str, float] = {}
        self.changed = asyncio.Condition()
        self.opened = False
        self.failed: Exception | None = None

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Watch]:
        listed = (await self.api.get(self.pods, params={"labelSelector": self.selector})).raise_for_status().json()
        self.there = {pod["metadata"]["name"]: pod for pod in listed["items"]}
        reader = asyncio.create_task(self._follow(listed["metadata"]["resourceVersion"]))
        try:
            await self.until("a watch", lambda: self.opened)
            yield self
        finally:
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader

    async def _follow(self, version: str) -> None:
        try:
            # The API server ends a watch whose reader is slow: on a busy machine more than one in a run.
            while True:
                follow = {"watch": "1", "labelSelector": self.selector, "resourceVersion": version}
                async with self.api.stream("GET", self.pods, params=follow, timeout=None) as events:
                    events.raise_for_status()
                    async with self.changed:
                        self.opened = True
                        self.changed.notify_all()
                    version = await self._read(events, version)
        except (httpx.HTTPError, RuntimeError, ValueError) as error:
            async with self.changed:
                self.failed = error
                self.changed.notify_all()

    async def _read(self, events: httpx.Response, version: str) -> str:
        """Until the stream's end; the version that was seen last."""
        async for line in events.aiter_lines():
            now = time.perf_counter()
            event = json.loads(line)
            if event["type"] not in ("ADDED", "MODIFIED", "DELETED"):
                raise RuntimeError(f"the watch says {line[:300]}")
            pod = event["object"]
            name, version = pod["metadata"]["name"], pod["metadata"]["resourceVersion"]
            async with self.changed:
                if event["type"] == "DELETED":
                    self.there.pop(name, None)
                else:
                    self.there[name] = pod
                    if pod["status"].get("phase") == "Running":
                        self.running.setdefault(name, now)
                self.changed.notify_all()
        return version

    async def until(self, what: str, holds: Callable[[], bool], within: float = 120) -> None:
        """Returns when `holds` does."""
        try:
            async with asyncio.timeout(within), self.changed:
                await self.changed.wait_for(lambda: self.failed or holds())
        except TimeoutError:
            raise SystemExit(f"not within {within} s: {what}") from None
        if self.failed:
            raise SystemExit(f"the watch for {what} broke: {self.failed}")


def bare_pod(like: dict[str, Any], name: str) -> dict[str, Any]:
    """A pod with the session container of one of carrel's, its image, limits and security; without the agent."""
    session = next(one for one in like["spec"]["containers"] if one["name"] == "session")
    kept = ["image", "imagePullPolicy", "resources", "securityContext"]
    spec = ["activeDeadlineSeconds", "automountServiceAccountToken", "dnsConfig", "dnsPolicy", "enableServiceLinks", "hostname",
            "restartPolicy", "securityContext", "terminationGracePeriodSeconds", "tolerations"]
    container = {"name": "session", "command": ["sleep", "infinity"]} | {key: session[key] for key in kept if key in session}
    key, value = BARE.split("=")
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {key: value}},
        "spec": {"containers": [container]} | {key: like["spec"][key] for key in spec if key in like["spec"]},
    }


async def bare_pods(cluster: Cluster, like: dict[str, Any], count: int) -> float:
    """Creates so many at once; seconds until the API has shown all of them as running. They are gone when this returns."""
    names = [f"bare-{uuid.uuid4().hex[:12]}" for _ in range(count)]
    async with cluster.client() as api, Watch(api, cluster.pods, BARE).open() as watch:
        try:
            start = time.perf_counter()
            for answer in await asyncio.gather(*(api.post(cluster.pods, json=bare_pod(like, name)) for name in names)):
                answer.raise_for_status()
            await watch.until(f"{count} bare pods running", lambda: all(name in watch.running for name in names))
            return max(watch.running[name] for name in names) - start
        finally:
            await asyncio.gather(*(api.delete(f"{cluster.pods}/{name}") for name in names))
            await watch.until("bare pods gone", lambda: not watch.there.keys() & set(names))


# --- carrel ------------------------------------------------------------------------------------------------------


class Carrel:
    """`carrel serve` on the cluster, with the server's own rights only."""

    def __init__(self, work: pathlib.Path, namespace: str, kubeconfig: pathlib.Path, carrying: bool = False) -> None:
        """`carrying`: the session image has the agent in it."""
        self.work, self.namespace, self.kubeconfig = work, namespace, kubeconfig
        image = os.environ[f"CARREL_CLUSTER_{'CARRYING' if carrying else 'SESSION'}_IMAGE"]
        path = ["--kubernetes-agent-path", os.environ["CARREL_CLUSTER_AGENT_IN_IMAGE"]] if carrying else []
        self.images = ["--kubernetes-default-image", image, *path]
        self.port, self.ssh_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = work / "server.log"
        self.key = ""
        self.pid = 0

    @contextlib.contextmanager
    def serving(self) -> Iterator[Carrel]:
        variables = {name: value for name, value in os.environ.items() if not name.startswith("CARREL_") or name == "CARREL_LOG"}
        variables["CARREL_DATA_DIR"] = str(self.work / "data")
        exams = self.work / "exams"
        exams.mkdir()
        (exams / "bench.yaml").write_text(yaml.safe_dump(EXAM))
        made = subprocess.run([CARREL, "api-key", "create", "--name", "bench", "--scope", "platform", "--scope", "operator"],
                              env=variables, check=True, stdout=subprocess.PIPE)
        self.key = json.loads(made.stdout)["key"]
        server = subprocess.Popen(
            [CARREL, "serve", "--environment", "kubernetes", "--exams", exams,
             "--http-listen", f"127.0.0.1:{self.port}", "--ssh-listen", f"127.0.0.1:{self.ssh_port}",
             "--kubernetes-kubeconfig", self.kubeconfig, "--kubernetes-namespace", self.namespace,
             *self.images,
             # Fifty of them have room on a small node; bare pods reserve the same.
             "--kubernetes-cpu-request-percent", "1"],
            env=variables, stdin=subprocess.DEVNULL, stderr=self.log.open("w"))
        self.pid = server.pid
        with ended(server):
            wait_for_port(self.port)
            end = time.monotonic() + 30
            while not httpx.get(f"{self.url}/readyz", trust_env=False).is_success:
                if time.monotonic() > end:
                    raise SystemExit(f"carrel does not become ready: {self.log.read_text()[-2000:]}")
                time.sleep(0.1)
            yield self

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=f"{self.url}/v1", headers={"Authorization": f"Bearer {self.key}"}, timeout=60, trust_env=False,
                                 limits=httpx.Limits(max_connections=64))

    async def create(self, api: httpx.AsyncClient, key: pathlib.Path | None = None) -> dict[str, Any]:
        """A session of a new user."""
        body = {"exam_id": EXAM["id"], "user_id": str(uuid.uuid4())}
        if key:
            body["ssh_public_key"] = key.with_suffix(".pub").read_text().strip()
        answer = await api.post("/sessions", json=body)
        for _ in range(10):
            if answer.status_code != 503:
                break
            # Too many at once: as a platform would, it comes again when it is told to. What that takes is part of the figure.
            await asyncio.sleep(float(answer.headers.get("Retry-After", 2)))
            answer = await api.post("/sessions", json=body)
        if not answer.is_success:
            raise SystemExit(f"POST /v1/sessions: {answer.status_code} {answer.text}")
        return answer.json()["data"]

    async def until_ready(self, session: dict[str, Any]) -> float:
        """When the session's status WebSocket said that it is ready."""
        url = f"ws://127.0.0.1:{self.port}/v1/sessions/{session['session_id']}/status"
        headers = {"Authorization": f"Bearer {self.key}"}
        async with asyncio.timeout(90), websockets.connect(url, additional_headers=headers, proxy=None, compression=None) as socket:
            async for frame in socket:
                now = time.perf_counter()
                told = json.loads(frame)["data"]
                if told.get("lifecycle_state") == "ready":
                    return now
                if told.get("lifecycle_state") not in ("created", "initializing"):
                    raise SystemExit(f"the session did not become ready: {frame}; {self.log.read_text()[-2000:]}")
        raise SystemExit(f"the status of session {session['session_id']} ended")

    async def sessions(self, cluster: Cluster, count: int) -> float:
        """Creates so many at once; seconds until all are ready. Their pods are gone when this returns."""
        async with self.client() as api, cluster.client() as admin, Watch(admin, cluster.pods, MANAGED).open() as watch:
            before = set(watch.there)
            made: list[dict[str, Any]] = []

            async def one() -> float:
                session = await self.create(api)
                made.append(session)
                return await self.until_ready(session)

            try:
                start = time.perf_counter()
                return max(await asyncio.gather(*(one() for _ in range(count)))) - start
            finally:
                await asyncio.gather(*(self.terminate(api, session) for session in made))
                await watch.until("the sessions' pods gone", lambda: not watch.there.keys() - before)

    async def terminate(self, api: httpx.AsyncClient, session: dict[str, Any]) -> None:
        await api.post(f"/sessions/{session['session_id']}/terminate")

    async def warm_starts(self, cluster: Cluster, times: int, within: float = 20) -> list[float] | None:
        """Seconds from each request to ready with one environment kept warm; None if none becomes warm, or is taken."""
        async with self.client() as api, cluster.client() as admin, Watch(admin, cluster.pods, MANAGED).open() as watch:
            before, taken, values = set(watch.there), set[str](), []

            def kept() -> set[str]:
                """Pods that are running for nobody yet."""
                return {name for name, pod in watch.there.items() if name in watch.running and name not in taken | before}

            try:
                (await api.put(f"/exams/{EXAM['id']}", json=EXAM | {"warm": 1})).raise_for_status()
                for _ in range(times):
                    try:
                        await watch.until("a warm environment", lambda: bool(kept()), within)
                    except SystemExit:
                        return None
                    # What the API shows as running has its agent's answer soon after; nothing outside shows that one.
                    await asyncio.sleep(2)
                    offered = {watch.there[name]["metadata"]["labels"]["carrel.dev/environment"] for name in kept()}
                    start = time.perf_counter()
                    session = await self.create(api)
                    values.append(await self.until_ready(session) - start)
                    told = (await api.get(f"/sessions/{session['session_id']}")).json()["data"]
                    taken.add(f"carrel-{told['environment']['environment_id']}")
                    await self.terminate(api, session)
                    if told["environment"]["environment_id"] not in offered:
                        return None
                return values
            finally:
                (await api.put(f"/exams/{EXAM['id']}", json=EXAM)).raise_for_status()
                await watch.until("warm pods gone", lambda: not watch.there.keys() - before)


# --- the peer ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def sshd_with_kubectl(work: pathlib.Path, key: pathlib.Path, namespace: str, kubeconfig: pathlib.Path, pod: str) -> Iterator[Server]:
    """sshd whose every login is a `kubectl exec` into the pod, with the same rights as carrel's server."""
    kubectl = pathlib.Path(os.environ["CARREL_CLUSTER_DIR"]) / "bin/kubectl"
    command = work / "exec-in-pod"
    command.write_text(
        "#!/bin/sh\n"
        f"kubectl() {{ exec {kubectl} --kubeconfig={kubeconfig} --cache-dir={work}/kubectl --namespace={namespace} exec --quiet"
        f' "$@"; }}\n'
        f"set -- -i -c session {pod} --\n"
        f'if [ -t 0 ]; then set -- -t "$@" env "TERM=$TERM"; fi\n'
        'if [ -n "$SSH_ORIGINAL_COMMAND" ]; then kubectl "$@" sh -c "$SSH_ORIGINAL_COMMAND"; else kubectl "$@" bash -l; fi\n'
    )
    command.chmod(0o755)
    with sshd(work, key, PEER, f"ForceCommand {command}\n") as server:
        yield server


# --- the run -----------------------------------------------------------------------------------------------------


def data(kind: str) -> bytes:
    """A MiB of something: the link to the agent compresses what shrinks."""
    match kind:
        case "zeros":
            return bytes(MIB)
        case "listing":
            told = subprocess.run(["ls", "-lR", "/usr/lib", "/usr/share"], stdout=subprocess.PIPE, check=True).stdout
            return (told * (1 + MIB // len(told)))[:MIB]
        case _:
            return random.Random(1).randbytes(MIB)


def bulk(compared: Comparison, times: int, size: int, notes: list[str]) -> None:
    """Both directions with each kind of data."""
    for kind in KINDS:
        block, path = data(kind), f"/tmp/{kind}"
        for server in compared.servers:
            subprocess.run(server.ssh(f"cat > {path}"), input=block, check=True)
        command = f"cat $(yes {path} | head -n {size // MIB})"
        compared.interleaved(DOWN.format(kind), times, lambda server: whole(lambda: down(server, size, command), server, notes))
        compared.interleaved(UP.format(kind), times, lambda server: whole(lambda: up(server, size, block), server, notes))


def whole(transfer: Callable[[], float], server: Server, notes: list[str]) -> float:
    """A transfer that was complete. `kubectl exec` cuts some at their end: those of the peer are noted and tried again."""
    for _ in range(5):
        try:
            return transfer()
        except Cut as cut:
            if server.name == OURS:
                raise
            notes.append(f"cut short, and tried again: {cut}")
    raise SystemExit("\n".join(notes))


def measure(compared: Comparison, cluster: Cluster, carrel: Carrel, like: dict[str, Any], quick: bool, parts: set[str],
            others: dict[str, Callable[[int], float]]) -> list[str]:
    """Fills the table; returns what there is to say below it. `others` are other ways to start so many."""
    notes: list[str] = []
    rounds, size = (5, 50 * MIB) if quick else (40, 100 * MIB)

    waits: defaultdict[str, Iterator[int]] = defaultdict(lambda: itertools.count(1))

    def spread(starting: str) -> None:
        # kubelet looks at containers once a second, and what was there before has just gone at such a look: a start must come
        # at any point of that second. These are spread evenly over it.
        time.sleep(next(waits[starting]) * 0.618 % 1)

    def starts(server: Server, count: int) -> float:
        spread(server.name)
        if server.name == OURS:
            return asyncio.run(carrel.sessions(cluster, count))
        return asyncio.run(bare_pods(cluster, like, count))

    def more_starts(row: str, times: int, count: int) -> None:
        for name, start in others.items():
            values = []
            for _ in range(times):
                spread(name)
                values.append(start(count))
            notes.append(f"{row}, {name}: {statistics.median(values):.2f}")

    for server in compared.servers:
        check_ms(server)
    if "login" in parts:
        compared.interleaved(TRUE, rounds, check_ms)
        compared.interleaved("connections/s, 8 at a time", 1 if quick else 3, lambda server: connections_a_second(server, 24 if quick else 96))
    if "echo" in parts:
        compared.echo(2 if quick else 10)
    if "bulk" in parts:
        bulk(compared, 1 if quick else 5, size, notes)
    if "grader" in parts:
        checks = 10 if quick else 86
        compared.interleaved(f"{checks} logins with a check each, s", checks, lambda server: check_ms(server, A_CHECK) / 1000, sum)
    if "cold" in parts:
        times = 3 if quick else 15
        compared.interleaved(COLD, times, lambda server: starts(server, 1))
        more_starts(COLD, times, 1)
    if "warm" in parts:
        values = asyncio.run(carrel.warm_starts(cluster, 2 if quick else 10))
        if values:
            compared.figures[OURS][WARM] = sorted(values)[len(values) // 2]
        else:
            notes.append("create to ready, warm: no warm environment")
    if "many" in parts:
        count, times = (10, 1) if quick else (50, 3)
        compared.interleaved(MANY.format(count), times, lambda server: starts(server, count))
        more_starts(MANY.format(count), times, count)
    return notes


@contextlib.contextmanager
def namespace(name: str) -> Iterator[pathlib.Path]:
    """A namespace of the run's own; the kubeconfig with the server's rights in it."""
    script = ROOT / "tests/cluster/namespace"
    try:
        made = subprocess.run([script, "create", name, ROOT / "charts/rbac.yaml"], check=True, stdout=subprocess.PIPE, text=True,
                              stderr=subprocess.DEVNULL)
        yield pathlib.Path(made.stdout.strip())
    finally:
        subprocess.run([script, "delete", name], stderr=subprocess.DEVNULL)


async def first_session(carrel: Carrel, cluster: Cluster, key: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A session that is ready, and its pod."""
    async with carrel.client() as api, cluster.client() as admin:
        session = await carrel.create(api, key)
        await carrel.until_ready(session)
        told = (await api.get(f"/sessions/{session['session_id']}")).json()["data"]
        pod = (await admin.get(f"{cluster.pods}/carrel-{told['environment']['environment_id']}")).raise_for_status().json()
        return session, pod


@contextlib.contextmanager
def last_session(carrel: Carrel, cluster: Cluster, session: dict[str, Any]) -> Iterator[None]:
    """Ends the session at the end, so that the server leaves no pod."""

    async def end() -> None:
        async with carrel.client() as api, cluster.client() as admin, Watch(admin, cluster.pods, MANAGED).open() as watch:
            await carrel.terminate(api, session)
            await watch.until("the session's pod gone", lambda: not watch.there)

    try:
        yield
    finally:
        asyncio.run(end())


@contextlib.contextmanager
def equal_pod(cluster: Cluster, like: dict[str, Any]) -> Iterator[str]:
    """The name of a running pod like carrel's."""
    name = "peer"

    async def create() -> None:
        async with cluster.client() as api, Watch(api, cluster.pods, BARE).open() as watch:
            (await api.post(cluster.pods, json=bare_pod(like, name))).raise_for_status()
            await watch.until("the peer's pod running", lambda: name in watch.running)

    asyncio.run(create())
    yield name


@contextlib.contextmanager
def carrying(work: pathlib.Path, name: str) -> Iterator[Callable[[int], float]]:
    """A second carrel in a namespace of its own, whose session image has the agent in it; starts so many sessions at once."""
    own = work / "carrying"
    own.mkdir()
    with namespace(name) as kubeconfig:
        cluster = Cluster(pathlib.Path(os.environ["KUBECONFIG"]), name, own)
        with Carrel(own, name, kubeconfig, carrying=True).serving() as carrel:
            yield lambda count: asyncio.run(carrel.sessions(cluster, count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller transfers, ten at once")
    parser.add_argument("--parts", default=",".join(PARTS), help="only these, with commas between them: %(default)s")
    parser.add_argument("--keep-log", type=pathlib.Path, metavar="FILE", help="where the log of carrel goes; CARREL_LOG says how much")
    arguments = parser.parse_args()
    parts = set(arguments.parts.split(","))
    if parts - set(PARTS):
        parser.error(f"no such parts: {', '.join(sorted(parts - set(PARTS)))}")
    if "CARREL_CLUSTER_DIR" not in os.environ:
        parser.error('the cluster\'s variables are missing: eval "$(tests/cluster/env)", or use tests/bench/run-cluster')
    name = f"bench-{uuid.uuid4().hex[:8]}"
    load = os.getloadavg()[0]
    with contextlib.ExitStack() as stack:
        work, key = stack.enter_context(workplace())
        kubeconfig = stack.enter_context(namespace(name))
        cluster = Cluster(pathlib.Path(os.environ["KUBECONFIG"]), name, work)
        carrel = Carrel(work, name, kubeconfig)
        if arguments.keep_log:
            carrel.log = arguments.keep_log.resolve()
        stack.enter_context(carrel.serving())
        session, like = asyncio.run(first_session(carrel, cluster, key))
        stack.enter_context(last_session(carrel, cluster, session))
        ours = carrel_server(work, key, carrel.pid, session["ssh"])
        pod = stack.enter_context(equal_pod(cluster, like))
        peer = stack.enter_context(sshd_with_kubectl(work, key, name, kubeconfig, pod))
        compared = Comparison([peer, ours])
        others = {}
        if parts & {"cold", "many"}:
            others["carrel, agent in the image"] = stack.enter_context(carrying(work, f"{name}-carrying"))
        notes = measure(compared, cluster, carrel, like, arguments.quick, parts, others)
    print_table(compared.figures, PEER, OURS, AIMS)
    print(*notes, sep="\n", end="\n" if notes else "")
    print(f"Processes that want a processor (load average of a minute): {load:.1f} before, {os.getloadavg()[0]:.1f} at the end; "
          f"{os.cpu_count()} processors")


if __name__ == "__main__":
    sys.exit(main())
