# Settings and functions shared by the scripts of the test cluster; to be sourced by bash with `set -euo pipefail`.
# shellcheck shell=bash
# shellcheck disable=SC2034

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# Everything that the running cluster writes is below one directory, everything that is built once in another.
CARREL_CLUSTER_DIR=${CARREL_CLUSTER_DIR:-/var/lib/carrel-cluster}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/carrel
cluster=$CARREL_CLUSTER_DIR
[[ $cluster == /?* ]] || { echo "CARREL_CLUSTER_DIR must be an absolute path" >&2; exit 1; }
lock=/run/carrel-cluster.lock

# Ports on 127.0.0.1, below the range from which the kernel hands out ports to others.
api_port=26443 kubelet_port=20250 kubelet_health_port=20248 controller_port=20257 scheduler_port=20259
etcd_port=22379 etcd_peer_port=22380
# The node's name is what the API server dials for exec. Every machine has a loopback address for this one, so that
# /etc/hosts stays as it is.
node=localhost
bridge=carrel0 node_ip=10.231.0.1 pod_subnet=10.231.0.0/22 service_subnet=10.232.0.0/24
# A network namespace that stands for the world outside the cluster.
outside=carrel-outside outside_link=carrel-out0 outside_gateway=198.51.100.1 outside_ip=198.51.100.10
cgroup=carrel-cluster
policy_table=carrel_policy_standin
cni_network=carrel

image_pause=carrel.test/pause:dev
image_agent=carrel.test/agent:dev
image_session=carrel.test/session:dev
image_small=carrel.test/small:dev
image_carrying=carrel.test/session-with-agent:dev agent_in_image=/opt/carrel/agent

components=(etcd containerd kube-apiserver kube-controller-manager kube-scheduler kubelet policy-standin)

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { say "$*"; exit 1; }

need_root() {
	[[ $(uname -s) == Linux && $(uname -m) == x86_64 ]] || die "needs Linux on x86_64"
	((EUID == 0)) || die "needs root: it makes network namespaces, mounts and cgroups"
}

# One script at a time changes the cluster. What is started later closes descriptor 9, or it would hold the lock.
take_lock() {
	exec 9>"$lock"
	flock -n 9 && return
	say "waiting for another run of these scripts"
	flock -w 900 9 || die "another run has held $lock for 15 minutes"
}

# A key for what is built from the given files and words.
key_of() {
	local word
	for word in "$@"; do
		if [[ -f $word ]]; then sha256sum <"$word"; else printf '%s\n' "$word"; fi
	done | sha256sum | cut -c1-16
}

sysctl_path() { echo "/proc/sys/${1//.//}"; }

# The start time distinguishes a process of ours from a later one with the same number.
start_time() {
	local stat
	stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
	stat=${stat##*) }
	# shellcheck disable=SC2086
	set -- $stat
	echo "${20}"
}

# The component's process id, or failure when it does not run.
pid_of() {
	local pid started now
	read -r pid started 2>/dev/null <"$cluster/run/$1.pid" || return 1
	now=$(start_time "$pid") || return 1
	[[ $now == "$started" && $(cut -d')' -f2 "/proc/$pid/stat" 2>/dev/null) != " Z"* ]] || return 1
	echo "$pid"
}

start_component() {
	local name=$1 pid
	pid_of "$name" >/dev/null && return
	[[ -x $cluster/component/$name ]] || die "no component $name: is the cluster up?"
	setsid "$cluster/component/$name" >>"$cluster/log/$name.log" 2>&1 </dev/null 9>&- &
	pid=$!
	disown "$pid"
	echo "$pid $(start_time "$pid")" >"$cluster/run/$name.pid"
}

# Whether it ends within 15 s. A zombie has ended: the first process of some machines takes seconds to collect it.
has_ended() {
	local end=$((SECONDS + 15))
	while pid_of "$1" >/dev/null; do
		((SECONDS < end)) || return 1
		sleep 0.02
	done
}

# Ends a component: the signal, and SIGKILL if that has not ended it after 15 s.
stop_component() {
	local name=$1 signal=${2:-TERM} pid
	pid=$(pid_of "$name") || { rm -f "$cluster/run/$name.pid"; return 0; }
	kill -s "$signal" "$pid" 2>/dev/null || true
	kill -s CONT "$pid" 2>/dev/null || true
	if ! has_ended "$name"; then
		say "$name did not end on SIG$signal: killed"
		kill -s KILL "$pid" 2>/dev/null || true
		has_ended "$name" || die "$name (process $pid) cannot be killed"
	fi
	rm -f "$cluster/run/$name.pid"
}

# Polls a command until it succeeds; the deadline is in seconds of SECONDS. Fails early when a component has died.
wait_for() {
	local what=$1 deadline=$2 name
	shift 2
	until "$@" >/dev/null 2>"$cluster/log/wait.log"; do
		for name in "${components[@]}"; do
			if [[ -f $cluster/run/$name.pid ]] && ! pid_of "$name" >/dev/null; then
				complain "$name has ended while waiting for $what" "$name"
				return 1
			fi
		done
		if ((SECONDS >= deadline)); then
			complain "$what: not within the deadline ($(tail -n1 "$cluster/log/wait.log"))" "${components[@]}"
			return 1
		fi
		sleep 0.1
	done
}

# Prints what went wrong and the last log lines of the components in question.
complain() {
	local message=$1 name
	shift
	say "$message"
	for name in "$@"; do
		[[ -s $cluster/log/$name.log ]] || continue
		printf -- '--- last lines of %s\n' "$cluster/log/$name.log" >&2
		tail -n 12 "$cluster/log/$name.log" | cut -c1-400 >&2
	done
}

kube() { "$cluster/bin/kubectl" --kubeconfig "$cluster/kubeconfig" "$@"; }
ctr() { command ctr --address "$cluster/run/containerd.sock" --namespace k8s.io "$@"; }
