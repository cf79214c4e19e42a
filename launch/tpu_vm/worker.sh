#!/usr/bin/env bash
# What launch/tpu_vm/run.sh runs on each worker: asks the machine which one it is.
set -euo pipefail

metadata() {
  curl --silent --fail --header 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

script=$1
shift
# One for each worker, "…:…:ADDRESS", with commas between them.
endpoints=$(metadata worker-network-endpoints)
IFS=, read -ra workers <<<"$endpoints"
first=${workers[0]}
export JAX_COORDINATOR_ADDRESS=${first##*:}:8476
export JAX_NUM_PROCESSES=${#workers[@]}
JAX_PROCESS_ID=$(metadata agent-worker-number)
export JAX_PROCESS_ID
exec "${CM3LEON_PYTHON:-.venv/bin/python}" "launch/$script.py" "$@"
