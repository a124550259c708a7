#!/bin/sh
# Proves compose.yml on this machine's Docker: starts it on ports of its own with new
# secrets, runs a task, asks Prometheus, restarts the agent under another task, kills one
# of each service, and takes everything away. It needs the image (make image),
# docker-compose, curl and a busybox that Docker has for the tasks: try.sh busybox
#
# Prometheus is that of PROMETHEUS_IMAGE. If that is not set, an image is made of the
# prometheus that is installed here, so that nothing has to be pulled.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
task_image=${1:?"usage: try.sh IMAGE, such as busybox"}
dir=$(mktemp -d)
export DAYFLY_AGENT_DATA="$dir/agent" DAYFLY_PORT=${DAYFLY_PORT:-18480} DAYFLY_PORT2=${DAYFLY_PORT2:-18490} DAYFLY_INGRESS_PORT=${DAYFLY_INGRESS_PORT:-18481} PROMETHEUS_PORT=${PROMETHEUS_PORT:-18500}
mkdir "$DAYFLY_AGENT_DATA" "$dir/compose" "$dir/prometheus"
cp "$here/compose.yml" "$here/secrets.sh" "$here/prometheus.yml" "$dir/compose"
cp "$here/../prometheus/rules.yml" "$dir/prometheus"
cd "$dir/compose"
# So that all of it is seen within seconds.
sed -i 's/_interval: 15s/_interval: 1s/g' prometheus.yml
project=dayfly-try-$$
made=
compose() { docker-compose -p "$project" "$@" 2>>"$dir/log"; }
down() {
	compose down -v -t 5 || true
	docker ps -aq --filter "label=dayfly.worker=try" | xargs -r docker rm -f >/dev/null
	[ -z "$made" ] || docker rmi "$made" >/dev/null || true
	rm -rf "$dir"
}
trap down EXIT
./secrets.sh try
if [ -z "${PROMETHEUS_IMAGE:-}" ]; then
	mkdir "$dir/image" "$dir/image/data"
	program=$(command -v prometheus)
	tar -ch -C / $(ldd "$program" | grep -o '/[^ ]*') "${program#/}" 2>/dev/null | tar -x -C "$dir/image"
	# With the paths and the user of the public image.
	cat >"$dir/image/Dockerfile" <<-END
		FROM scratch
		COPY . /
		COPY --chown=65534:65534 data /prometheus
		USER 65534
		ENTRYPOINT ["$program"]
	END
	export PROMETHEUS_IMAGE="dayfly-prometheus:try-$$"
	docker build -q -t "$PROMETHEUS_IMAGE" "$dir/image" >/dev/null
	made=$PROMETHEUS_IMAGE
fi
compose up -d

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

url=$(api "$one/tasks?wait=running&timeout=30s" -d "{\"image\":\"$task_image\",\"command\":[\"httpd\",\"-f\",\"-p\",\"8000\",\"-h\",\"/task/input\"],
	\"files\":[{\"path\":\"page\",\"content\":\"a page\"}],\"ports\":[{\"name\":\"web\",\"port\":8000}],\"ttl\":\"1m\"}" | field url)
page() { curl -sSf -m 5 --resolve "$host:$DAYFLY_INGRESS_PORT:127.0.0.1" "$url/page" | grep -q "a page"; }
host=${url#http://}; host=${host%:*}
await "a page by the task's hostname" page
echo "$url answered"

prometheus() { curl -sSf -m 10 -G "http://127.0.0.1:$PROMETHEUS_PORT/api/v1/$1" ${2:+--data-urlencode "$2"}; }
number() { prometheus query "query=$1" | sed -n 's/.*"value":\[[^,]*,"\([^"]*\)"\].*/\1/p'; }
targets=$(grep -o '[a-z0-9]*:8082' prometheus.yml | wc -l)
all_up() { [ "$(number 'sum(up{job="dayfly"})')" = "$targets" ]; }
await "all targets up" all_up
rules=$(grep -cE '^ +- (alert|record):' ../prometheus/rules.yml)
counted() { prometheus rules | grep -o "\"health\":\"$1\"" | wc -l; }
all_rules() { [ "$(counted ok)" = "$rules" ]; }
await "all rules evaluated" all_rules
finished() { [ "$(number 'sum(dayfly_tasks_finished_total{state="completed"})')" -ge 1 ]; }
await "the task in a query" finished
echo "Prometheus sees $targets parts, has evaluated $rules rules, and counts the task"
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
down_alert() { prometheus alerts | grep -q '"alertname":"DayflyDown"'; }
await "an alert about what was killed" down_alert
echo "DayflyDown is pending"
