#!/bin/sh
# Makes the secrets of a new site in ./secrets: core.json for the core services and the
# NATS servers, worker.json for the agent. It overwrites nothing.
set -eu
cd "$(dirname "$0")"
image=${DAYFLY_IMAGE:-dayfly}
worker=${1:-$(hostname | tr 'A-Z' 'a-z' | tr -cd 'a-z0-9-')}
[ ! -e secrets/core.json ] || { echo "secrets/core.json is there already" >&2; exit 1; }
umask 077
mkdir -p secrets
docker run --rm --network none -u "$(id -u)" -v "$PWD/secrets:/secrets" "$image" credentials init /secrets/core.json
docker run --rm --network none -u "$(id -u)" -v "$PWD/secrets:/secrets" "$image" credentials worker /secrets/core.json "$worker" > secrets/worker.json
echo "secrets of the worker $worker are in $PWD/secrets" >&2
