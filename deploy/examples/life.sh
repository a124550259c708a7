#!/bin/sh
# A task's whole life over the API, by curl: create with an Idempotency-Key, wait, events,
# follow the log, extend, cancel, a batch, a callback whose signature is checked, errors.
# It needs an image with a shell, and openssl and busybox for the callback:
#
#	dayfly up --callback-allow 127.0.0.1/32
#	life.sh busybox
set -eu
image=${1:?"usage: life.sh IMAGE"}
api=${DAYFLY_URL:-http://127.0.0.1:8080}/v1
receiver=${RECEIVER:-127.0.0.1:8099} # where the callback is taken
dir=$(mktemp -d)
children=
trap 'for pid in $children; do kill "$pid" 2>/dev/null || true; done; rm -rf "$dir"' EXIT

# ask METHOD PATH [BODY] [HEADER…]: the status is printed, $dir/head and $dir/body have the rest.
# Sending it again is safe: it says that it could not connect, and a POST has its key.
ask() {
	method=$1 path=$2 body=${3:-}
	shift 2; [ $# -eq 0 ] || shift
	for header; do set -- "$@" -H "$header"; shift; done
	[ -z "$body" ] || set -- "$@" -H 'Content-Type: application/json' --data-binary "$body"
	curl -sS -m 90 --retry 5 --retry-connrefused -X "$method" "$api$path" -D "$dir/head" -o "$dir/body" -w '%{http_code}' "$@"
}
# want STATUS METHOD PATH …: ask, and be content with this status only.
want() {
	status=$1; shift
	got=$(ask "$@")
	[ "$got" = "$status" ] || { echo "$1 $2: $got, not $status: $(cat "$dir/body")" >&2; exit 1; }
}
# first NAME: its first value in the answer. Enough for flat things; use jq for more.
first() { grep -o "\"$1\":\"[^\"]*\"" "$dir/body" | head -n 1 | cut -d'"' -f4; }
header() { tr -d '\r' <"$dir/head" | sed -n "s/^$1: //Ip"; }
has() { grep -q "$1" "$2" || { echo "no $1 in: $(cat "$2")" >&2; exit 1; }; }

# The key makes it one task, however often it is asked for.
key=life-$$-$(date +%s)
spec='{"image": "'$image'", "command": ["sh", "-c", "for n in 1 2 3; do echo line $n; done; exec sleep 600"], "ttl": "5m", "labels": {"by": "curl"}}'
want 201 POST /tasks "$spec" "Idempotency-Key: $key"
task=$(first id)
want 201 POST /tasks "$spec" "Idempotency-Key: $key"
[ "$(first id)" = "$task" ] && [ "$(header Idempotency-Replayed)" = true ]
echo "$task was created once"

# The log is followed while all else goes on; it ends with the task.
curl -sSN -m 120 "$api/tasks/$task/logs?follow=1" >"$dir/log" & log=$!
curl -sSN -m 120 -H 'Accept: application/x-ndjson' "$api/tasks/$task/events" >"$dir/events" & events=$!
children="$log $events"

want 200 GET "/tasks/$task?wait=running&timeout=60s"
[ "$(first state)" = running ]
echo "it runs"

# Only if it is as we saw it: another's change is answered with 412, and asked for anew.
until status=$(ask POST "/tasks/$task/extend" '{"ttl": "15m"}' "If-Match: $(header ETag)"); [ "$status" != 412 ]; do
	want 200 GET "/tasks/$task"
done
case $status in 200 | 202) echo "it has more time, until $(first expires_at)" ;; *) cat "$dir/body" >&2; exit 1 ;; esac

until grep -q '^line 3$' "$dir/log"; do sleep 0.2; done
want 200 DELETE "/tasks/$task?grace=1s"
want 200 GET "/tasks/$task?wait=done&timeout=60s"
[ "$(first state)" = canceled ]
wait "$log" "$events"
for state in queued assigned running canceled; do has "\"state\":\"$state\"" "$dir/events"; done
echo "it was canceled; its log and its $(grep -c . "$dir/events") events ended with it"

# Errors have a code that stays, a field, and a sentence.
want 422 POST /tasks '{"image": "'"$image"'", "ttl": "0s"}'
[ "$(first code)" = invalid_value ] && [ "$(first field)" = ttl ]
want 409 POST "/tasks/$task/extend" '{"ttl": "1h"}'
[ "$(first code)" = state_conflict ]
want 404 GET /tasks/t-01jd0000000000000000000000
[ "$(first code)" = not_found ]
want 422 POST /tasks '{"image": "other"}' "Idempotency-Key: $key"
[ "$(first code)" = idempotency_reused ]
echo "what cannot be was refused"

# Who takes callbacks keeps the body as it came, checks the signature over it, and answers.
secret=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
mkdir -p "$dir/www/cgi-bin"
cat >"$dir/www/cgi-bin/done" <<END
#!/bin/sh
head -c "\$CONTENT_LENGTH" >"$dir/got"
signature=\$HTTP_DAYFLY_SIGNATURE
at=\${signature#t=} at=\${at%%,*}
good=\$({ printf '%s.' "\$at"; cat "$dir/got"; } | openssl dgst -sha256 -hmac $secret | sed 's/.* //')
now=\$(date +%s)
if [ "\${signature#*v1=}" = "\$good" ] && [ \$((now - at)) -lt 300 ]; then
	echo "\$HTTP_DAYFLY_DELIVERY" >>"$dir/deliveries" # the same name: the same callback again
	printf 'Status: 204 No Content\r\n\r\n'
else
	printf 'Status: 403 Forbidden\r\n\r\n'
fi
END
chmod +x "$dir/www/cgi-bin/done"
: >"$dir/deliveries"
busybox httpd -f -p "$receiver" -h "$dir/www" & children=$!
forged=$(curl -sS -m 10 --retry 5 --retry-connrefused -o /dev/null -w '%{http_code}' -d '{}' -H "Dayfly-Signature: t=$(date +%s),v1=00" "http://$receiver/cgi-bin/done")
[ "$forged" = 403 ]

want 201 POST /batches '{"template": {"image": "'"$image"'", "command": ["sh", "-c", "exit $CODE"], "ttl": "1m", "env": {"CODE": "0"}},
	"items": [{"name": "good"}, {"name": "better"}, {"name": "bad", "env": {"CODE": "3"}}],
	"labels": {"by": "curl"}, "callback": {"url": "http://'"$receiver"'/cgi-bin/done", "secret": "'$secret'"}}' "Idempotency-Key: $key"
batch=$(first id)
tries=0
until [ "$(sort -u "$dir/deliveries" | grep -c .)" = 1 ]; do
	tries=$((tries + 1)); [ $tries -lt 120 ] || { echo "no callback came" >&2; exit 1; }
	sleep 0.5
done
has '"completed":2' "$dir/got"
has '"failed":1' "$dir/got"
want 200 GET "/batches/$batch"
[ "$(first state)" = done ]
want 200 GET "/batches/$batch/items"
has '"name":"bad"[^}]*"state":"failed"' "$dir/body"
want 200 GET /batches
has "$batch" "$dir/body"
echo "the batch $batch is done, and said so with a good signature"
