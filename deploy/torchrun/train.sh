#!/usr/bin/env bash
# Pre-trains on several hosts without a scheduler: the same command on each of them. HOST is one of
# them, which all of them reach at PORT; --out must be where all of them see it.
#
#   ./train.sh HOST:PORT NUM_HOSTS beit --cache s3://bucket/photos.cache --out /shared/runs/beit
#
# A run of which a process died is started again from its newest checkpoint, on all hosts.
set -euo pipefail

[ $# -gt 2 ] || { echo "usage: train.sh HOST:PORT NUM_HOSTS RECIPE --cache CACHE --out RUN ..." >&2; exit 2; }
exec torchrun --nnodes "$2" --nproc-per-node "${PROCESSES_PER_NODE:-gpu}" \
    --rdzv-backend c10d --rdzv-endpoint "$1" --rdzv-id patchcache --max-restarts 3 \
    --shutdown-timeout 240 -m cache_builder train "${@:3}"
