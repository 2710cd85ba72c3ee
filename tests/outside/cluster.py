"""The Kubernetes of `tests/cluster`, as the suite uses it: namespaces with exactly the server's rights, and what is in them.

The cluster is somebody else's to start and to end. It is found by the variables that `tests/cluster/env` prints.
"""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from pathlib import Path
from typing import Any

from waiting import wait_until

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = REPOSITORY / "tests/cluster"
ROLE = REPOSITORY / "charts/rbac.yaml"

GONE_WITHIN = 150
"""Seconds for a namespace to go."""

ENVIRONMENT_LABEL = "carrel.dev/environment"
"""What Carrel makes for one environment has it; the policy that closes a whole namespace has not."""


class Cluster:
    """A cluster that is up."""

    def __init__(self) -> None:
        self.admin = Path(os.environ["KUBECONFIG"])
        self.directory = Path(os.environ["CARREL_CLUSTER_DIR"])
        self.session_image = os.environ["CARREL_CLUSTER_SESSION_IMAGE"]
        self.namespaces: dict[str, Namespace] = {}
        """Those that were made here and are not known to be gone."""

    @staticmethod
    def lacking() -> str | None:
        """Why there is no cluster to be used, or None."""
        unset = [name for name in ("KUBECONFIG", "CARREL_CLUSTER_DIR") if not os.environ.get(name)]
        if unset:
            return f'no Kubernetes: {" and ".join(unset)} not set; run tests/cluster/up and eval "$(tests/cluster/env)"'
        missing = [path for path in map(os.environ.__getitem__, ("KUBECONFIG", "CARREL_CLUSTER_DIR")) if not Path(path).exists()]
        return f"no Kubernetes is up: there is no {missing[0]}; run tests/cluster/up" if missing else None

    def kubectl(self, *words: str, namespace: str | None = None, input: bytes | None = None, timeout: float = 60) -> str:
        """What `kubectl` prints, as the cluster's administrator; fails unless it exits with 0."""
        within = ["--namespace", namespace] if namespace else []
        argv = ["kubectl", "--kubeconfig", str(self.admin), *within, *words]
        stdin: dict[str, Any] = {"stdin": subprocess.DEVNULL} if input is None else {"input": input}
        done = subprocess.run(argv, capture_output=True, timeout=timeout, **stdin)
        assert done.returncode == 0, f"kubectl {' '.join(words)}: status {done.returncode}, {done.stderr.decode(errors='replace')[-1500:]}"
        return done.stdout.decode(errors="replace")

    def namespace(self, name: str | None = None) -> Namespace:
        """A new namespace, by default with a name that nobody else has."""
        made = Namespace(self, name or f"outside-{uuid.uuid4().hex[:10]}")
        self.namespaces[made.name] = made
        made.create()
        return made

    def close(self) -> None:
        """Deletes all namespaces that were made here, and waits until they are gone; fails if nobody had deleted them before."""
        forgotten = sorted(name for name, namespace in self.namespaces.items() if not namespace.deleted)
        for namespace in self.namespaces.values():
            namespace.delete()
        wait_until("the namespaces are gone", lambda: not self.namespaces.keys() & self.existing(), GONE_WITHIN, every=1)
        self.namespaces.clear()
        assert not forgotten, f"nobody deleted the namespaces {forgotten}"

    def existing(self) -> set[str]:
        """The names of all namespaces, those that are being deleted too."""
        return set(self.kubectl("get", "namespaces", "-o", "jsonpath={.items[*].metadata.name}").split())


class Namespace:
    """One namespace for the sessions of one Carrel, under Pod Security "restricted"."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster = cluster
        self.name = name
        self.kubeconfig = Path()
        """Of a service account that has `charts/rbac.yaml` and no other right."""
        self.deleted = False

    def create(self) -> None:
        """Makes it; see [`Cluster.namespace`]."""
        argv = [SCRIPTS / "namespace", "create", self.name, ROLE]
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=90)
        assert done.returncode == 0, f"the namespace {self.name} cannot be made: {done.stderr[-1500:]}"
        self.kubeconfig = Path(done.stdout.split()[-1])

    def kubectl(self, *words: str, input: bytes | None = None, timeout: float = 60) -> str:
        """As [`Cluster.kubectl`], in this namespace."""
        return self.cluster.kubectl(*words, namespace=self.name, input=input, timeout=timeout)

    def objects(self, kinds: str) -> list[dict[str, Any]]:
        """All objects of the kinds (`pods`, `networkpolicies`, or several with commas)."""
        return json.loads(self.kubectl("get", kinds, "-o", "json"))["items"]

    def pods(self) -> dict[str, dict[str, Any]]:
        """Pods by their names, those that are being deleted too."""
        return {item["metadata"]["name"]: item for item in self.objects("pods")}

    def environments(self, environment_id: str | None = None) -> dict[str, str]:
        """What was made for one environment or for all, pods and network policies: KIND/NAME, and for a pod its phase."""
        found = {}
        for item in self.objects("pods,networkpolicies"):
            owner = item["metadata"].get("labels", {}).get(ENVIRONMENT_LABEL)
            if environment_id and owner != environment_id:
                continue
            if owner or item["kind"] == "Pod":
                found[f"{item['kind']}/{item['metadata']['name']}"] = item.get("status", {}).get("phase", "")
        return found

    def delete(self) -> None:
        """Begins to delete it with all that is in it. This takes seconds; [`Cluster.close`] sees to the end."""
        if not self.deleted:
            argv = [SCRIPTS / "namespace", "delete", self.name]
            done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=90)
            assert done.returncode == 0, f"the namespace {self.name} cannot be deleted: {done.stderr[-1500:]}"
            self.deleted = True
