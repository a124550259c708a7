#!/bin/sh
# Proves compose.yml on this machine's Docker: starts it on ports of its own with new
# secrets, runs a task, restarts the agent under another, kills one of each service, and
# takes everything away. It needs the image (make image), docker-compose, curl and an
# image that Docker has for the tasks: try.sh busybox
set -eu
here=$(cd "$(dirname "$0")" && pwd)
task_image=${1:?"usage: try.sh IMAGE, such as busybox"}
dir=$(mktemp -d)
export DAYFLY_AGENT_DATA="$dir/agent" DAYFLY_PORT=${DAYFLY_PORT:-18480} DAYFLY_PORT2=${DAYFLY_PORT2:-18490}
cp "$here/compose.yml" "$here/secrets.sh" "$here/prometheus.yml" "$dir" && mkdir "$DAYFLY_AGENT_DATA" && cd "$dir"
./secrets.sh try
project=dayfly-try-$$
compose() { docker-compose -p "$project" "$@" 2>>"$dir/log"; }
down() {
	compose down -v -t 5 || true
	docker ps -aq --filter "label=dayfly.worker=try" | xargs -r docker rm -f >/dev/null
	rm -rf "$dir"
}
trap down EXIT
services="gateway1 gateway2 placer1 placer2 reaper1 reaper2 agent"
compose up -d nats1 nats2 nats3 $services

api() { curl -sS -m 30 -H 'Content-Type: application/json' "$@"; }
one=http://127.0.0.1:$DAYFLY_PORT/v1 two=http://127.0.0.1:$DAYFLY_PORT2/v1
field() { sed -n "s/.*\"$1\":\"\([^\"]*\)\".*/\1/p"; }
await() { # await WHAT COMMAND: until it succeeds
	what=$1; shift
	for _ in $(seq 120); do "$@" >/dev/null 2>&1 && return; sleep 0.5; done
	echo "never came: $what" >&2; compose logs --tail 20 >&2; exit 1
}
worker_ready() { api "$1/workers" | grep -q '"state":"ready"'; }
await "a worker" worker_ready "$one"
await "a worker, seen from the other gateway" worker_ready "$two"

create() { api "$1/tasks$2" -d "{\"image\":\"$task_image\",\"command\":$3,\"ttl\":\"5m\"}"; }
[ "$(create "$one" '?wait=done&timeout=30s' '["echo","hi"]' | sed 's/{"image.*"pull"//' | field state)" = completed ]
echo "a task ran"
id=$(create "$one" '?wait=running&timeout=30s' '["sleep","200"]' | field id)
compose restart -t 10 agent
running() { api "$two/tasks/$id" | grep -q '"state":"running"'; }
await "the task after a restart of its agent" running
echo "a task outlived its agent"
docker kill $(compose ps -q gateway1 placer1 reaper1 nats1) >/dev/null
canceled() { api "$two/tasks/$id" | grep -q '"state":"canceled"'; }
cancel() { api -f -X DELETE "$two/tasks/$id?grace=1s"; }
await "a gateway that takes the cancel" cancel
await "the end of the task" canceled
echo "one of each was killed, and the task ended as asked"
