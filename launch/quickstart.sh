#!/usr/bin/env bash
# From a fresh machine to pictures: makes the environment, trains one small system on
# procedural scenes, and leaves report.html. About 14 minutes on 2 cores.
#
#   bash launch/quickstart.sh [WORKDIR=runs/quick]
set -euo pipefail
workdir=${1:-runs/quick}
case $workdir in /*) ;; *) workdir=$PWD/$workdir ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
exec .venv/bin/python launch/run_all.py \
  --config configs/shapes.py:quick --workdir "$workdir"
