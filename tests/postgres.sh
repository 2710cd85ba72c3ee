#!/usr/bin/env bash
# A private PostgreSQL for tests: its own data directory, a free loopback port, gone at the end.
#
#   tests/postgres.sh run COMMAND…   start one, run COMMAND with CARREL_TEST_POSTGRES_URL set, stop and delete it
#   tests/postgres.sh start          start one and print two lines to `eval`: the URL and the directory to give to stop
#   tests/postgres.sh stop DIR       stop and delete what `start` made
#
# Uses Debian's binaries (apt install postgresql) and needs no service. PostgreSQL refuses to run as root: root starts it as `postgres`.
set -euo pipefail

bin=$(ls -d /usr/lib/postgresql/*/bin 2>/dev/null | sort -V | tail -1)
if [ -z "$bin" ]; then
    echo "tests/postgres.sh: PostgreSQL is not installed: apt-get install postgresql" >&2
    exit 1
fi

as_owner() {
    if [ "$(id -u)" = 0 ]; then (cd / && exec setpriv --reuid=postgres --regid=postgres --init-groups "$@"); else "$@"; fi
}

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

start() {
    dir=$(mktemp -d "${TMPDIR:-/tmp}/carrel-postgres.XXXXXX")
    [ "$(id -u)" != 0 ] || chown postgres: "$dir"
    trap 'stop "$dir"' ERR
    # trust: whoever is on this machine; the data are tests'.
    as_owner "$bin/initdb" -D "$dir/data" -U postgres -A trust -E UTF8 --no-locale --no-sync >"$dir.log" 2>&1 \
        || { cat "$dir.log" >&2; return 1; }
    local attempt
    for attempt in 1 2 3; do # another program may take the port in between
        port=$(free_port)
        if as_owner "$bin/pg_ctl" -D "$dir/data" -l "$dir/log" -w -t 30 \
            -o "-c listen_addresses=127.0.0.1 -p $port -k $dir -c fsync=off -c max_connections=200 -c shared_buffers=32MB" \
            start >"$dir.log" 2>&1 </dev/null; then
            rm -f "$dir.log"
            trap - ERR
            url="postgres://postgres@127.0.0.1:$port/postgres"
            return 0
        fi
    done
    cat "$dir.log" "$dir/log" >&2
    return 1
}

stop() {
    case "$1" in */carrel-postgres.*) ;; *) echo "tests/postgres.sh: $1 was not made by it" >&2; return 2 ;; esac
    [ ! -f "$1/data/postmaster.pid" ] || as_owner "$bin/pg_ctl" -D "$1/data" -m immediate -w stop >/dev/null 2>&1 || true
    rm -rf "$1" "$1.log"
}

case "${1:-}" in
    start)
        start
        printf 'export CARREL_TEST_POSTGRES_URL=%q\nCARREL_TEST_POSTGRES_DIR=%q\n' "$url" "$dir"
        ;;
    stop) stop "${2:?the directory that start printed}" ;;
    run)
        shift
        start
        trap 'stop "$dir"' EXIT
        trap 'exit 130' INT TERM HUP
        CARREL_TEST_POSTGRES_URL="$url" CARREL_TEST_POSTGRES_DIR="$dir" "$@"
        ;;
    *)
        sed -n '2,8p' "$0" | sed 's/^# \{0,1\}//' >&2
        exit 2
        ;;
esac
