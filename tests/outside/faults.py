"""Faults of the test cluster's own programs, made on purpose and always taken back.

A stopped program is stopped for everybody who uses the cluster: who runs these tests has it alone meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
import uuid
from collections.abc import Iterator

from cluster import SCRIPTS, Cluster
from waiting import wait_until


def component(*words: str) -> None:
    """`tests/cluster/component` with these words."""
    done = subprocess.run([SCRIPTS / "component", *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, f"component {' '.join(words)}: {done.stderr[-1500:]}"


def answers(cluster: Cluster) -> bool:
    """Is the API server there?"""
    try:
        return cluster.kubectl("get", "--raw", "/readyz", timeout=20).strip() == "ok"
    except (AssertionError, subprocess.TimeoutExpired):
        return False


def node_ready(cluster: Cluster) -> bool:
    """Does the cluster put pods on its node?"""
    (node,) = json.loads(cluster.kubectl("get", "nodes", "-o", "json"))["items"]
    ready = any(one["type"] == "Ready" and one["status"] == "True" for one in node["status"]["conditions"])
    return ready and not node["spec"].get("taints")


class Away:
    """A program that has been stopped or frozen at a moment, until it is called back."""

    def __init__(self, cluster: Cluster, name: str, back: tuple[str, ...]) -> None:
        self.cluster = cluster
        self.name = name
        self.since = time.monotonic()
        self._back = back

    @property
    def seconds(self) -> float:
        """How long it has been away."""
        return time.monotonic() - self.since

    def stay(self, seconds: float) -> None:
        """Waits until it has been away for so long."""
        time.sleep(max(0.0, seconds - self.seconds))

    def back(self) -> None:
        """Ends the fault, and waits for the API server if that was it. A second time does no harm."""
        component(*self._back)
        if self.name == "kube-apiserver":
            wait_until("the API server answers again", lambda: answers(self.cluster), within=60, every=0.2)


@contextlib.contextmanager
def away(cluster: Cluster, name: str, how: str) -> Iterator[Away]:
    """`how` is `stop` (in order), `kill` (at once) or `freeze`. Afterwards the cluster is as usable as before."""
    assert how in ("stop", "kill", "freeze"), how
    back = ("signal", name, "CONT") if how == "freeze" else ("start", name)
    try:
        component(*(("signal", name, "STOP") if how == "freeze" else (how, name)))
        fault = Away(cluster, name, back)
        yield fault
    finally:
        component(*back)
        recover(cluster)


def recover(cluster: Cluster) -> None:
    """Waits until the cluster makes pods at its usual pace again.

    While the API server is away, the others wait up to a minute between their attempts to reach it: they are started anew, so
    that they ask at once.
    """
    wait_until("the API server answers", lambda: answers(cluster), within=60, every=0.2)
    for name in ("kube-controller-manager", "kube-scheduler", "kubelet"):
        component("stop", name)
        component("start", name)
    wait_until("the node takes pods", lambda: node_ready(cluster), within=60, every=0.2)
    pod = f"recovered-{uuid.uuid4().hex[:8]}"
    cluster.kubectl("run", pod, f"--image={os.environ['CARREL_CLUSTER_PAUSE_IMAGE']}", "--restart=Never", namespace="default")
    try:
        cluster.kubectl("wait", f"pod/{pod}", "--for=condition=Ready", "--timeout=60s", namespace="default", timeout=90)
    finally:
        cluster.kubectl("delete", "pod", pod, "--force", "--grace-period=0", "--wait=false", namespace="default")

