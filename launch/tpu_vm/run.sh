#!/usr/bin/env bash
# Any script of launch/ on every worker of a Cloud TPU (VMs, without Kubernetes):
#
#   bash launch/tpu_vm/run.sh TPU ZONE pretrain \
#       --config configs/cm3leon_7b.py --workdir /mnt/runs/7b
#
# Each worker has this repository in ~/cm3leon_jax, with `bash launch/setup.sh tpu` done,
# and the work directory on storage that all share. A run that was told to stop (exit
# status 75), lost a worker or whose workers have not met (69) is started again, up to
# CM3LEON_RESTARTS (20) times; 75 counts too, as the worker whose status gcloud gives may
# have ended so because another crashed.
set -uo pipefail

tpu=${1:?the name of the TPU} zone=${2:?its zone} script=${3:?a script of launch/}
shift 3
remote="cd cm3leon_jax && exec bash launch/tpu_vm/worker.sh $(printf '%q ' "$script" "$@")"

for ((restart = 0; ; restart++)); do
  gcloud compute tpus tpu-vm ssh "$tpu" --zone="$zone" --worker=all --command="$remote"
  code=$?
  { [ $code -eq 69 ] || [ $code -eq 75 ] || [ $code -ge 128 ]; } || exit $code
  [ $restart -lt "${CM3LEON_RESTARTS:-20}" ] || exit $code
  echo "exit status $code: started again" >&2
  sleep "${CM3LEON_PAUSE:-60}"
done
