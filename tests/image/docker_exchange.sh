#!/bin/sh
# Exchange images between hutch and a Docker daemon over a registry and by archives.
# Runs in network and mount namespaces of its own, made by the test; $1 is a scratch
# directory, $2 the hutch command. Prints one line per step that held.
set -eu
work=$1 hutch=$2
export HUTCH_ROOT=$work/hutch DOCKER_HOST=unix://$work/docker.sock HOME=$work/home
mkdir -p "$HOME"
ip link set lo up
pids=
finish() {
    for pid in $pids; do
        kill "$pid" 2>/dev/null || true
        wait "$pid" 2>/dev/null || true
    done
}
trap finish EXIT

cat >"$work/registry.yml" <<END
version: 0.1
log: {level: error}
storage: {filesystem: {rootdirectory: $work/registry}}
http: {addr: "127.0.0.1:5000"}
END
docker-registry serve "$work/registry.yml" >"$work/registry.log" 2>&1 &
pids="$pids $!"
cat >"$work/containerd.toml" <<END
version = 2
root = "$work/containerd"
state = "$work/containerd-state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = "$work/containerd.sock"
END
containerd --config "$work/containerd.toml" >"$work/containerd.log" 2>&1 &
pids="$! $pids"
tries=0
until [ -S "$work/containerd.sock" ]; do
    tries=$((tries + 1))
    [ "$tries" -lt 300 ] || { tail -n 5 "$work/containerd.log" >&2; exit 1; }
    sleep 0.2
done
/usr/sbin/dockerd --containerd "$work/containerd.sock" --host "$DOCKER_HOST" --data-root "$work/docker" --exec-root "$work/exec" \
    --pidfile "$work/docker.pid" --bridge none --iptables=false --storage-driver overlay2 \
    >"$work/docker.log" 2>&1 &
pids="$pids $!"

tries=0
until docker version >/dev/null 2>&1; do
    tries=$((tries + 1))
    [ "$tries" -lt 150 ] || { tail -n 5 "$work/docker.log" >&2; exit 1; }
    sleep 0.2
done

same() { # compare what a program printed
    [ "$2" = "$3" ] || { printf '%s: expected %s, got %s\n' "$1" "$2" "$3" >&2; exit 1; }
    printf '%s\n' "$1"
}

$hutch image bootstrap busybox >/dev/null 2>&1
$hutch tag busybox localhost:5000/box:1
$hutch push localhost:5000/box:1 >/dev/null 2>&1
docker pull -q localhost:5000/box:1 >/dev/null
same 'docker runs what hutch pushed' hello \
    "$(docker run --rm --network none localhost:5000/box:1 echo hello)"

printf 'FROM localhost:5000/box:1\nRUN echo built > /made && rm /bin/vi\nENV A=b\nUSER 12:34\n' |
    DOCKER_BUILDKIT=0 docker build -q --network none -t localhost:5000/built:1 - >/dev/null
docker push -q localhost:5000/built:1 >/dev/null
$hutch pull localhost:5000/built:1 >/dev/null 2>&1
same 'hutch runs what docker built and pushed' 'built b 12 34 gone' \
    "$($hutch run --rm --network none localhost:5000/built:1 \
        sh -c 'echo $(cat /made) $A $(id -u) $(id -g) $(test -e /bin/vi || echo gone)')"

docker save localhost:5000/built:1 | $hutch load >/dev/null 2>&1
$hutch save localhost:5000/built:1 -o "$work/hutch.tar" 2>/dev/null
docker rmi -f localhost:5000/built:1 >/dev/null
docker load -q -i "$work/hutch.tar" >/dev/null
same 'docker loads what hutch saved' built \
    "$(docker run --rm --network none localhost:5000/built:1 cat /made)"
same 'the identifier is the same on both sides' \
    "$(docker image inspect -f '{{.Id}}' localhost:5000/built:1)" \
    "$($hutch image inspect -f '{{.Id}}' localhost:5000/built:1)"
